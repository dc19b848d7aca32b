# /// script
# requires-python = ">=3.13"
# dependencies = [
#     "torch>=2.7,<3",
#     "gymnasium[box2d]>=1.1,<2",
#     "gym-super-mario-bros>=9,<10",
#     "nes-py>=9,<10",
#     "numpy>=2.1,<3",
#     "tyro>=0.9,<2",
#     "tqdm>=4.66,<5",
#     "opencv-python-headless>=4.10,<6",
#     "moviepy>=2.1,<3",
#     "wandb>=0.19,<1",
# ]
# ///
"""DOCSTRING"""

import collections
import contextlib
import copy
import dataclasses
import difflib
import importlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import cv2
import gym_super_mario_bros  # noqa: F401, registers the Mario environments
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gym_super_mario_bros.actions import SIMPLE_MOVEMENT
from gymnasium.wrappers.utils import RunningMeanStd
from nes_py import NESEnv
from nes_py.wrappers import JoypadSpace
from tqdm import tqdm

SCRIPT = "ppo"


@dataclasses.dataclass
class Args:
    env: str = "SuperMarioBros-1-1-v0"
    """Gymnasium id; `package.module:Id-v0` imports the module first"""
    seed: int = 1
    """seed of everything random in the run"""
    cuda: bool = False
    """compute on the GPU where there is one"""
    total_timesteps: int = 2_000_000
    """agent steps to train for, all environments together"""
    num_envs: int = 16
    """environments played in parallel"""
    num_threads: int = 0
    """threads that step the environments; 0: cores + 1 for images, 1 for vectors"""
    learning_rate: float = 2.5e-4
    """step size of Adam"""
    gamma: float = 0.9
    """discount factor"""
    eval_episodes: int = 20
    """episodes of each evaluation"""
    eval_every: int = 100_000
    """agent steps between evaluations; 0: only at the end"""
    save_every: int = 20_000
    """agent steps between checkpoints; 0: only at the end"""
    run_dir: str = ""
    """folder for what the run writes; default: runs/<env>__<script>__<seed>__<time>"""
    resume: str = ""
    """continue the run in this folder"""
    evaluate: str = ""
    """play this checkpoint, train nothing"""
    capture_video: bool = False
    """record the first episode of each evaluation as mp4"""
    track: bool = False
    """send metrics and videos to Weights & Biases"""
    wandb_project_name: str = "rl-ladder"
    """project to track the run in"""
    wandb_entity: str = ""
    """team to track the run under; default: your own"""
    compile: bool = False
    """compile the network (torch.compile; CUDA graphs on a GPU)"""

    num_steps: int = 128
    """steps of each environment per rollout"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 8
    """minibatches per epoch"""
    update_epochs: int = 4
    """passes over each rollout"""
    clip_coef: float = 0.2
    """epsilon of the clipped surrogate, equation (5)"""
    clip_vloss: bool = False
    """clip the value loss in the same way"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradients are scaled down to this norm"""
    target_kl: float = 0.0
    """end an update's epochs once the policy has moved this far (approximate KL); 0: never"""
    norm_adv: bool = True
    """standardise advantages in each minibatch"""
    norm_reward: bool = True
    """divide rewards by the running deviation of the discounted return"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    anneal_ent: bool = True
    """let the entropy bonus fall linearly to 0"""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size


def fail(sentence: str) -> None:
    """End at a user's mistake: one sentence, exit code 2."""
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def check(args: Args) -> None:
    """End with exit code 2 at the first flag whose value cannot work."""
    at_least_1, not_negative = "it must be at least 1", "it must be 0 or more"
    rules = {
        "seed": (0 <= args.seed < 2**32, "it must lie between 0 and 4294967295"),
        "num_envs": (args.num_envs >= 1, at_least_1),
        "num_threads": (args.num_threads >= 0, not_negative),
        "learning_rate": (0 < args.learning_rate < math.inf, "it must be positive, such as 2.5e-4"),
        "gamma": (0 <= args.gamma <= 1, "it must lie between 0 and 1"),
        "eval_episodes": (args.eval_episodes >= 1, at_least_1),
        "eval_every": (args.eval_every >= 0, not_negative),
        "save_every": (args.save_every >= 0, not_negative),
        "num_steps": (args.num_steps >= 1, at_least_1),
        "gae_lambda": (0 <= args.gae_lambda <= 1, "it must lie between 0 and 1"),
        "update_epochs": (args.update_epochs >= 1, at_least_1),
        "clip_coef": (0 < args.clip_coef < math.inf, "it must be positive, such as 0.2"),
        "ent_coef": (0 <= args.ent_coef < math.inf, not_negative),
        "vf_coef": (0 <= args.vf_coef < math.inf, not_negative),
        "max_grad_norm": (args.max_grad_norm > 0, "it must be positive, such as 0.5"),
        "target_kl": (0 <= args.target_kl < math.inf, not_negative),
        "num_minibatches": (
            args.num_minibatches >= 1 and args.batch_size % args.num_minibatches == 0,
            f"it must divide the batch of num_envs x num_steps = {args.batch_size}",
        ),
        "total_timesteps": (
            args.total_timesteps >= args.batch_size,
            f"it must be at least one batch of num_envs x num_steps = {args.batch_size}",
        ),
    }
    for name, (works, remedy) in rules.items():
        if not works:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} cannot work: {remedy}.")


# ---------------------------------------------------------------- environments


class Video(gym.Wrapper):
    """Sends every frame of an episode to an mp4 file while `path` is set; frames need no copy, they are encoded at once."""

    path, writer = None, None

    def reset(self, **kwargs):
        result = self.env.reset(**kwargs)
        self.finish()
        if self.path:
            self.write()
        return result

    def step(self, action):
        result = self.env.step(action)
        if self.writer:
            self.write()
        return result

    def write(self):
        frame = self.env.render()
        if self.writer is None:
            from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

            height, width = frame.shape[:2]
            self.writer = FFMPEG_VideoWriter(str(self.path), (width, height), self.env.metadata.get("render_fps", 30))
            self.path = None
        self.writer.write_frame(frame)

    def finish(self):
        if self.writer:
            self.writer.close()
        self.writer = None


class Frames(gym.Wrapper):
    """Images as in Mnih et al. (2015): repeat the action for 4 frames, keep the last one grey at 84 x 84, stack 4 of them."""

    def __init__(self, env, skip=4, size=84, stack=4):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (stack, size, size), np.uint8)
        self.skip, self.stack = skip, np.zeros((stack, size, size), np.uint8)

    def grey(self, image):
        if isinstance(self.unwrapped, NESEnv):  # the emulator writes a grey screen 8 times faster than OpenCV converts
            image = self.unwrapped.observation("grayscale")
        elif image.shape[-1] == 3:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return cv2.resize(image, self.stack.shape[1:], interpolation=cv2.INTER_AREA)

    def reset(self, **kwargs):
        image, info = self.env.reset(**kwargs)
        self.stack[:] = self.grey(image)
        return self.stack.copy(), info

    def step(self, action):
        total = 0.0
        for _ in range(self.skip):
            image, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        self.stack[:-1] = self.stack[1:]
        self.stack[-1] = self.grey(image)
        return self.stack.copy(), total, terminated, truncated, info


def make_env(env_id: str, render: bool = False) -> gym.Env:
    """Build one environment. Ends with exit code 2 if there is none of this id or its spaces do not fit."""
    with contextlib.suppress(ValueError):
        module, env_id = env_id.split(":")
        try:
            importlib.import_module(module)
        except ImportError as error:
            fail(f"--env {module}:{env_id} cannot be used: importing {module} failed ({error}).")
    if env_id not in gym.registry:
        near = ", ".join(difflib.get_close_matches(env_id, gym.registry, 4, 0.4))
        fail(f"--env {env_id} is not a known environment" + (f"; the nearest ids are {near}." if near else "."))
    try:
        env = gym.make(env_id, render_mode="rgb_array" if render else None, disable_env_checker=True)
    except gym.error.Error as error:
        fail(f"--env {env_id} cannot be made: {error}")
    if isinstance(env.unwrapped, NESEnv):
        env = JoypadSpace(env, SIMPLE_MOVEMENT)
    if not isinstance(env.action_space, gym.spaces.Discrete):
        fail(f"--env {env_id} has actions of the kind {env.action_space}; {SCRIPT}.py needs a Discrete action space.")
    if not isinstance(env.observation_space, gym.spaces.Box):
        fail(f"--env {env_id} has observations of the kind {env.observation_space}; {SCRIPT}.py needs a Box.")
    env = Video(env) if render else env
    shape, dtype = env.observation_space.shape, env.observation_space.dtype
    return Frames(env) if dtype == np.uint8 and len(shape) == 3 and shape[-1] in (1, 3) else env


class Envs:
    """Environments stepped together, in threads where that pays (an emulator releases the GIL).

    An episode that ends is replaced at once: `obs` then holds the first observation of the next one, `final_obs[i]`
    the last one of the old, and `finished[i]` what is to be told about it. All arrays have one row per environment.
    """

    def __init__(self, env_id: str, num_envs: int, num_threads: int = 0, render: bool = False):
        self.envs = [make_env(env_id, render and i == 0) for i in range(num_envs)]
        space = self.envs[0].observation_space
        self.num_actions, self.first_action = int(self.envs[0].action_space.n), int(self.envs[0].action_space.start)
        self.image = len(space.shape) == 3 and space.dtype == np.uint8
        self.obs = np.zeros((num_envs, *space.shape), np.uint8 if self.image else np.float32)
        self.rewards = np.zeros(num_envs, np.float64)
        self.terminated, self.truncated = np.zeros(num_envs, bool), np.zeros(num_envs, bool)
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self.final_obs, self.finished = {}, {}
        num_threads = min(num_threads or ((os.cpu_count() or 1) + 1 if self.image else 1), num_envs)
        self.pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None

    def reset(self, seed: int) -> np.ndarray:
        """Begin new episodes, environment i with the i-th child of `seed`."""
        seeds = np.random.SeedSequence(seed).generate_state(len(self.envs))
        for i, env in enumerate(self.envs):
            self.obs[i] = env.reset(seed=int(seeds[i]))[0]
        self.returns[:], self.lengths[:] = 0, 0
        return self.obs

    def step_one(self, i: int, action: int) -> None:
        env = self.envs[i]
        try:
            obs, self.rewards[i], terminated, truncated, info = env.step(action + self.first_action)
            self.terminated[i], self.truncated[i] = terminated, truncated and not terminated
            self.returns[i] += self.rewards[i]
            self.lengths[i] += 1
            if terminated or truncated:
                self.final_obs[i] = np.array(obs)
                self.finished[i] = {"episodic_return": self.returns[i], "episodic_length": int(self.lengths[i])}
                if "flag_get" in info:
                    self.finished[i] |= {"flag": int(info["flag_get"]), "x_pos": int(info["x_pos"])}
                self.returns[i], self.lengths[i] = 0, 0
                obs, _ = env.reset()
            self.obs[i] = obs
        except Exception as error:
            raise RuntimeError(f"environment {i} raised {type(error).__name__}: {error}") from error

    def step(self, actions: np.ndarray, active=None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Step the environments (only those in `active`, if given) -> obs, rewards, terminated, truncated.

        The arrays are overwritten by the next step. An episode that is both terminated and truncated is terminated.
        """
        self.final_obs, self.finished = {}, {}
        indices = range(len(self.envs)) if active is None else active
        run = self.pool.map if self.pool else map
        collections.deque(run(self.step_one, indices, [int(actions[i]) for i in indices]), maxlen=0)
        return self.obs, self.rewards, self.terminated, self.truncated


class RewardScaler:
    """Divides rewards by the running deviation of the discounted return (Engstrom et al., 2020), so that one learning
    rate fits environments whose rewards are a hundred times apart. No mean is subtracted: the sign stays."""

    def __init__(self, num_envs: int, gamma: float):
        self.gamma, self.returns, self.running = gamma, np.zeros(num_envs), RunningMeanStd()

    def __call__(self, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
        self.returns = self.returns * self.gamma + rewards
        self.running.update(self.returns)
        self.returns[dones] = 0
        return np.clip(rewards / np.sqrt(self.running.var + 1e-8), -10, 10)


# ---------------------------------------------------------------- network


def layer_init(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def trunk(obs_shape: tuple, image: bool) -> nn.Sequential:
    """Features of an observation: the CNN of Mnih et al. (2015) for images, two layers of 64 for vectors."""
    if image:
        return nn.Sequential(
            layer_init(nn.Conv2d(obs_shape[0], 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3)),
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        )
    return nn.Sequential(
        nn.Flatten(),
        layer_init(nn.Linear(math.prod(obs_shape), 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, 64)),
        nn.Tanh(),
    )


class Agent(nn.Module):
    """Policy pi(a|s) and value V(s). Images share one trunk; vectors get one each, which costs little there."""

    def __init__(self, obs_shape: tuple, num_actions: int, image: bool, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.image, self.dtype = image, dtype
        self.actor_trunk = trunk(obs_shape, image)
        self.critic_trunk = self.actor_trunk if image else trunk(obs_shape, image)
        width = 512 if image else 64
        self.actor = layer_init(nn.Linear(width, num_actions), 0.01)
        self.critic = layer_init(nn.Linear(width, 1), 1.0)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (B, ...) -> logits (B, actions) and values (B,), both float32."""
        if self.image:
            obs = obs.to(self.dtype, memory_format=torch.channels_last) / 255
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            features = self.actor_trunk(obs)
            values = features if self.image else self.critic_trunk(obs)
        return self.actor(features.float()), self.critic(values.float()).squeeze(-1)


def sample(logits: torch.Tensor, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, actions) -> actions (B,) drawn from the policy, and log pi(a|s) (B,)."""
    log_probs = F.log_softmax(logits, -1)
    actions = torch.multinomial(log_probs.exp(), 1, generator=generator)
    return actions.squeeze(-1), log_probs.gather(-1, actions).squeeze(-1)


# ---------------------------------------------------------------- the algorithm


def gae(rewards, values, next_values, dones, gamma: float, gae_lambda: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016, equation 16) -> advantages, returns; all (T, N).

    `next_values[t]` is V of the state that step t truly led to: 0 where the episode terminated, V(last observation)
    where a time limit cut it. `dones[t]` marks both: no advantage flows back across an episode's end.
    """
    deltas = rewards + gamma * next_values - values
    advantages, advantage = torch.zeros_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantage = deltas[t] + gamma * gae_lambda * (1 - dones[t]) * advantage
        advantages[t] = advantage
    return advantages, advantages + values


def policy_loss(log_ratio: torch.Tensor, advantages: torch.Tensor, clip_coef: float) -> torch.Tensor:
    """-L_clip of equation (5), with the ratio (6) given as its logarithm; all (B,) -> scalar."""
    ratio = log_ratio.exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def value_loss(values: torch.Tensor, returns: torch.Tensor, old_values: torch.Tensor, clip: float) -> torch.Tensor:
    """Half the mean squared error; with clip > 0 the larger one of V and V clipped around its old value; all (B,)."""
    error = (values - returns) ** 2
    if clip:
        error = torch.max(error, (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2)
    return 0.5 * error.mean()


def update(agent, optimizer, args: Args, batch: dict, ent_coef: float) -> dict:
    """Several epochs of minibatch steps on one rollout -> the figures of the update, each a mean over its minibatches.

    `batch` holds tensors of batch_size rows: obs, actions, log_probs, values, advantages, returns.
    """
    figures = []
    for _ in range(args.update_epochs):
        kl = []
        for rows in torch.randperm(args.batch_size, device=batch["obs"].device).split(args.minibatch_size):
            mini = {name: tensor[rows] for name, tensor in batch.items()}
            logits, values = agent(mini["obs"])
            log_probs = F.log_softmax(logits, -1)
            log_ratio = log_probs.gather(-1, mini["actions"][:, None]).squeeze(-1) - mini["log_probs"]
            advantages = mini["advantages"]
            if args.norm_adv and len(rows) > 1:
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            pg_loss = policy_loss(log_ratio, advantages, args.clip_coef)
            v_loss = value_loss(values, mini["returns"], mini["values"], args.clip_coef if args.clip_vloss else 0)
            entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
            loss = pg_loss - ent_coef * entropy + args.vf_coef * v_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            with torch.no_grad():
                kl.append((log_ratio.exp() - 1 - log_ratio).mean())  # the k3 estimate of KL(old || new)
                clipped = ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean()
                figures.append(torch.stack([loss, pg_loss, v_loss, entropy, kl[-1], clipped]))
        if args.target_kl and torch.stack(kl).mean() > args.target_kl:
            break
    names = ("loss", "policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
    return dict(zip(names, torch.stack(figures).mean(0).tolist(), strict=True))


# ---------------------------------------------------------------- evaluate


@torch.no_grad()
def evaluate(agent, envs: Envs, episodes: int, seed: int, device, video: Path | None = None) -> dict:
    """Play whole episodes with actions drawn from the policy -> eval/* figures.

    Each environment plays a fixed number of episodes, so short episodes do not crowd out long ones. A generator of
    its own keeps the random numbers of training as they were.
    """
    if video:
        video.parent.mkdir(parents=True, exist_ok=True)
        envs.envs[0].set_wrapper_attr("path", video)
    obs = envs.reset(seed)
    generator = torch.Generator(device).manual_seed(seed)
    left = np.full(len(envs.envs), episodes // len(envs.envs))
    left[: episodes % len(envs.envs)] += 1
    results = []
    while left.any():
        actions, _ = sample(agent(torch.as_tensor(obs, device=device))[0], generator)
        envs.step(actions.cpu().numpy(), np.flatnonzero(left))
        for i, episode in sorted(envs.finished.items()):
            results.append(episode)
            left[i] -= 1
    column = {name: np.array([episode[name] for episode in results]) for name in results[0]}
    figures = {"eval/episodes": len(results)}
    figures |= {"eval/return_mean": column["episodic_return"].mean(), "eval/return_std": column["episodic_return"].std()}
    figures |= {"eval/length_mean": column["episodic_length"].mean()}
    if "flag" in column:
        figures |= {"eval/flag_rate": column["flag"].mean(), "eval/x_pos_mean": column["x_pos"].mean()}
        figures |= {"eval/x_pos_std": column["x_pos"].std(), "eval/x_pos_max": column["x_pos"].max()}
    return {name: float(value) for name, value in figures.items()}


def describe(result: dict) -> str:
    """eval/* figures -> the sentence that a reader wants."""
    r = {name.removeprefix("eval/"): value for name, value in result.items()}
    text = f"{r['episodes']:.0f} episodes: return {r['return_mean']:.1f} +- {r['return_std']:.1f}"
    if "flag_rate" in r:
        text += f", flag {r['flag_rate']:.0%}, x {r['x_pos_mean']:.0f} +- {r['x_pos_std']:.0f} (best {r['x_pos_max']:.0f})"
    return text


# ---------------------------------------------------------------- save, load, log


def save(path: Path, state: dict) -> None:
    """Write a checkpoint so that a kill at any moment leaves the previous one whole."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> dict:
    """Read a checkpoint of this script; `weights_only` keeps a stranger's file from running code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        script = state["script"]
    except FileNotFoundError:
        fail(f"There is no checkpoint {path}; give the path of a run that has one.")
    except Exception as error:
        fail(f"{path} cannot be read as a checkpoint ({type(error).__name__}); take another one, such as best.pt.")
    if script != SCRIPT:
        fail(f"{path} is a checkpoint of {script}.py, not of {SCRIPT}.py; give it to {script}.py.")
    return state


class Log:
    """One JSON object a line in metrics.jsonl, the same figures to the tracker, and the progress on the terminal."""

    def __init__(self, args: Args, run_dir: Path, state: dict):
        self.file = open(run_dir / "metrics.jsonl", "ab", buffering=0)  # one write per line: a kill tears none
        self.file.truncate(state.get("metrics_bytes", 0))  # steps after the checkpoint will be played again
        self.began = self.printed = time.time() - state.get("seconds", 0)
        self.recent = collections.deque(maxlen=100)
        step = state.get("global_step", 0)
        self.bar = tqdm(
            total=args.total_timesteps, initial=step, unit=" steps", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )
        self.wandb = self.run = None
        if args.track:
            import wandb

            online = wandb.api.api_key or sys.stdin.isatty()
            self.wandb = wandb
            self.run = wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity or None,
                name=run_dir.name,
                id=state.get("wandb_id"),
                resume="allow",
                dir=run_dir,
                config=dataclasses.asdict(args),
                mode=os.environ.get("WANDB_MODE") or ("online" if online else "offline"),
            )

    @property
    def seconds(self) -> float:
        return time.time() - self.began

    def write(self, step: int, figures: dict) -> None:
        line = {"global_step": step, "time": round(self.seconds, 3)} | figures
        self.file.write((json.dumps(line) + "\n").encode())
        if self.run:
            self.run.log(line)

    def episode(self, step: int, episode: dict) -> None:
        self.recent.append(episode)
        self.write(step, {f"charts/{name}": value for name, value in episode.items()})

    def progress(self, step: int, sps: float) -> None:
        means = {name: np.mean([episode[name] for episode in self.recent]) for name in (self.recent or [{}])[0]}
        note = f"return {means['episodic_return']:.1f}" if means else ""
        if "flag" in means:
            note += f", flag {means['flag']:.0%}, x {means['x_pos']:.0f}"
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and time.time() - self.printed > 5:
            self.printed = time.time()
            print(f"{step:,}/{self.bar.total:,} steps, {sps:.0f} steps/s, {note}", flush=True)

    def close(self) -> None:
        self.bar.close()
        if self.run:
            self.run.finish()


def write_config(args: Args, run_dir: Path, device: torch.device) -> None:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    packages = ("torch", "gymnasium", "gym-super-mario-bros", "numpy")
    config = dataclasses.asdict(args) | {
        "script": SCRIPT,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "commit": git.stdout.strip() or None,
    }
    (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def due(step: int, done: int, every: int) -> bool:
    """Whether the last `done` steps crossed a multiple of `every`."""
    return every > 0 and step // every > (step - done) // every


class Stopped(BaseException):
    """Ctrl-C or SIGTERM; the argument is the signal's number."""


def stop(number, frame):
    raise Stopped(number)


# ---------------------------------------------------------------- main


def main() -> None:
    args, state = tyro.cli(Args, description=__doc__.split("\n\n")[0]), {}
    if args.resume or args.evaluate:
        state = load(Path(args.evaluate or Path(args.resume) / "checkpoint.pt"))
        args = tyro.cli(Args, default=Args(**state["args"]))  # flags on the command line win over the saved ones
        fixed = ("env",) if args.evaluate else ("env", "num_envs", "num_steps")
        for name in fixed:
            if getattr(args, name) != state["args"][name]:
                flag, was = f"--{name.replace('_', '-')}", state["args"][name]
                fail(f"{flag} {getattr(args, name)} does not fit the checkpoint, which has {was}; leave {flag} out.")
    check(args)
    if args.cuda and not torch.cuda.is_available():
        print("--cuda: there is no CUDA device here, going on with the CPU.")
    elif not args.cuda and torch.cuda.is_available():
        print("There is a CUDA device here; --cuda would use it.")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    runner = f"{'uv run' if 'UV' in os.environ else 'python'} {sys.argv[0]}"

    torch.manual_seed(args.seed)
    envs = Envs(args.env, 1 if args.evaluate else args.num_envs, args.num_threads)
    cores = os.cpu_count() or 1
    learn_threads = cores if envs.image and device.type == "cpu" else 1
    bfloat16 = envs.image and (device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False))
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    agent = Agent(envs.obs.shape[1:], envs.num_actions, envs.image, dtype).to(device)
    if envs.image:
        agent.to(memory_format=torch.channels_last)
    if state:
        agent.load_state_dict(state["agent"])
    if args.compile:
        agent.compile(mode="reduce-overhead" if device.type == "cuda" else "default")

    def play(video: Path | None) -> dict:
        nonlocal eval_envs
        if eval_envs is None:
            eval_envs = Envs(args.env, min(args.num_envs, args.eval_episodes), args.num_threads, args.capture_video)
        return evaluate(agent, eval_envs, args.eval_episodes, args.seed + 2**31, device, video)

    eval_envs = None
    torch.set_num_threads(1)
    if args.evaluate:
        path = Path(args.evaluate)
        video = path.parent / "videos" / f"{path.stem}.mp4" if args.capture_video else None
        result = play(video)
        print(describe(result) + (f"; video: {video}" if video else ""))
        return

    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    scaler = RewardScaler(args.num_envs, args.gamma)
    global_step, best = 0, -math.inf
    if state:
        optimizer.load_state_dict(state["optimizer"])
        global_step, best = state["global_step"], state["best"]
        scaler.running.mean, scaler.running.var, scaler.running.count = state["reward_stats"]
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"])
    if global_step // args.batch_size >= args.num_iterations:
        fail(f"The run in {args.resume} is complete; --total-timesteps beyond {global_step} would continue it.")
    name = f"{args.env}__{SCRIPT}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
    run_dir = Path(args.resume or args.run_dir or f"runs/{name}")
    if not args.resume and (run_dir / "checkpoint.pt").exists():
        fail(f"--run-dir {run_dir} already holds a run; continue it with --resume {run_dir} or name another folder.")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(args, run_dir, device)
    log = Log(args, run_dir, state)

    def snapshot() -> dict:
        """Everything a resumed run needs; copies, so that it stays as it is while training goes on."""
        stats = scaler.running.mean, scaler.running.var, scaler.running.count
        return {
            "script": SCRIPT,
            "args": dataclasses.asdict(dataclasses.replace(args, resume="", run_dir=str(run_dir))),
            "agent": copy.deepcopy(agent.state_dict()),
            "optimizer": copy.deepcopy(optimizer.state_dict()),
            "global_step": global_step,
            "best": best,
            "reward_stats": [float(x) for x in stats],
            "rng": torch.get_rng_state(),
            **({"cuda_rng": torch.cuda.get_rng_state()} if device.type == "cuda" else {}),
            "seconds": log.seconds,
            "metrics_bytes": log.file.tell(),
            "wandb_id": log.run.id if log.run else None,
        }

    good, ended, code = snapshot(), "finished", 0
    save(run_dir / "checkpoint.pt", good)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    shape = (args.num_steps, args.num_envs)
    obs_dtype = torch.uint8 if envs.image else torch.float32
    obs = torch.zeros((*shape, *envs.obs.shape[1:]), dtype=obs_dtype, device=device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    log_probs, values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    rewards, terminated, truncated = np.zeros(shape), np.zeros(shape, bool), np.zeros(shape, bool)

    try:
        envs.reset([args.seed, global_step])
        while global_step + args.batch_size <= args.total_timesteps:
            began = time.time()
            frac = 1 - global_step / (args.num_iterations * args.batch_size)
            optimizer.param_groups[0]["lr"] = lr = args.learning_rate * (frac if args.anneal_lr else 1)
            ent_coef = args.ent_coef * (frac if args.anneal_ent else 1)

            # act
            last_obs = []
            for t in range(args.num_steps):
                obs[t] = torch.as_tensor(envs.obs)
                with torch.no_grad():
                    logits, values[t] = agent(obs[t])
                    actions[t], log_probs[t] = sample(logits)
                _, reward, terminated[t], truncated[t] = envs.step(actions[t].cpu().numpy())
                rewards[t] = scaler(reward, terminated[t] | truncated[t]) if args.norm_reward else reward
                last_obs += [(t, i, envs.final_obs[i]) for i in np.flatnonzero(truncated[t])]
                global_step += args.num_envs
                for _, episode in sorted(envs.finished.items()):
                    log.episode(global_step, episode)
                log.progress(global_step, 0)

            # learn
            torch.set_num_threads(learn_threads)
            with torch.no_grad():
                next_values = torch.cat([values[1:], agent(torch.as_tensor(envs.obs, device=device))[1][None]])
                next_values[torch.as_tensor(terminated, device=device)] = 0
                if last_obs:
                    t, i, final = zip(*last_obs, strict=True)
                    next_values[list(t), list(i)] = agent(torch.as_tensor(np.stack(final), device=device))[1]
                dones = torch.as_tensor(terminated | truncated, dtype=torch.float32, device=device)
                scaled = torch.as_tensor(rewards, dtype=torch.float32, device=device)
                advantages, returns = gae(scaled, values, next_values, dones, args.gamma, args.gae_lambda)
            batch = {"obs": obs, "actions": actions, "log_probs": log_probs, "values": values}
            batch |= {"advantages": advantages, "returns": returns}
            batch = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
            figures = update(agent, optimizer, args, batch, ent_coef)
            if not math.isfinite(figures["loss"]):
                raise FloatingPointError("the loss is no longer a finite number; a smaller --learning-rate may help")
            torch.set_num_threads(1)

            # log, evaluate, save
            figures = {f"losses/{name}": figure for name, figure in figures.items()}
            figures["losses/explained_variance"] = 1 - float((returns - values).var() / (returns.var() + 1e-8))
            sps = args.batch_size / (time.time() - began)
            log.write(global_step, {"charts/SPS": round(sps, 1), "charts/learning_rate": lr} | figures)
            last = global_step + args.batch_size > args.total_timesteps
            if last or due(global_step, args.batch_size, args.eval_every):
                video = run_dir / "videos" / f"{global_step}.mp4" if args.capture_video else None
                result = play(video)
                log.write(global_step, result)
                if result["eval/return_mean"] >= best:
                    best = result["eval/return_mean"]
                    save(run_dir / "best.pt", snapshot())
            good = snapshot()
            if last or due(global_step, args.batch_size, args.save_every):
                save(run_dir / "checkpoint.pt", good)
    except Stopped as signal_:
        ended, code = "stopped", 128 + signal_.args[0]
    except Exception as error:
        ended, code = f"failed: {error}", 1
        (run_dir / "error.txt").write_text(traceback.format_exc())
    if code:
        save(run_dir / "checkpoint.pt", good)
    log.close()
    played = run_dir / ("best.pt" if (run_dir / "best.pt").exists() else "checkpoint.pt")
    print(f"{ended} at {good['global_step']:,} steps; checkpoint, metrics and config: {run_dir}")
    if code:
        print(f"continue: {runner} --resume {run_dir}")
    print(f"watch: {runner} --evaluate {played} --capture-video")
    sys.exit(code)


if __name__ == "__main__":
    main()
