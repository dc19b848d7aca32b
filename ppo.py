# /// script
# requires-python = ">=3.13"
# dependencies = [
#     "torch>=2.8,<3",
#     "gymnasium[box2d,classic-control]>=1.2.3,<2",
#     "gym-super-mario-bros>=9,<10",
#     "numpy>=2.1,<3",
#     "opencv-python-headless>=4.11,<6",
#     "moviepy>=2.1,<3",
#     "tqdm>=4.66,<5",
#     "tyro>=0.9,<2",
#     "wandb>=0.31,<1",
# ]
# ///
r"""Proximal policy optimisation: can the safe step be simple?

TRPO keeps a new policy close to the one that played by solving a constrained problem at every update, with second
derivatives, conjugate gradients and a line search. PPO asks what all this is for, an update that does not run away
from its data, and gets it from the loss itself, with plain gradient steps.

Data. N Marios play T steps each with the policy pi_old. The critic V(s) judges every step by its TD error

    (3)  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)        V(s_{t+1}) = 0 where the episode terminated,
                                                          V(last observation) where a time limit cut it

and generalised advantage estimation (Schulman et al. 2016, equation 16) sums these up, until the episode's end:

    A_t = delta_t + gamma lambda A_{t+1}

lambda = 0 trusts the critic (one-step actor-critic), lambda = 1 trusts only what was paid (Monte Carlo minus baseline).

Loss. The policy moves while it learns from that data, so each sample is weighted by the importance ratio

    (6)  r_t = pi_theta(a_t|s_t) / pi_old(a_t|s_t)
    (5)  L_clip = E[ min( r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t ) ]

At first r_t = 1 and the gradient of (5) is the policy gradient. Say the jump over the first goomba went better than
usual, A_t > 0: the gradient makes it likelier, until at r_t = 1 + eps the clipped term is the smaller one and the
gradient stops. A bad step is made less likely until r_t = 1 - eps, no further. A move the wrong way (better than usual
but r_t < 1) is never clipped: it can always be undone. The minimum makes (5) a lower bound of the unclipped objective,
so one batch can serve for several epochs of minibatches without the policy leaving the region that the data describes.
With one epoch, one minibatch and lambda = 1 the update is A2C's, to the digit (tests/test_ppo.py).

Around it: advantages are standardised per minibatch; an entropy bonus, falling to 0, keeps Mario trying other moves
while he stands before a pipe; rewards are divided by the running deviation of the discounted return; the step size
falls to 0. gamma = 0.9 on Mario: 10 decisions of 4 frames, 0.7 s, are about a jump.

What is still wrong: everything is learnt from real play, a step at a time, then thrown away.

    uv run ppo.py --cuda                                                      # Super Mario Bros 1-1
    uv run ppo.py --env CartPole-v1 --total-timesteps 150000 --num-envs 8 --gamma 0.98 --learning-rate 1e-3 \
        --eval-episodes 100
    uv run ppo.py --env LunarLander-v3 --total-timesteps 1000000 --num-steps 512 --num-minibatches 64 --gamma 0.999 \
        --gae-lambda 0.98 --learning-rate 5e-4 --eval-every 250000 --eval-episodes 100
    uv run ppo.py --evaluate runs/<run>/best.pt --eval-episodes 100 --capture-video

Measured on 2 x86-64 cores without a GPU (curves, flags and commits in benchmark/results): CartPole-v1 returns 500 over
100 episodes for seeds 1 to 5, after 11 s of running. LunarLander-v3 returns 275, 275 and 270 over 100 episodes for
seeds 1 to 3. Super Mario Bros 1-1, seed 1: 99 of the last 100 training episodes reached the flag, at 2 million steps;
the best checkpoint reached it in 100 of 100.

Schulman, Wolski, Dhariwal, Radford, Klimov 2017, arXiv 1707.06347 (PPO); Schulman et al. 2016, arXiv 1506.02438 (GAE);
Huang et al. 2022, "The 37 implementation details of PPO"; Mnih et al. 2015, doi 10.1038/nature14236 (the images).
"""

import contextlib
import copy
import difflib
import functools
import importlib
import importlib.metadata
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
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

SCRIPT = "ppo"


@dataclass
class Args:
    env: str = "SuperMarioBros-1-1-v0"  # Gymnasium id; package.module:Id-v0 imports the module first
    seed: int = 1  # seed of everything random in the run
    cuda: bool = False  # compute on the GPU, if there is one
    total_timesteps: int = 2_000_000  # agent steps to train for, all environments together
    num_envs: int = 16  # environments played in parallel
    num_threads: int = 0  # threads that step them; 0: one more than cores for images, one for vectors
    learning_rate: float = 2.5e-4  # step size of the optimiser
    gamma: float = 0.9  # discount factor
    eval_episodes: int = 20  # episodes per evaluation
    eval_every: int = 100_000  # agent steps between evaluations; 0: only at the end
    save_every: int = 20_000  # agent steps between checkpoints; 0: only at the end
    run_dir: str = ""  # folder of the run; empty: runs/<env>__<script>__<seed>__<time>
    resume: str = ""  # folder of a run to continue
    evaluate: str = ""  # checkpoint to play, without training
    capture_video: bool = False  # record the first episode of each evaluation
    track: bool = False  # send metrics and videos to Weights & Biases
    wandb_project_name: str = "rl-ladder"  # project to track the run in
    wandb_entity: str = ""  # team to track it under; empty: your own
    compile: bool = False  # compile the network (CUDA graphs on a GPU): slower start, faster updates
    # PPO
    num_steps: int = 128  # steps of each environment per rollout
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 4  # passes over each rollout
    clip_coef: float = 0.2  # epsilon of the clipped surrogate, equation (5)
    clip_vloss: bool = False  # clip the value loss likewise
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # longer gradients are scaled down to this norm
    target_kl: float = 0.0  # end an update's epochs beyond this approximate KL; 0: never
    norm_adv: bool = True  # standardise the advantages of each minibatch
    norm_reward: bool = True  # divide rewards by the running deviation of the discounted return
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    anneal_ent: bool = True  # let the entropy bonus fall linearly to 0

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches


def fail(sentence: str):
    """End at a user's mistake: one sentence, exit code 2."""
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def check(args: Args) -> None:
    """End with exit code 2 at the first flag whose value cannot work."""
    rules = {
        "at least 1": (1, math.inf, "num_envs num_steps num_minibatches update_epochs eval_episodes"),
        "from 0 to 2147483647": (0, 2**31 - 1, "seed num_threads eval_every save_every ent_coef vf_coef target_kl"),
        "from 0 to 1": (0, 1, "gamma gae_lambda"),
        "a positive number": (5e-324, 1e300, "learning_rate clip_coef max_grad_norm"),
    }
    for remedy, (low, high, names) in rules.items():
        for name in names.split():
            if not low <= getattr(args, name) <= high:
                fail(f"--{name.replace('_', '-')} {getattr(args, name)} cannot work; it must be {remedy}.")
    batch = f"the batch of --num-envs x --num-steps = {args.batch_size} steps"
    if args.batch_size % args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches} cannot work; it must divide {batch}.")
    if args.total_timesteps < args.batch_size:
        fail(f"--total-timesteps {args.total_timesteps} cannot work; it must be at least {batch}.")


def parse() -> tuple[Args, dict]:
    """Command line -> flags, and the checkpoint to resume or evaluate ({} for a new run)."""
    description = (__doc__ or "").partition("\n\n")[0]
    args, state = tyro.cli(Args, description=description), {}
    if args.resume and args.evaluate:
        fail(f"--resume {args.resume} and --evaluate {args.evaluate} cannot work together; leave one out.")
    if args.resume or args.evaluate:
        state = load(Path(args.evaluate or f"{args.resume}/checkpoint.pt"))
        args = tyro.cli(Args, description=description, default=Args(**state["args"]))  # given flags win over saved ones
        for name in ["env"] if args.evaluate else ["env", "num_envs", "num_steps"]:
            flag, value, saved = f"--{name.replace('_', '-')}", getattr(args, name), state["args"][name]
            if value != saved:
                fail(f"{flag} {value} does not fit the checkpoint, which is of {flag} {saved}; leave it out.")
    check(args)
    return args, state


# ------------------------------------------------------------------------------------------------ environments


class Frames(gym.Wrapper):
    """Images as Mnih et al. (2015) feed them: one action lasts 4 frames, every 4th frame is shrunk to 84 x 84 grey
    pixels, the latest 4 of those are the observation. It is overwritten by the next step: copy what you keep."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.metadata = env.metadata | {"render_fps": env.metadata.get("render_fps", 60) / 4}
        self.frames = np.zeros((4, 84, 84), np.uint8)

    def shrink(self, image: np.ndarray) -> np.ndarray:
        if isinstance(self.unwrapped, NESEnv):  # the emulator's own grey screen: 8 times faster than OpenCV's
            image = self.unwrapped.observation("grayscale")
        elif image.shape[-1] == 3:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return cv2.resize(image, (84, 84), interpolation=cv2.INTER_AREA)

    def reset(self, **kwargs):
        image, info = self.env.reset(**kwargs)
        self.frames[:] = self.shrink(image)
        return self.frames, info

    def step(self, action):
        total = 0.0
        for _ in range(4):
            image, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
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
            fail(f"--env {env_id} is unknown; the nearest ids are: {', '.join(near) or 'none'}.")
        render = {"render_mode": render_mode} if render_mode else {}  # an environment need not know the word
        env = gym.make(name, disable_env_checker=True, **render)
    except Exception as error:
        fail(f"--env {env_id} cannot be made; {type(error).__name__} says: {error}")
    if isinstance(env.unwrapped, NESEnv):
        env = JoypadSpace(env, SIMPLE_MOVEMENT)
    for space, kind in ((env.action_space, gym.spaces.Discrete), (env.observation_space, gym.spaces.Box)):
        if not isinstance(space, kind):
            fail(f"--env {env_id} cannot work; {SCRIPT}.py needs a {kind.__name__} space where it has {space}.")
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
        self.obs = np.zeros((num_envs, *space.shape), np.uint8 if self.image else np.float32)
        self.final_obs, self.finished = self.obs.copy(), {}
        self.rewards, self.returns, self.lengths = np.zeros((3, num_envs))
        self.terminated, self.truncated = np.zeros((2, num_envs), bool)
        num_threads = min(num_envs, num_threads or (os.cpu_count() + 1 if self.image else 1))
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

    def step_one(self, i: int, action: int) -> None:
        try:
            obs, reward, terminated, truncated, info = self.envs[i].step(action + self.first_action)
            self.obs[i], self.rewards[i] = obs, reward
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
    whose rewards are a hundred times apart. No mean is subtracted: a reward keeps its sign."""

    def __init__(self, num_envs: int, gamma: float):
        self.gamma, self.returns, self.stats = gamma, np.zeros(num_envs), RunningMeanStd()

    def __call__(self, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
        self.returns = self.gamma * self.returns + rewards
        self.stats.update(self.returns)
        self.returns[dones] = 0
        return np.clip(rewards / np.sqrt(self.stats.var + 1e-8), -10, 10)


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


def sample(logits: torch.Tensor, generator=None) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, num_actions) -> actions (B,) drawn from the policy, and their log pi(a|s) (B,)."""
    log_probs = F.log_softmax(logits, -1)
    actions = torch.multinomial(log_probs.exp(), 1, generator=generator)
    return actions.squeeze(-1), log_probs.gather(-1, actions).squeeze(-1)


# ------------------------------------------------------------------------------------------------ algorithm


def gae(rewards, values, next_values, dones, gamma: float, gae_lambda: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16) -> advantages, returns; all (T, N).

    next_values[t] is V of the state to which step t really led: 0 if the episode terminated there, V(last observation)
    if a time limit cut it. dones[t] is 1 in both cases, as no advantage flows back from one episode into another.
    """
    deltas = rewards + gamma * next_values - values  # the TD errors, equation (3)
    advantages, advantage = torch.zeros_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantage = deltas[t] + gamma * gae_lambda * (1 - dones[t]) * advantage
        advantages[t] = advantage
    return advantages, advantages + values


def policy_loss(log_ratio: torch.Tensor, advantages: torch.Tensor, clip_coef: float) -> torch.Tensor:
    """-L_clip, equation (5), from the logarithm of the ratio, equation (6); (B,), (B,) -> scalar."""
    ratio = log_ratio.exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def value_loss(values, returns, old_values, clip_coef: float = math.inf) -> torch.Tensor:
    """Half the mean squared error of V, or of V held within clip_coef of its old value where that is worse; (B,)."""
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).mean()


def update(agent: Agent, optimizer, args: Args, batch: dict, ent_coef: float) -> dict:
    """Epochs of minibatch steps on one rollout -> its losses, each a mean over all minibatches.

    batch holds obs, actions, log_probs, values, advantages and returns, with batch_size rows each.
    """
    steps = []
    for _ in range(args.update_epochs):
        for rows in torch.randperm(args.batch_size, device=batch["obs"].device).split(args.minibatch_size):
            b = {name: tensor[rows] for name, tensor in batch.items()}
            logits, values = agent(b["obs"])
            log_probs = F.log_softmax(logits, -1)
            log_ratio = log_probs.gather(-1, b["actions"][:, None]).squeeze(-1) - b["log_probs"]
            advantages = b["advantages"]
            if args.norm_adv and len(rows) > 1:
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            pg_loss = policy_loss(log_ratio, advantages, args.clip_coef)
            v_loss = value_loss(values, b["returns"], b["values"], args.clip_coef if args.clip_vloss else math.inf)
            entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
            loss = pg_loss - ent_coef * entropy + args.vf_coef * v_loss
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            ratio = log_ratio.detach().exp()
            approx_kl = (ratio - 1 - log_ratio.detach()).mean()  # estimates KL(old || new), never negative
            clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
            steps.append(torch.stack([loss, pg_loss, v_loss, entropy, grad_norm, approx_kl, clipfrac]).detach())
        if args.target_kl and torch.stack(steps[-args.num_minibatches :]).mean(0)[5] > args.target_kl:
            break
    names = "loss", "policy_loss", "value_loss", "entropy", "grad_norm", "approx_kl", "clipfrac"
    return {f"losses/{name}": mean for name, mean in zip(names, torch.stack(steps).mean(0).tolist(), strict=True)}


# ------------------------------------------------------------------------------------------------ evaluate


@torch.no_grad()
def evaluate(agent: Agent, envs: Envs, episodes: int, seed: int, video: Path | None = None) -> dict:
    """Play whole episodes, actions drawn from the policy -> eval/... figures.

    Each environment plays a number of episodes fixed beforehand, so that short ones do not crowd out long ones, and
    the random numbers come from a generator of their own, so that evaluating leaves training as it was.
    """
    device = agent.actor.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    left = np.array([len(range(i, episodes, len(envs.envs))) for i in range(len(envs.envs))])
    results, writer = [], None
    envs.reset([seed, 1])
    while left.any():
        if video:
            frame = envs.envs[0].render()
            writer = writer or open_video(video, frame, envs.envs[0].metadata.get("render_fps", 30))
            writer.write_frame(frame)
        actions, _ = sample(agent(torch.as_tensor(envs.obs, device=device))[0], generator)
        rows = np.flatnonzero(left)
        envs.step(actions[rows].tolist(), rows)
        for i, episode in sorted(envs.finished.items()):
            results.append(episode)
            left[i] -= 1
        if writer and 0 in envs.finished:
            writer.close()
            video = writer = None
    returns, lengths = (np.array([r[name] for r in results]) for name in ("episodic_return", "episodic_length"))
    figures = {"eval/episodes": episodes, "eval/return_mean": returns.mean(), "eval/return_std": returns.std()}
    figures["eval/length_mean"] = lengths.mean()
    if "flag" in results[0]:
        flags, x = (np.array([r[name] for r in results]) for name in ("flag", "x_pos"))
        figures |= {"eval/flag_rate": flags.mean(), "eval/x_pos_mean": x.mean(), "eval/x_pos_std": x.std()}
        figures["eval/x_pos_max"] = x.max()
    return {name: float(figure) for name, figure in figures.items()}


def describe(r: dict) -> str:
    """eval/... figures in one sentence."""
    text = f"{r['eval/episodes']:.0f} episodes: return {r['eval/return_mean']:.1f} +- {r['eval/return_std']:.1f}"
    if "eval/flag_rate" in r:
        text += f", flag {r['eval/flag_rate']:.0%}, x {r['eval/x_pos_mean']:.0f} +- {r['eval/x_pos_std']:.0f}"
    return text


def open_video(path: Path, frame: np.ndarray, fps: float):
    """An mp4 encoder for frames of this size; it takes them one by one, so no frame needs to be kept or copied."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    return FFMPEG_VideoWriter(str(path), frame.shape[1::-1], fps)


# ------------------------------------------------------------------------------------------------ save, load, log


def save(path: Path, state: dict) -> None:
    """Write to a temporary file, flush, rename: a kill at any moment leaves the previous checkpoint whole."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def load(path: Path) -> dict:
    """Read a checkpoint of this script. weights_only: a file from a stranger cannot run code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        script, _ = state["script"], state["agent"]
    except FileNotFoundError:
        fail(f"There is no checkpoint {path}; name a run or a file that exists.")
    except Exception as error:
        fail(f"{path} cannot be read as a checkpoint ({type(error).__name__}); try best.pt or checkpoint.pt of a run.")
    if script != SCRIPT:
        fail(f"{path} is a checkpoint of {script}.py; {SCRIPT}.py cannot use it, {script}.py can.")
    return state


def make_run_dir(args: Args, device: torch.device) -> Path:
    """Create the folder of the run, never over another run, and write config.json into it."""
    name = f"{args.env}__{SCRIPT}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
    run_dir = Path(args.resume or args.run_dir or f"runs/{name}")
    if (run_dir / "checkpoint.pt").exists() and not args.resume:
        fail(f"--run-dir {run_dir} holds a run already; continue it with --resume {run_dir} or name another folder.")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--run-dir {run_dir} cannot be made ({error.strerror}); name another folder.")
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    packages = "torch", "gymnasium", "gym-super-mario-bros", "numpy"
    versions = {package: importlib.metadata.version(package) for package in packages}
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} x {platform.machine()}"
    config = {"script": SCRIPT, **asdict(args), "versions": versions, "device": name, "commit": commit or None}
    (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return run_dir


def crossed(step: int, done: int, every: int) -> bool:
    """Whether the last `done` steps up to `step` passed a multiple of `every`; 0 is never."""
    return every > 0 and step // every > (step - done) // every


class Log:
    """One JSON object per line in metrics.jsonl, the same figures to the tracker, progress to the terminal."""

    def __init__(self, args: Args, run_dir: Path, state: dict):
        self.file = open(run_dir / "metrics.jsonl", "ab", buffering=0)  # one write per line: a kill tears none
        kept = min(state.get("metrics_bytes", 0), self.file.tell())
        self.file.truncate(kept)  # what followed the checkpoint is played again
        self.began = time.time() - state.get("seconds", 0)
        self.shown, self.sps, self.recent, self.wandb = time.time(), 0.0, deque(maxlen=100), None
        total, self.step, hidden = args.total_timesteps, state.get("global_step", 0), not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=self.step, unit=" steps", disable=hidden, dynamic_ncols=True)
        if args.track:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity or None, "name": run_dir.name}
            names |= {"dir": str(run_dir), "id": state.get("wandb_id"), "resume": "allow" if state else None}
            if not (os.environ.get("WANDB_MODE") or sys.stdin.isatty() or wandb.login(prompt=False, verify=False)):
                names["mode"] = "offline"  # without a key and a terminal wandb could only ask a question into the void
            self.wandb, self.run = wandb, wandb.init(**names, config=asdict(args))
            self.run.define_metric("*", step_metric="global_step")

    def write(self, global_step: int, figures: dict, video: Path | None = None) -> None:
        figures = {"global_step": global_step, "time": round(time.time() - self.began, 3), **figures}
        self.file.write(json.dumps(figures).encode() + b"\n")
        if self.wandb:
            self.run.log(figures | ({"videos/eval": self.wandb.Video(str(video))} if video else {}))

    def episodes(self, global_step: int, finished: dict) -> None:
        self.step = global_step
        for _, episode in sorted(finished.items()):
            self.recent.append(episode)
            self.write(global_step, {f"charts/{name}": figure for name, figure in episode.items()})
        if time.time() - self.shown < (5 if self.bar.disable else 0.2):
            return
        self.shown, text = time.time(), ""
        if self.recent:
            mean = {name: np.mean([episode[name] for episode in self.recent]) for name in self.recent[0]}
            text = f"return {mean['episodic_return']:.1f}"
            text += f", flag {mean['flag']:.0%}, x {mean['x_pos']:.0f}" if "flag" in mean else ""
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(global_step - self.bar.n)
        if self.bar.disable:
            print(f"{global_step:,} of {self.bar.total:,} steps, {self.sps:,.0f} steps/s, {text}", flush=True)

    def state(self) -> dict:
        """What a resumed run needs to go on writing where the checkpoint was made."""
        seconds = time.time() - self.began
        return {"seconds": seconds, "metrics_bytes": self.file.tell(), "wandb_id": self.wandb and self.run.id}

    def close(self) -> None:
        self.bar.update(self.step - self.bar.n)
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.run.finish()


# ------------------------------------------------------------------------------------------------ main


def interrupt(number, frame):
    raise KeyboardInterrupt(number)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while there is nothing to save, Ctrl-C simply ends the script
    args, state = parse()
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.cuda and device.type == "cpu":
        print("--cuda: no CUDA device was found; going on with the CPU.")
    elif not args.cuda and torch.cuda.is_available():
        print("A CUDA device was found; --cuda would use it.")
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # threads of torch beside those that step environments slow both down many times
    envs = Envs(args.env, 1 if args.evaluate else args.num_envs, args.num_threads)
    learn_threads = os.cpu_count() if envs.image and device.type == "cpu" else 1
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    dtype = torch.bfloat16 if envs.image and fast else torch.float32
    agent = Agent(envs.obs.shape[1:], envs.num_actions, envs.image, dtype)
    agent.to(device, memory_format=torch.channels_last if envs.image else torch.preserve_format)
    if state:
        agent.load_state_dict(state["agent"])
    if args.compile:
        agent.compile(mode="reduce-overhead" if device.type == "cuda" else "default", dynamic=False)

    @functools.cache
    def eval_envs() -> Envs:
        render_mode = "rgb_array" if args.capture_video else None
        return Envs(args.env, min(args.num_envs, args.eval_episodes), args.num_threads, render_mode)

    if args.evaluate:
        path = Path(args.evaluate)
        video = path.parent / "videos" / f"{path.stem}.mp4" if args.capture_video else None
        print(describe(evaluate(agent, eval_envs(), args.eval_episodes, args.seed, video)))
        return print(f"video: {video}") if video else None

    if args.capture_video:
        eval_envs()  # one that cannot draw shall say so now
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    scaler = RewardScaler(args.num_envs, args.gamma)
    global_step, best = 0, -math.inf
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.stats.mean, scaler.stats.var, scaler.stats.count = state["reward_stats"]
        global_step, best = state["global_step"], state["best"]
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
        if global_step + args.batch_size > args.total_timesteps:
            fail(f"--resume {args.resume} is complete; --total-timesteps beyond {global_step} would continue it.")
    run_dir = make_run_dir(args, device)
    log = Log(args, run_dir, state)

    def snapshot() -> dict:
        """All that a resumed run needs, copied, so that it stays whole while training goes on."""
        return {
            "script": SCRIPT,
            "args": asdict(replace(args, resume="", run_dir=str(run_dir))),
            "agent": copy.deepcopy(agent.state_dict()),
            "optimizer": copy.deepcopy(optimizer.state_dict()),
            "reward_stats": [float(x) for x in (scaler.stats.mean, scaler.stats.var, scaler.stats.count)],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
            "global_step": global_step,
            "best": best,
            **log.state(),
        }

    shape = args.num_steps, args.num_envs
    obs = torch.zeros((*shape, *envs.obs.shape[1:]), dtype=torch.as_tensor(envs.obs).dtype, device=device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    log_probs, values, final_values = torch.zeros((3, *shape), device=device)
    rewards, (terminated, truncated) = np.zeros(shape, np.float32), np.zeros((2, *shape), bool)
    to_device = functools.partial(torch.as_tensor, device=device)
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    good, ending, code = snapshot(), "finished", 0
    save(run_dir / "checkpoint.pt", good)
    try:
        envs.reset([args.seed, 0, global_step])  # a resumed run meets new episodes
        while global_step + args.batch_size <= args.total_timesteps:
            began, remaining = time.time(), 1 - global_step / args.total_timesteps
            lr = args.learning_rate * (remaining if args.anneal_lr else 1)
            ent_coef = args.ent_coef * (remaining if args.anneal_ent else 1)
            optimizer.param_groups[0]["lr"] = lr

            # act
            for t in range(args.num_steps):
                obs[t] = to_device(envs.obs)
                with torch.no_grad():
                    logits, values[t] = agent(obs[t])
                    actions[t], log_probs[t] = sample(logits)
                envs.step(actions[t].tolist())
                terminated[t], truncated[t] = envs.terminated, envs.truncated
                rewards[t] = scaler(envs.rewards, terminated[t] | truncated[t]) if args.norm_reward else envs.rewards
                if truncated[t].any():  # a time limit is no end: V of the state in which it struck stands for the rest
                    with torch.no_grad():
                        final_values[t] = agent(to_device(envs.final_obs))[1]
                global_step += args.num_envs
                log.episodes(global_step, envs.finished)

            # learn
            torch.set_num_threads(learn_threads)
            with torch.no_grad():
                next_values = torch.cat([values[1:], agent(to_device(envs.obs))[1][None]])
            next_values = torch.where(to_device(truncated), final_values, next_values)
            next_values = next_values.masked_fill(to_device(terminated), 0)
            dones = to_device(terminated | truncated).float()
            advantages, returns = gae(to_device(rewards), values, next_values, dones, args.gamma, args.gae_lambda)
            batch = {"obs": obs, "actions": actions, "log_probs": log_probs, "values": values}
            batch |= {"advantages": advantages, "returns": returns}
            batch = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
            if envs.image:  # convolutions are faster on it; converted once, not in every minibatch
                batch["obs"] = batch["obs"].contiguous(memory_format=torch.channels_last)
            figures = update(agent, optimizer, args, batch, ent_coef)
            torch.set_num_threads(1)
            if not all(math.isfinite(figure) for figure in figures.values()):
                raise FloatingPointError("the loss or its gradient is no longer finite; try a smaller --learning-rate")
            figures["losses/explained_variance"] = 1 - float((returns - values).var() / (returns.var() + 1e-8))
            log.sps = args.batch_size / (time.time() - began)
            figures |= {"charts/SPS": log.sps, "charts/learning_rate": lr, "charts/ent_coef": ent_coef}
            log.write(global_step, figures)

            # evaluate, save
            last = global_step + args.batch_size > args.total_timesteps
            if last or crossed(global_step, args.batch_size, args.eval_every):
                video = run_dir / "videos" / f"{global_step}.mp4" if args.capture_video else None
                result = evaluate(agent, eval_envs(), args.eval_episodes, args.seed, video)
                log.write(global_step, result, video)
                if result["eval/return_mean"] >= best:
                    best = result["eval/return_mean"]
                    save(run_dir / "best.pt", snapshot())
            good = snapshot()
            if last or crossed(global_step, args.batch_size, args.save_every):
                save(run_dir / "checkpoint.pt", good)
    except KeyboardInterrupt as interruption:
        ending, code = "stopped", 128 + interruption.args[0]
    except Exception as error:
        ending, code = f"failed ({error})", 1
        (run_dir / "error.txt").write_text(traceback.format_exc())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C shall not cut off the saving
    if code:
        save(run_dir / "checkpoint.pt", good)
    log.close()
    command = f"{'uv run' if 'UV' in os.environ else 'python'} {sys.argv[0]}"
    played = "best.pt" if (run_dir / "best.pt").exists() else "checkpoint.pt"
    print(f"The run {ending}; all is kept in {run_dir} as of step {good['global_step']:,}.")
    if code == 1:
        print(f"What failed, in full: {run_dir / 'error.txt'}")
    if code:
        print(f"Continue it: {command} --resume {run_dir}")
    print(f"Watch it: {command} --evaluate {run_dir / played} --capture-video")
    sys.exit(code)


if __name__ == "__main__":
    main()
