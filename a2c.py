# /// script
# requires-python = ">=3.13,<3.14"  # Box2D has no wheels for 3.14 yet, nes-py none for 3.15
# dependencies = [
#     "torch>=2.8,<3",
#     "gymnasium[classic-control]>=1.2.3,<2",
#     "gymnasium[box2d]>=1.2.3,<2; platform_machine != 'aarch64'",  # Box2D has no wheels for Linux on ARM
#     "gym-super-mario-bros>=9,<10",
#     "numpy>=2.1,<3",
#     "opencv-python-headless>=4.11,<6",
#     "moviepy>=2.1,<3",
#     "tqdm>=4.67,<5",
#     "tyro>=0.9,<2",
#     "wandb>=0.31,<1",
# ]
# ///
r"""Advantage actor-critic: what if many Marios learn at once?

One Mario's frames resemble each other, and an update that follows a single one of them follows its accidents. Sixteen
Marios stand in sixteen different places: let each take T steps with the same policy, a rollout, then learn from all the
N x T steps in one update. The average over them is a far calmer gradient, and neighbouring frames no longer rule it.

T steps also allow a better estimate than one. The TD errors

    (3)  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)        V(s_{t+1}) = 0 where the episode terminated,
                                                          V(last observation) where a time limit cut it

add up, since each V but the first and the last cancels, to the n-step advantage

    A_t = delta_t + gamma delta_{t+1} + gamma^2 delta_{t+2} + ...
        = r_t + gamma r_{t+1} + ... + gamma^n V(s_{t+n}) - V(s_t)

where n steps lie before the end of the rollout or of the episode. The fewer guesses of the critic are in it, the fewer
of its errors. --gae-lambda below 1 trusts later TD errors less; lambda = 0 is the last script's (3) again, and one
environment with one step has that script's gradient, to the digit, where bonus and clipping are switched off and
--vf-coef is 1.

The loss joins the policy gradient, (2) E[ grad log pi(a_t|s_t) A_t ], half the squared error of V, weighted by
--vf-coef, and an entropy bonus, which keeps Mario trying other buttons and falls to 0. One gradient step, then new
data: the batch was drawn from a policy that no longer exists.

A3C came first (the asynchronous form): 16 threads, each with its own Mario and a copy of the weights, add their
gradients to shared weights without waiting for one another, so a gradient may be of weights that have moved on.
Waiting for all and updating once gives the same estimator, a batch that processors like, and runs that can be repeated:
A2C. RMSProp is the paper's optimiser, the epsilon of 1e-5 that of OpenAI's A2C, where it stands under the root; PyTorch
adds it behind the root, where the same floor is sqrt(1e-5), 300 times as much.

What is still wrong: nothing bounds a step. One bad batch can wreck a policy that took an hour to learn, and all data to
come is then drawn from the wreck.

    uv run a2c.py --env SuperMarioBros-1-1-v0 --cuda
    uv run a2c.py --env CartPole-v1 --total-timesteps 300000 --num-envs 8 --gamma 0.99 --learning-rate 3e-3 \
        --ent-coef 0 --eval-episodes 100
    uv run a2c.py --env Acrobot-v1 --total-timesteps 300000 --num-envs 8 --gamma 0.99 --learning-rate 3e-3 \
        --ent-coef 0 --eval-episodes 100

Measured on 2 x86-64 cores without a GPU (flags, commits and curves in benchmark/results): over 100 episodes CartPole-v1
returns 500 for seeds 1 to 5, Acrobot-v1 -84, -88 and -82 for seeds 1 to 3. Super Mario Bros 1-1, seeds 1 and 2, 300,000
steps: mean x = 879 and 748 over the last 100 episodes, 1 and 5 flags in all.

Mnih et al. 2016, arXiv 1602.01783 (A3C); Schulman et al. 2016, arXiv 1506.02438 (GAE); Mnih et al. 2015, doi
10.1038/nature14236 (the images).
"""

import contextlib
import difflib
import functools
import importlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import gym_super_mario_bros  # noqa: F401, makes the Mario ids known
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

SCRIPT = "a2c"
CORES = getattr(os, "process_cpu_count", os.cpu_count)()  # that this process may use; before Python 3.13 all


@dataclass
class Args:
    env: str = "SuperMarioBros-1-1-v0"  # Gymnasium id; package.module:Id-v0 imports the module first
    seed: int = 1  # seed of the network, the actions and the environments
    cuda: bool = False  # compute on the GPU, if there is one
    total_timesteps: int = 1_000_000  # agent steps to train for, all environments together
    num_envs: int = 16  # environments played in parallel
    num_threads: int = 0  # threads that step them; 0: one more than cores for images, one for vectors
    learning_rate: float = 7e-4  # step size of the optimiser
    gamma: float = 0.9  # discount factor
    eval_episodes: int = 20  # episodes per evaluation
    eval_every: int = 100_000  # agent steps between evaluations; 0: only at the end
    save_every: int = 20_000  # agent steps between checkpoints; 0: only at the end
    log_every: int = 1_000  # agent steps between lines of losses, each the mean of the updates since the last
    run_dir: str = ""  # folder of the run; empty: runs/<env>__<script>__<seed>__<time>
    resume: str = ""  # folder of a run to continue
    evaluate: str = ""  # checkpoint to play, or folder of a run, without training
    capture_video: bool = False  # record the first episode of each evaluation
    track: bool = False  # send metrics and videos to Weights & Biases
    wandb_project_name: str = "rl-ladder"  # project to track the run in
    wandb_entity: str = ""  # team to track it under; empty: your own
    compile: bool = False  # compile the network (CUDA graphs on a GPU): slower start, faster updates
    # A2C
    num_steps: int = 5  # steps of each environment per rollout
    gae_lambda: float = 1.0  # lambda of generalised advantage estimation; 1: n-step returns
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # longer gradients are scaled down to this norm
    norm_reward: bool = True  # divide rewards by the running standard deviation of the discounted return
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    anneal_ent: bool = True  # let the entropy bonus fall linearly to 0

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def last_step(self) -> int:  # where training ends: after whole batches only
        return self.total_timesteps // self.batch_size * self.batch_size


def fail(sentence: str):
    """End at a user's mistake: one sentence, exit code 2."""
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def check(args: Args) -> None:
    """End with exit code 2 at the first flag whose value cannot work."""
    shares = "gamma gae_lambda backtrack_coef".split()
    zero = shares + "seed num_threads eval_every save_every log_every ent_coef vf_coef target_kl cg_damping".split()
    for name, value in asdict(args).items():
        if isinstance(value, (str, bool)):
            continue
        least, most = "at least" if name in zero else "above", 1 if name in shares else 2**31 - 1
        if not (0 < value <= most or (value == 0 and name in zero)):
            fail(f"--{name.replace('_', '-')} {value} cannot work; it must be {least} 0 and at most {most}.")
    if args.total_timesteps < args.batch_size:
        fail(f"--total-timesteps {args.total_timesteps} cannot work; it must be at least a batch, {args.batch_size}.")


def parse() -> tuple[Args, dict]:
    """Command line -> flags, and the checkpoint to resume or evaluate ({} for a new run)."""
    description = (__doc__ or "").partition("\n\n")[0]
    args, state = tyro.cli(Args, description=description), {}
    for flag in ("resume", "run_dir", "track") if args.evaluate else ():
        if getattr(args, flag):
            fail(f"--{flag.replace('_', '-')} cannot work with --evaluate, which only plays; leave one out.")
    folder = str(Path(args.resume).parent) if args.resume.endswith("checkpoint.pt") else args.resume
    if folder and args.run_dir and Path(args.run_dir).resolve() != Path(folder).resolve():
        fail(f"--run-dir {args.run_dir} cannot work with --resume, which goes on in {folder}; resume a copy of it.")
    if folder or args.evaluate:
        file = Path(args.evaluate or f"{folder}/checkpoint.pt")
        if file.is_dir():  # of a run: its best weights, or those that it has
            file /= "best.pt" if (file / "best.pt").exists() else "checkpoint.pt"
        state = load(file)
        try:
            saved = Args(**state["args"])
        except TypeError as error:  # of another commit, or of an edited copy
            fail(f"{file} has other flags than this script ({error}); use the script that wrote it.")
        args = tyro.cli(Args, description=description, default=saved)  # given flags win over saved ones
        args.evaluate, args.resume = args.evaluate and str(file), folder
        for flag in ("env", "size"):  # what the weights depend on
            given, written = getattr(args, flag, None), getattr(saved, flag, None)
            if given != written:
                fail(f"--{flag} {given} does not fit the checkpoint, which is of --{flag} {written}; leave it out.")
    check(args)
    if args.resume and state["global_step"] >= args.last_step:
        longer = state["global_step"] + args.total_timesteps
        fail(f"--resume {args.resume} is complete; for instance --total-timesteps {longer} would continue it.")
    name = f"{args.env}__{SCRIPT}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
    args.run_dir = args.resume or args.run_dir or f"runs/{name}"
    return args, state


# ------------------------------------------------------------------------------------------------ environments


class Frames(gym.Wrapper):
    """Images as Mnih et al. (2015) feed them: one action lasts 4 frames, every 4th frame is shrunk to 84 x 84 grey
    pixels, the latest 4 of those are the observation. It is overwritten by the next step: copy what you keep. Atari
    games draw some things on every other frame only; of theirs it is the maximum of the 3rd and the 4th."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.metadata = env.metadata | {"render_fps": (env.metadata.get("render_fps") or 60) / 4}
        self.frames = np.zeros((4, 84, 84), np.uint8)
        self.flickers = type(env.unwrapped).__name__ == "AtariEnv"

    def shrink(self, image: np.ndarray) -> np.ndarray:
        if isinstance(self.unwrapped, NESEnv) and image is self.unwrapped.screen:  # 8 times faster than OpenCV's grey
            image = self.unwrapped.observation("grayscale")
        elif image.shape[-1] == 3:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return cv2.resize(image, (84, 84), interpolation=cv2.INTER_AREA)

    def reset(self, **kwargs):
        image, info = self.env.reset(**kwargs)
        self.frames[:] = self.shrink(image)
        return self.frames, info

    def step(self, action):
        total, image = 0.0, None
        for _ in range(4):
            before = image
            image, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        if self.flickers and before is not None:
            image = np.maximum(before, image)
        self.frames[:-1] = self.frames[1:]
        self.frames[-1] = self.shrink(image)
        return self.frames, total, terminated, truncated, info


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """One environment, ready for the agent. Exit code 2 if there is none of this id or its spaces do not fit."""
    module, _, name = env_id.rpartition(":")
    if render_mode == "rgb_array":
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without looking for a screen
    try:
        if module:
            importlib.import_module(module)
        if name not in gym.registry:
            near = difflib.get_close_matches(name, gym.registry, 4, 0.4)
            others = f"one of another package is written package:{name}"
            fail(f"--env {env_id} is unknown; {others}, the nearest known ids are: {', '.join(near) or 'none'}.")
        options = {"render_mode": render_mode} if render_mode else {}  # an environment need not know the word
        spec = gym.registry[name]
        if str(spec.entry_point).endswith(":AtariEnv") and spec.kwargs.get("obs_type", "rgb") == "rgb":
            options["frameskip"] = 1  # actions on images are repeated for 4 frames here, whatever the id says
        env = gym.make(name, disable_env_checker=True, **options)
    except Exception as error:
        fail(f"--env {env_id} cannot be made; {type(error).__name__} says: {error}")
    if isinstance(env.unwrapped, NESEnv) and env.action_space == NESEnv.action_space:
        env = JoypadSpace(env, SIMPLE_MOVEMENT)
    for what, kind in (("action", gym.spaces.Discrete), ("observation", gym.spaces.Box)):
        space = getattr(env, f"{what}_space", None)
        if not isinstance(space, kind):
            remedy = f"{SCRIPT}.py needs {kind.__name__}, and dreamerv3.py takes Box actions and Dict observations, too"
            fail(f"--env {env_id} cannot work: its {what} space is {space}; {remedy}.")
    shape = env.observation_space.shape
    image = env.observation_space.dtype == np.uint8 and len(shape) == 3 and shape[-1] in (1, 3)
    return Frames(env) if image else env


class Envs:
    """Environments stepped together, in threads where that pays: the NES emulator releases Python's lock.

    Every array has one row per environment and is overwritten by the next step. Where an episode ends, `obs` already
    holds the first observation of the next one, `final_obs` the last of the old, and `finished` its figures.
    """

    def __init__(self, env_id: str, num_envs: int, num_threads: int = 0, render_mode: str | None = None):
        self.envs = [make_env(env_id, render_mode if i == 0 else None) for i in range(num_envs)]
        space, actions = self.envs[0].observation_space, self.envs[0].action_space
        self.image = isinstance(self.envs[0], Frames)
        self.num_actions, self.first_action = int(actions.n), int(actions.start)
        self.obs = np.zeros((num_envs, *(space.shape or (1,))), np.uint8 if self.image else np.float32)  # () as (1,)
        self.final_obs, self.finished = self.obs.copy(), {}
        self.rewards, self.returns, self.lengths = np.zeros((3, num_envs))
        self.terminated, self.truncated = np.zeros((2, num_envs), bool)
        num_threads = min(num_envs, num_threads or (CORES + 1 if self.image else 1))
        self.map = ThreadPoolExecutor(num_threads).map if num_threads > 1 else map

    def reset(self, seed: int | list[int]) -> None:
        """Begin new episodes, each environment with a seed of its own drawn from `seed`."""
        for i, s in enumerate(np.random.SeedSequence(seed).generate_state(len(self.envs))):
            self.obs[i], _ = self.envs[i].reset(seed=int(s))
        self.returns[:] = self.lengths[:] = 0

    def step(self, actions: list[int], rows=None) -> None:
        """Step the environments in `rows` (default: all) with their actions, one per environment."""
        self.finished = {}
        deque(self.map(self.step_one, range(len(self.envs)) if rows is None else rows, actions), maxlen=0)
        if not (np.isfinite(self.rewards).all() and (self.image or np.isfinite(self.obs).all())):
            raise FloatingPointError("a reward or an observation of the environment is not finite")

    def step_one(self, i: int, action: int) -> None:
        try:
            obs, reward, terminated, truncated, info = self.envs[i].step(action + self.first_action)
            self.obs[i] = np.asarray(obs).reshape(self.obs.shape[1:])  # a wrong shape shall not be broadcast
            self.rewards[i] = reward
            self.terminated[i], self.truncated[i] = terminated, truncated and not terminated
            self.returns[i] += reward
            self.lengths[i] += 1
            if terminated or truncated:
                figures = {"episodic_return": float(self.returns[i]), "episodic_length": int(self.lengths[i])}
                if "flag_get" in info:
                    figures |= {"flag": int(info["flag_get"]), "x_pos": int(info["x_pos"])}
                self.final_obs[i], self.finished[i] = obs, figures
                self.returns[i] = self.lengths[i] = 0
                self.obs[i], _ = self.envs[i].reset()
        except Exception as error:
            raise RuntimeError(f"environment {i} raised {type(error).__name__}: {error}") from error


class RewardScaler:
    """Divides rewards by the running deviation of the discounted return, so that one learning rate fits environments
    whose rewards are a hundred times apart. No mean is subtracted: a reward keeps its sign. None exceeds 10."""

    def __init__(self, num_envs: int, gamma: float):
        self.gamma, self.returns, self.stats = gamma, np.zeros(num_envs), RunningMeanStd()

    def __call__(self, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
        """rewards (T, N) and dones (T, N), the steps that follow those of the last call -> scaled rewards (T, N)."""
        returns = np.empty(rewards.shape)
        for t in range(len(rewards)):
            self.returns = returns[t] = rewards[t] + self.gamma * self.returns
            self.returns = np.where(dones[t], 0, self.returns)
        self.stats.update(returns.ravel())
        return np.clip(rewards / np.sqrt(self.stats.var + 1e-8), -10, 10)

    def state_dict(self) -> dict:
        return {name: float(getattr(self.stats, name)) for name in ("mean", "var", "count")}

    def load_state_dict(self, state: dict) -> None:
        vars(self.stats).update(state)


# ------------------------------------------------------------------------------------------------ network


def layer(module: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights, zero biases."""
    nn.init.orthogonal_(module.weight, gain)
    nn.init.zeros_(module.bias)
    return module


def trunk(obs_shape: tuple, image: bool) -> nn.Sequential:
    """Observations (B, *obs_shape) -> features: the CNN of Mnih et al. (2015) or two layers of 64."""
    if image:
        convs = layer(nn.Conv2d(4, 32, 8, 4)), layer(nn.Conv2d(32, 64, 4, 2)), layer(nn.Conv2d(64, 64, 3))
        modules = [module for conv in convs for module in (conv, nn.ReLU())]
        return nn.Sequential(*modules, nn.Flatten(), layer(nn.Linear(64 * 7 * 7, 512)), nn.ReLU())
    first = layer(nn.Linear(math.prod(obs_shape), 64))
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), layer(nn.Linear(64, 64)), nn.Tanh())


class Agent(nn.Module):
    """The policy pi(a|s) and the value V(s). On images they share a trunk, on vectors each has its own."""

    def __init__(self, obs_shape: tuple, num_actions: int, image: bool, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.image, self.dtype = image, dtype
        self.actor_trunk = trunk(obs_shape, image)
        self.critic_trunk = self.actor_trunk if image else trunk(obs_shape, image)
        self.actor = layer(nn.Linear(512 if image else 64, num_actions), 0.01)
        self.critic = layer(nn.Linear(512 if image else 64, 1), 1)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (B, *obs_shape) -> logits (B, num_actions) and values (B,), in float32."""
        if self.image:
            obs = obs.to(self.dtype, memory_format=torch.channels_last).div_(255)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            features = self.actor_trunk(obs)
            critic_features = features if self.image else self.critic_trunk(obs)
        return self.actor(features.float()), self.critic(critic_features.float()).squeeze(-1)

    @torch.no_grad()
    def act(self, obs: torch.Tensor, generator=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """obs (B, *obs_shape) -> actions (B,) drawn from the policy, their log pi(a|s) (B,), values (B,)."""
        logits, values = self(obs)
        log_probs = F.log_softmax(logits, -1)
        noise = torch.empty_like(log_probs).exponential_(generator=generator)
        actions = (log_probs.exp() / noise).argmax(-1, keepdim=True)  # as torch.multinomial, in half the time
        return actions.squeeze(-1), log_probs.gather(-1, actions).squeeze(-1), values


# ------------------------------------------------------------------------------------------------ algorithm


def gae(rewards, values, next_values, dones, gamma: float, gae_lambda: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16) -> advantages, returns; all (T, N).

    next_values[t] is V of the state to which step t really led: 0 if the episode terminated there, V(last observation)
    if a time limit cut it. dones[t] is True in both cases: no advantage flows back from one episode into another.
    """
    deltas = rewards + gamma * next_values - values  # the TD errors, equation (3)
    advantages, advantage = torch.zeros_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + gamma * gae_lambda * (advantage * ~dones[t])
    return advantages, advantages + values


def policy_loss(log_probs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Its gradient is minus the policy gradient, equation (2); (B,), (B,) -> scalar."""
    return -(log_probs * advantages).mean()


def value_loss(values: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
    """Half the mean squared error of V; (B,), (B,) -> scalar."""
    return 0.5 * ((values - returns) ** 2).mean()


def update(agent: Agent, optimizer, args: Args, batch: dict, ent_coef: float) -> dict:
    """One gradient step on the whole batch -> its losses.

    batch holds obs, actions, advantages and returns, with batch_size rows each.
    """
    logits, values = agent(batch["obs"])
    log_probs = F.log_softmax(logits, -1)
    chosen = log_probs.gather(-1, batch["actions"][:, None]).squeeze(-1)
    pg_loss = policy_loss(chosen, batch["advantages"])
    v_loss = value_loss(values, batch["returns"])
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    loss = pg_loss - ent_coef * entropy + args.vf_coef * v_loss
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    figures = {"loss": loss, "policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy, "grad_norm": grad_norm}
    return {f"losses/{name}": figure.detach() for name, figure in figures.items()}


# ------------------------------------------------------------------------------------------------ evaluate


def evaluate(agent: Agent, envs: Envs, episodes: int, seed: int, video: Path | None = None) -> dict:
    """Play whole episodes, actions drawn from the policy -> eval/... figures.

    Each environment plays a number of episodes fixed beforehand, so that short ones do not crowd out long ones, and
    the random numbers come from a generator of their own, so that evaluating leaves training as it was.
    """
    device = next(agent.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    left = np.array([len(range(i, episodes, len(envs.envs))) for i in range(len(envs.envs))])
    results, writer = [], None
    envs.reset([seed, 1])
    while left.any():
        if video:
            frame = envs.envs[0].render()
            writer = writer or open_video(video, frame, envs.envs[0].metadata.get("render_fps") or 30)
            writer.write_frame(frame)
        actions, *_ = agent.act(torch.as_tensor(envs.obs, device=device), generator)
        rows = np.flatnonzero(left)
        envs.step(actions[rows].tolist(), rows)
        for i, episode in sorted(envs.finished.items()):
            results.append(episode)
            left[i] -= 1
        if writer and 0 in envs.finished:
            writer.close()
            video = writer = None
    figures = {"eval/episodes": float(episodes)}
    for name in results[0]:
        column = np.array([episode[name] for episode in results])
        name = name.removeprefix("episodic_")
        figures |= {f"eval/{name}_{f}": float(getattr(column, f)()) for f in ("mean", "std", "max")}
    if "eval/flag_mean" in figures:
        figures["eval/flag_rate"] = figures["eval/flag_mean"]
    return figures


def summary(result: dict) -> str:
    """What evaluate has found, in a line."""
    r = {name.removeprefix("eval/"): figure for name, figure in result.items()}
    text = f"{r['episodes']:.0f} episodes, return {r['return_mean']:.1f} +- {r['return_std']:.1f}"
    if "flag_rate" in r:
        text += f", flag {r['flag_rate']:.0%}, x {r['x_pos_mean']:.0f} +- {r['x_pos_std']:.0f}"
    return text


def open_video(path: Path, frame: np.ndarray, fps: float):
    """An mp4 encoder for frames of this size; it takes them one by one, so no frame needs to be kept or copied."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    return FFMPEG_VideoWriter(str(path), frame.shape[1::-1], fps)


def eval_envs(args: Args) -> Envs:
    """The environments of an evaluation; the first one draws if videos are wanted."""
    envs = Envs(args.env, min(args.eval_episodes, 16), args.num_threads, "rgb_array" if args.capture_video else None)
    if args.capture_video:
        try:
            envs.reset(args.seed)
            frame = envs.envs[0].render()
            if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.shape[2:] == (3,)):
                raise TypeError("render() returned no uint8 image of height x width x 3")
        except Exception as error:
            fail(f"--capture-video cannot work: {args.env} cannot draw itself ({error}); leave it out.")
    return envs


def play(agent: Agent, args: Args) -> None:
    """--evaluate: play a checkpoint and say how it did."""
    torch.set_num_threads(1)  # as in Run
    path = Path(args.evaluate)
    video = path.parent / "videos" / f"{path.stem}.mp4" if args.capture_video else None
    result = evaluate(agent, eval_envs(args), args.eval_episodes, args.seed, video)
    print(f"{path}: {summary(result)}" + (f"\nvideo: {video}" if video else ""))


# ------------------------------------------------------------------------------------------------ save, load, log


def save(path: Path, state: dict) -> None:
    """Write to a temporary file, flush, rename: a kill or a full disk at any moment leaves the previous file whole."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:  # torch raises OSError or RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written; is the disk full?") from error
    os.replace(temporary, path)


def load(path: Path) -> dict:
    """Read a checkpoint of this script. weights_only: a file from a stranger cannot run code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        script, _ = state["script"], state["agent"]
    except (FileNotFoundError, NotADirectoryError):
        fail(f"There is no checkpoint {path}; name a run or a file that exists.")
    except Exception as error:
        fail(f"{path} cannot be read as a checkpoint ({type(error).__name__}); try best.pt or checkpoint.pt of a run.")
    if script != SCRIPT:
        fail(f"{path} is a checkpoint of {script}.py; {SCRIPT}.py cannot use it, {script}.py can.")
    return state


def restore(part, state: dict, args: Args) -> None:
    """part.load_state_dict(state), or exit code 2 where its shapes are others than those that were saved."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError):
        which = f"--resume {args.resume}" if args.resume else f"--evaluate {args.evaluate}"
        fail(f"{which} cannot work: --env {args.env} or this script's network is not what it was; start a new run.")


def lock(file) -> bool:
    """Keep other processes from writing to the file until this one ends -> False if one is doing so already."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return True


class Run:
    """What surrounds the training: folder, log, evaluations, checkpoints, and the end, however it comes.

    `parts` (agent, optimiser, ...) are what a resumed run continues with, each saved and loaded by its state_dict.
    `threads` is how many threads torch may use between begin_update and end_update.
    """

    def __init__(self, args: Args, state: dict, device: torch.device, threads: int, **parts):
        self.args, self.device, self.threads, self.parts = args, device, threads, parts
        self.global_step, self.best = state.get("global_step", 0), state.get("best", -math.inf)
        self.updated = state.get("updated", self.global_step)  # when the last update ended
        self.envs = eval_envs(args) if args.capture_video else None  # one that cannot draw shall say so now
        if state:
            for name, part in parts.items():
                restore(part, state[name], args)
            torch.set_rng_state(state["rng"])
            if device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"])
        self.dir = Path(args.run_dir)
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = None
        with contextlib.suppress(OSError):  # no git here
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
        packages = "torch", "gymnasium", "gym-super-mario-bros", "numpy"
        versions = {package: importlib.metadata.version(package) for package in packages}
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"{CORES} x {platform.machine()}"
        self.config = {"script": SCRIPT, **asdict(args), "versions": versions, "device": name, "commit": commit}
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            mode = "ab" if state else "xb"  # a new run never writes into another's, not even one begun just now
            self.file = open(self.dir / "metrics.jsonl", mode, buffering=0)  # one write per line: a kill tears none
        except FileExistsError:
            fail(f"--run-dir {self.dir} is there already; continue it with --resume {self.dir} or name another.")
        except OSError as error:
            fail(f"--run-dir {self.dir} cannot be written to ({error.strerror}); name another folder.")
        if not lock(self.file):
            fail(f"--resume {self.dir} cannot work while that run is still going on; stop it first.")
        whole = min(state.get("metrics_bytes", 0), self.file.tell())
        self.file.seek(self.file.truncate(whole))  # what followed is played again
        name = Path(state.get("args", {}).get("run_dir", "")).name  # a copy is tracked as a run of its own
        self.wandb, self.wandb_id = None, state.get("wandb_id") if name == self.dir.name else None
        if args.track:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity or None, "name": self.dir.name}
            names |= {"dir": str(self.dir), "id": self.wandb_id, "resume": "allow" if state else None}
            if not (os.environ.get("WANDB_MODE") or sys.stdin.isatty() or wandb.login(prompt=False, verify=False)):
                names["mode"] = "offline"  # without a key and a terminal wandb could only ask a question into the void
            try:
                self.wandb, self.tracker = wandb, wandb.init(**names, config=asdict(args))
            except Exception as error:
                self.refuse(f"--track cannot work ({error}); WANDB_MODE=offline would keep the record here.")
            self.tracker.define_metric("*", step_metric="global_step")
        self.began = time.time() - state.get("seconds", 0)
        self.recent, self.shown = deque(state.get("recent", ()), 100), time.time()
        self.sums, self.updates = state.get("sums", {}), state.get("updates", 0)  # of figures, and of how many updates
        look = {"unit": " steps", "smoothing": 0, "dynamic_ncols": True, "disable": None}  # None: where no terminal is
        self.bar = tqdm(total=args.total_timesteps, initial=self.global_step, **look)

    def __enter__(self):
        torch.set_num_threads(1)  # threads of torch beside those that step environments slow both down many times
        self.signal, self.updating = None, False
        self.mark()
        try:
            (self.dir / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
            (self.dir / "error.txt").unlink(missing_ok=True)  # of an earlier try
            self.save("checkpoint.pt", self.parts)
        except OSError as error:
            self.refuse(f"--run-dir {self.dir} cannot hold a run: {error}")
        self.signals = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            self.signals.append(signal.SIGHUP)  # the terminal was closed
        for number in self.signals:
            signal.signal(number, self.interrupt)
        return self

    def refuse(self, sentence: str) -> None:
        """End before anything was done, and leave the folder free for another try."""
        empty = self.file.tell() == 0
        self.file.close()
        if empty:
            os.remove(self.file.name)
        fail(sentence)

    def interrupt(self, number, frame) -> None:
        """Ctrl-C ends the run at once, but an update first becomes whole; a second Ctrl-C changes nothing."""
        first, self.signal = self.signal is None, number
        if first and not self.updating:
            raise KeyboardInterrupt
        if first:
            with contextlib.suppress(OSError):  # a reader, as in `| tee log`, went with the same Ctrl-C
                os.write(1, b"\nThe run stops when this update is whole.\n")  # print could be in the middle of a line

    def mark(self) -> None:
        """Remember where a resumed run begins again: here, with these weights. What is played after it is lost."""
        rng, cuda_rng = torch.get_rng_state(), torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        self.marked = {"global_step": self.global_step, "updated": self.updated, "rng": rng, "cuda_rng": cuda_rng}
        self.marked |= {"metrics_bytes": self.file.tell(), "seconds": time.time() - self.began}
        self.marked |= {"recent": list(self.recent), "sums": dict(self.sums), "updates": self.updates}

    def save(self, name: str, parts: dict) -> None:
        state = {"script": SCRIPT, "args": asdict(self.args) | {"resume": ""}, "best": self.best}
        state["wandb_id"] = self.tracker.id if self.wandb else self.wandb_id
        parts = {name: part.state_dict() for name, part in parts.items()}
        save(self.dir / name, {**state, **parts, **self.marked})

    def write(self, figures: dict, video: Path | None = None) -> None:
        figures = {"global_step": self.global_step, "time": round(time.time() - self.began, 3), **figures}
        line, end = json.dumps(figures).encode() + b"\n", self.file.tell()
        if self.file.write(line) < len(line):  # a full disk takes a part of it
            self.file.truncate(end)
            raise OSError(f"{self.file.name} cannot be written; is the disk full?")
        if self.wandb:
            for kind in ("", "-dream") if video else ():
                if (path := video.with_stem(video.stem + kind)).exists():
                    figures[f"videos/eval{kind}"] = self.wandb.Video(str(path))
            self.tracker.log(figures)

    def step(self, steps: int, finished: dict) -> None:
        """Count agent steps, log the episodes that ended with them."""
        self.global_step += steps
        for _, episode in sorted(finished.items()):
            self.recent.append(episode)
            self.write({f"charts/{name}": figure for name, figure in episode.items()})
        if time.time() - self.shown > (5 if self.bar.disable else 0.2):
            self.show()

    def show(self) -> None:
        """Progress: a bar on a terminal, a line every 5 seconds elsewhere."""
        self.shown, text = time.time(), "no episode has ended yet"
        if self.recent:
            mean = {name: np.mean([episode[name] for episode in self.recent]) for name in self.recent[0]}
            text = f"return {mean['episodic_return']:.1f}"
            text += f", flag {mean['flag']:.0%}, x {mean['x_pos']:.0f}" if "flag" in mean else ""
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(self.global_step - self.bar.n)
        if self.bar.disable:
            print(f"{self.global_step:,} of {self.bar.total:,} steps, {self.sps:,.0f} steps/s, {text}", flush=True)

    @property
    def sps(self) -> float:
        """Agent steps per second of running, updates and evaluations included."""
        return self.global_step / max(time.time() - self.began, 1e-9)  # the clock may not have ticked yet

    def begin_update(self) -> None:
        """From here to the end of the update a signal waits, and all cores may compute."""
        self.updating = True
        torch.set_num_threads(self.threads)

    def end_update(self, figures: dict) -> None:
        """Log the figures of the update, evaluate and save, each when it is due."""
        torch.set_num_threads(1)
        figures = {name: float(figure) for name, figure in figures.items()}
        if not all(map(math.isfinite, figures.values())):
            raise FloatingPointError("a loss or a gradient is no longer finite; try a smaller --learning-rate")
        self.sums = {name: self.sums.get(name, 0) + figure for name, figure in figures.items()}
        self.updates += 1
        logging, evaluating, saving = (
            self.global_step >= self.args.last_step or (every > 0 and self.global_step // every > self.updated // every)
            for every in (self.args.log_every, self.args.eval_every, self.args.save_every)
        )
        before, self.updated = self.updated, self.global_step
        if logging:
            means = {name: total / self.updates for name, total in self.sums.items()}
            self.write(means | {"charts/SPS": self.sps})
            self.sums, self.updates = {}, 0
        self.mark()
        if evaluating:
            self.marked["updated"] = before  # if it is cut off, a resumed run makes up for it
        self.updating = False
        if self.signal:
            raise KeyboardInterrupt
        if evaluating:
            video = self.dir / "videos" / f"{self.global_step}.mp4" if self.args.capture_video else None
            self.envs = self.envs or eval_envs(self.args)
            self.bar.set_postfix_str(f"evaluating, {self.args.eval_episodes} episodes")  # it can take a while
            result = evaluate(self.parts["agent"], self.envs, self.args.eval_episodes, self.args.seed, video)
            self.write(result, video)
            self.bar.write(f"evaluation at step {self.global_step:,}: {summary(result)}")
            self.mark()
            if result["eval/return_mean"] >= self.best:
                self.save("best.pt", {"agent": self.parts["agent"]})  # to play, not to go on from
                self.best = result["eval/return_mean"]
        if saving or evaluating:
            self.save("checkpoint.pt", self.parts)

    def __exit__(self, kind, error, trace) -> None:
        for number in self.signals:
            signal.signal(number, signal.SIG_IGN)  # nothing shall cut off the saving
        ending, code = "finished", 0
        if kind is KeyboardInterrupt:
            ending, code = "stopped", 128 + (self.signal or signal.SIGINT)
        elif error:
            ending, code = f"failed ({error})", 1
        try:
            if code and not self.updating:  # in the middle of an update the last checkpoint is the good one
                self.save("checkpoint.pt", self.parts)
        except OSError as full:
            ending, code, error = f"failed ({full})", 1, full
        if code == 1:
            with contextlib.suppress(OSError):  # no room for it either
                (self.dir / "error.txt").write_text("".join(traceback.format_exception(error)))
        self.bar.update(self.global_step - self.bar.n)
        self.bar.close()
        self.file.close()
        quote = subprocess.list2cmdline if os.name == "nt" else shlex.join
        script, folder = quote([sys.argv[0]]), quote([str(self.dir)])
        command = f"{'uv run' if 'UV' in os.environ else 'python'} {script}"
        kept = load(self.dir / "checkpoint.pt")["global_step"]
        lines = [f"The run {ending}; all is kept in {self.dir} as of step {kept:,}."]
        if code == 1:
            lines.append(f"What failed, in full: {self.dir / 'error.txt'}")
        if code and kept < self.args.last_step:  # else only the last evaluation was cut off
            lines.append(f"Continue it: {command} --resume {folder}")
        lines.append(f"Watch it: {command} --evaluate {folder} --capture-video")
        try:
            print(*lines, sep="\n", flush=True)
        except OSError:  # who read along is gone; what Python still holds for it goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            with contextlib.suppress(OSError):  # a closed terminal takes both along
                print(*lines, sep="\n", file=sys.stderr)
        for number in self.signals:
            signal.signal(number, signal.SIG_DFL)  # all is saved: who does not want to wait for an upload need not
        if self.wandb:
            self.tracker.finish(exit_code=code)
        sys.exit(code)


# ------------------------------------------------------------------------------------------------ main


def set_up(args: Args) -> tuple[torch.device, Envs, Agent]:
    """The device, the environments to train on and a new agent for them."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.cuda and device.type == "cpu":
        print("--cuda: no CUDA device was found; going on with the CPU.")
    elif not args.cuda and torch.cuda.is_available():
        print("A CUDA device was found; --cuda would use it.")
    torch.manual_seed(args.seed)
    envs = Envs(args.env, 1 if args.evaluate else args.num_envs, args.num_threads)
    if len(envs.obs.shape) > 2 and not envs.image:
        print(f"--env {args.env}: a CNN sees only uint8 images of height x width x 1 or 3; these go to an MLP.")
    if args.capture_video and "rgb_array" not in envs.envs[0].metadata.get("render_modes", []):
        print(f"--capture-video: {args.env} cannot draw itself; going on without videos.")
        args.capture_video = False
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    dtype = torch.bfloat16 if envs.image and fast else torch.float32
    agent = Agent(envs.obs.shape[1:], envs.num_actions, envs.image, dtype)
    agent.to(device, memory_format=torch.channels_last if envs.image else torch.preserve_format)
    if args.compile:
        for name in ("torch._inductor", "torch.utils.cpp_extension"):
            logging.getLogger(name).setLevel(logging.ERROR)  # what the compiler says is to its developers
        warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo)")
        agent.compile(mode="reduce-overhead" if device.type == "cuda" else "default", dynamic=False)
    return device, envs, agent


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while there is nothing to save, Ctrl-C simply ends the script
    args, state = parse()
    device, envs, agent = set_up(args)
    if args.evaluate:
        restore(agent, state["agent"], args)
        return play(agent, args)
    # OpenAI's epsilon, 1e-5, stands under the root; outside it, where PyTorch adds it, that is its root
    optimizer = torch.optim.RMSprop(agent.parameters(), args.learning_rate, alpha=0.99, eps=math.sqrt(1e-5))
    scaler = RewardScaler(args.num_envs, args.gamma)
    learn_threads = torch.get_num_threads() if envs.image and device.type == "cpu" else 1
    to_device = functools.partial(torch.as_tensor, device=device)
    shape = args.num_steps, args.num_envs
    obs = torch.zeros((*shape, *envs.obs.shape[1:]), dtype=torch.as_tensor(envs.obs).dtype, device=device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    values, final_values = torch.zeros((2, *shape), device=device)
    rewards = np.zeros(shape, np.float32)
    terminated, truncated = np.zeros((2, *shape), bool)

    with Run(args, state, device, learn_threads, agent=agent, optimizer=optimizer, scaler=scaler) as run:
        envs.reset([args.seed, 0, run.global_step])  # a resumed run meets new episodes
        while run.global_step < args.last_step:
            remaining = 1 - run.global_step / args.total_timesteps  # the share of the training that lies ahead
            lr = args.learning_rate * (remaining if args.anneal_lr else 1)
            ent_coef = args.ent_coef * (remaining if args.anneal_ent else 1)
            optimizer.param_groups[0]["lr"] = lr

            # act: every environment takes num_steps steps
            for t in range(args.num_steps):
                obs[t] = to_device(envs.obs)
                actions[t], _, values[t] = agent.act(obs[t])
                envs.step(actions[t].tolist())
                rewards[t], terminated[t], truncated[t] = envs.rewards, envs.terminated, envs.truncated
                if truncated[t].any():  # a time limit is no end: V of the state in which it struck stands for the rest
                    with torch.no_grad():
                        final_values[t] = agent(to_device(envs.final_obs))[1]
                run.step(args.num_envs, envs.finished)

            # learn
            run.begin_update()
            dones = terminated | truncated
            scaled = scaler(rewards, dones) if args.norm_reward else rewards
            with torch.no_grad():
                next_values = torch.cat([values[1:], agent(to_device(envs.obs))[1][None]])
            next_values = torch.where(to_device(truncated), final_values, next_values)
            next_values = next_values.masked_fill(to_device(terminated), 0)
            scaled = to_device(scaled, dtype=torch.float32)
            advantages, returns = gae(scaled, values, next_values, to_device(dones), args.gamma, args.gae_lambda)
            batch = {"obs": obs, "actions": actions, "advantages": advantages, "returns": returns}
            batch = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
            figures = update(agent, optimizer, args, batch, ent_coef)
            explained_variance = 1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)
            figures |= {"losses/explained_variance": explained_variance}
            run.end_update(figures | {"charts/learning_rate": lr, "charts/ent_coef": ent_coef})


if __name__ == "__main__":
    main()
