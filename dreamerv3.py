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
r"""DreamerV3: can an agent learn by dreaming?

PPO plays a step, learns from it and throws it away. But every step also shows how the world works: what a jump does,
where goombas walk, that a pit ends the game. DreamerV3 learns that first, as a model of the world, and then trains
actor and critic inside the model, on nearly a thousand imagined steps for each one played. Real play is only needed to
see what the model does not know yet.

The world model, a recurrent state space model (RSSM), has a state of two parts, deter h_t and stoch z_t (32 categorical
variables):

    (7)  h_t = f(h_{t-1}, z_{t-1}, a_{t-1})        what the past makes sure of: a GRU in 8 blocks
         z_t ~ q(z_t | h_t, x_t)                   the posterior, with an observation at hand
         z_t ~ p(z_t | h_t)                        the prior, without: so the model can go on with its eyes closed
         x_t, r_t, c_t from (h_t, z_t)             observation, reward, and whether the episode goes on

From here on r_t is the reward that arrives with x_t, so what a_{t-1} was paid: it is read off the state it led to.

It is trained on sequences replayed from memory. Each term of its loss has a job:

    (8)  L = |x_t - decoder|^2 - ln p(r_t) - ln p(c_t)        the state tells what is there, what it pays, if it ends
           + max(1, KL(sg(q) || p)) + 0.1 max(1, KL(q || sg(p)))

where sg stops the gradient and -ln p is short for a cross entropy, with r_t in two-hot form (below). The first KL
divergence draws the prior to the posterior, so that dreams become true; the second draws the posterior to the prior,
ten times more gently, so that states become predictable without giving up what they tell. Split like that, a poor prior
does not blind the posterior (KL balancing); below 1 nat neither asks for more (free nats). c_t is trained towards
gamma, or 0 where the episode ended for good, so the discount is part of the dream. Mario's death is such an end. A time
limit is not.

Behaviour. From every replayed state the model dreams 15 steps on: the actor draws a_k, h and z follow (7) with the
prior, rewards, continuations and values are read off the states s_k = (h_k, z_k). Returns mix all horizons as GAE does,
with lambda = 0.95 and v_k the critic's mean,

    (9)  R_k = r_{k+1} + c_{k+1} ((1 - lambda) v_{k+1} + lambda R_{k+1}),   R_15 = v_15

the critic learns to predict them, on dreams and, with weight 0.3, on the replayed steps themselves,

    (10) L_critic = -ln p(R_k | s_k) - ln p(v_slow(s_k) | s_k)

v_slow being that of a copy that follows it slowly, and the actor is REINFORCE with a baseline again, the second rung of
this ladder, but in dreams, where trying is free:

    (11) L_actor = -sg((R_k - v_k) / max(1, S)) ln pi(a_k | s_k) - eta H(pi)

H is the entropy, eta its small weight (0.0003 in the paper), S the range from the 5th to the 95th percentile of
returns, averaged slowly over the updates: large returns are scaled down to about 1, so that one entropy weight fits all
games, and small ones are left alone, so that noise is not blown up where nothing is paid yet. Steps after a likely end
count less, by the product of the c so far.

Numbers of any size. Rewards and values may be 0.01 or 10,000. Instead of a number, the heads predict probabilities of
255 bins, spaced as symexp(-20 ... 20), and learn by cross entropy (two-hot: a target lies between two bins and gives
each a share). The size of a gradient then does not depend on the size of a reward, and what is read off is the mean.
Vectors are squashed by symlog(x) = sign(x) ln(1 + |x|). That tames large observations; small ones may be the catch: not
to know what varies by 0.1 costs only 0.01 of (8), so a larger unit can help the model to remember it.

--size scales the networks, --train-ratio says how often each step is replayed. In the paper one set of hyperparameters
serves all: --batch-size 16 --batch-length 64 --learning-rate 4e-5 --warmup 1000 --ent-coef 3e-4. The defaults are for
the smallest size on two cores: many updates on small batches, with a larger step size, which a small model needs; and a
larger entropy bonus, as its actor gave up exploring before it had a world to act in. With a GPU take a larger size and
larger batches, as in the third command below; its step size is a quarter because its layers are four times as wide.

What is still wrong: more parts than all other rungs together, far more computing per step, and whatever the model gets
wrong is believed by the actor until real play corrects it.

    uv run dreamerv3.py --env SuperMarioBros-1-1-v0
    uv run dreamerv3.py --env CartPole-v1 --total-timesteps 20000 --num-envs 8 --batch-size 8 --batch-length 32 \
        --learning-rate 3e-4 --warmup 100 --ent-coef 3e-4 --eval-every 5000 --eval-episodes 100
    uv run dreamerv3.py --cuda --compile --size 12m --batch-size 32 --train-ratio 512 --learning-rate 1e-4 \
        --warmup 1000 --total-timesteps 200000 --eval-every 0
    uv run dreamerv3.py --evaluate runs/<run> --eval-episodes 100 --capture-video

Measured on 2 x86-64 cores without a GPU (flags, commits and curves in benchmark/results), size 1m: Super Mario Bros
1-1, 100,000 steps, seeds 1 and 2 (283 and 280 minutes, one core each): mean x = 2,052 and 2,026 over the last 100
episodes, 3 and 6 flags in all. PPO needs 2.4 and 2.1 times as many steps to come as far as seed 1, 2.4 and 2.1 times as
many as seed 2 (two seeds), but a tenth of the minutes. CartPole-v1, seeds 1 to 3, 20,000 steps: the best checkpoints
return 500 over 100 episodes, the last ones 500, 500 and 194, as evaluations rise and fall on the way. Pendulum-v1, seed
1: -149 after 20,000 steps. A ball of 16 pixels (benchmark/catch.py) begins to be drawn after 4,900 and 6,400 updates
(two seeds); then every one is caught. Size 12m with the third command on an H200, seed 1, stopped at step 34,850 after
8.6 minutes: mean x = 1,600 over the last 100 episodes, 3 flags in all; the last checkpoint reached the flag in 21 of
100 episodes. PPO needs 5.1 and 4.7 times as many steps for such a mean x (two seeds), but fewer minutes. Batches of 16
x 64 on an H100: size 12m makes 47 updates/s, 200m up to 12.

Hafner, Pasukonis, Ba, Lillicrap 2025, doi 10.1038/s41586-025-08744-2 and arXiv 2301.04104 (DreamerV3), as the authors'
later code has it, but for 1 % of uniform policy, which that code leaves out (--actor-unimix 0), and for discrete
observations, which are numbers here (one-hot, squared error), classes there; Hafner et al. 2019, arXiv 1811.04551
(RSSM), 2020, arXiv 1912.01603 (Dreamer); Ziyin, Wang, Ueda 2020, arXiv 2002.04839 (LaProp); Brock et al. 2021, arXiv
2102.06171 (adaptive gradient clipping); Schulman et al. 2016, arXiv 1506.02438 (lambda).
"""

import contextlib
import copy
import ctypes
import difflib
import functools
import importlib
import importlib.metadata
import itertools
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
from typing import Literal

import cv2
import gym_super_mario_bros  # noqa: F401, makes the Mario ids known
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gym_super_mario_bros.actions import SIMPLE_MOVEMENT
from nes_py import NESEnv
from nes_py.wrappers import JoypadSpace
from tqdm import tqdm

SCRIPT = "dreamerv3"
CORES = getattr(os, "process_cpu_count", os.cpu_count)()  # that this process may use; before Python 3.13 all
SIZES = {"1m": 64, "12m": 256, "25m": 384, "50m": 512, "100m": 768, "200m": 1024, "400m": 1536}  # units of a layer
LATENTS, BLOCKS, BINS = 32, 8, 255  # categorical variables of stoch, blocks of the GRU, bins of a two-hot prediction
LATENT = "deter", "stoch"  # what a record holds of the latent state
DREAM = 64  # steps of a video of a dream
PIECE = 8  # steps that --compile makes one program of: 16 were no faster on a GPU, and took longer to compile


@dataclass
class Args:
    env: str = "SuperMarioBros-1-1-v0"  # Gymnasium id; package.module:Id-v0 imports the module first
    seed: int = 1  # seed of the network, the actions and the environments
    cuda: bool = False  # compute on the GPU, if there is one
    total_timesteps: int = 100_000  # agent steps to train for, all environments together
    num_envs: int = 16  # environments played in parallel
    num_threads: int = 0  # threads that step them; 0: one more than cores for images, one for vectors
    learning_rate: float = 4e-4  # step size of the optimiser
    gamma: float = 1 - 1 / 333  # discount factor
    eval_episodes: int = 20  # episodes per evaluation
    eval_every: int = 20_000  # agent steps between evaluations; 0: only at the end
    save_every: int = 20_000  # agent steps between checkpoints; 0: only at the end
    log_every: int = 1_000  # agent steps between lines of losses, each the mean of the updates since the last
    run_dir: str = ""  # folder of the run; empty: runs/<env>__<script>__<seed>__<time>
    resume: str = ""  # folder of a run to continue
    evaluate: str = ""  # checkpoint to play, or folder of a run, without training
    capture_video: bool = False  # record the first episode of each evaluation, and what the model dreams of it
    track: bool = False  # send metrics and videos to Weights & Biases
    wandb_project_name: str = "rl-ladder"  # project to track the run in
    wandb_entity: str = ""  # team to track it under; empty: your own
    compile: bool = False  # compile the networks (one CUDA graph per update on a GPU): slower start, faster updates
    # DreamerV3
    size: Literal["1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "1m"  # about how many parameters
    train_ratio: float = 64.0  # replayed steps per step played; an update replays batch_size x batch_length
    replay_size: int = 1_000_000  # steps kept, all environments together
    batch_size: int = 4  # sequences per update
    batch_length: int = 16  # steps of each
    horizon: int = 15  # steps imagined from each of them
    return_lambda: float = 0.95  # lambda of the returns, imagined and replayed
    ent_coef: float = 1e-3  # weight of the entropy bonus
    free_nats: float = 1.0  # below so much KL divergence per step its losses are content
    dyn_scale: float = 1.0  # weight of the loss that draws the prior to the posterior
    rep_scale: float = 0.1  # weight of the loss that draws the posterior to the prior
    repval_scale: float = 0.3  # weight of the critic's loss on replayed steps
    unimix: float = 0.01  # share of the uniform distribution in every latent
    actor_unimix: float = 0.01  # the same in a Discrete policy; 0 as in the authors' later code
    true_root: bool = False  # weight a dream by whether its first state really went on, not by the prediction
    slow_rate: float = 0.02  # step of the slow critic towards the critic
    agc: float = 0.3  # gradients longer than this share of their parameter are scaled down
    warmup: int = 200  # updates over which the learning rate rises from 0

    @property
    def last_step(self) -> int:  # where training ends
        return self.total_timesteps

    @property
    def ready_at(self) -> int:  # records of each environment with which training begins: a batch of sequences
        return -(-self.batch_size * self.batch_length // self.num_envs) + self.batch_length


def fail(sentence: str):
    """End at a user's mistake: one sentence, exit code 2."""
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def check(args: Args) -> None:
    """End with exit code 2 at the first flag whose value cannot work."""
    shares = "gamma return_lambda unimix actor_unimix slow_rate".split()
    zero = shares + "seed num_threads eval_every save_every log_every ent_coef free_nats".split()
    zero += "dyn_scale rep_scale repval_scale warmup".split()
    for name, value in asdict(args).items():
        if isinstance(value, (str, bool)):
            continue
        least, most = "at least" if name in zero else "above", 1 if name in shares else 2**31 - 1
        if not (0 < value <= most or (value == 0 and name in zero)):
            fail(f"--{name.replace('_', '-')} {value} cannot work; it must be {least} 0 and at most {most}.")
    if args.batch_length < 2:
        fail(f"--batch-length {args.batch_length} cannot work; it must be at least 2.")
    least = args.ready_at * args.num_envs
    for name in ("total_timesteps", "replay_size"):
        if getattr(args, name) < least:
            flag, needs = f"--{name.replace('_', '-')} {getattr(args, name)}", "with which training begins"
            fail(f"{flag} cannot work; it must be at least the {least} steps {needs}.")


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


def is_image(space: gym.Space) -> bool:
    return (
        isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] <= 4
    )


class Senses(gym.Wrapper):
    """Any environment as a world model meets it. What it observes is {"image": 64 x 64 pixels, all image keys of a Dict
    as channels; "vector": all else as floats}, or one of them; what it is told is a vector: one-hot for a
    Discrete space, from -1 to 1 for the bounds of a Box. With images an action lasts 4 frames, of which it sees the
    last; of Atari the maximum of the last two, as some games draw things on every other frame only."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        spaces = env.observation_space
        self.spaces = dict(spaces.items()) if isinstance(spaces, gym.spaces.Dict) else {"": spaces}
        self.images = sorted(key for key, space in self.spaces.items() if is_image(space))
        self.vectors = gym.spaces.Dict({k: space for k, space in self.spaces.items() if k not in self.images})
        self.repeat, self.flickers = 4 if self.images else 1, type(env.unwrapped).__name__ == "AtariEnv"
        self.metadata = env.metadata | {"render_fps": (env.metadata.get("render_fps") or 60) / self.repeat}
        senses = {}
        if self.images:
            channels = sum(self.spaces[key].shape[-1] for key in self.images)
            senses["image"] = gym.spaces.Box(0, 255, (64, 64, channels), np.uint8)
        if self.vectors:
            senses["vector"] = gym.spaces.Box(-np.inf, np.inf, (gym.spaces.flatdim(self.vectors),), np.float32)
        self.observation_space = gym.spaces.Dict(senses)
        actions = env.action_space
        self.discrete = isinstance(actions, gym.spaces.Discrete)
        if not self.discrete:
            bounded = np.isfinite(actions.low) & np.isfinite(actions.high)
            self.low, self.high = np.where(bounded, actions.low, -1.0), np.where(bounded, actions.high, 1.0)
            self.limit = np.where(bounded, 1, np.inf)
        self.action_space = gym.spaces.Box(-1, 1, (int(actions.n) if self.discrete else math.prod(actions.shape),))

    def sense(self, obs) -> dict:
        obs, senses = obs if isinstance(self.env.observation_space, gym.spaces.Dict) else {"": obs}, {}
        if self.images:
            if isinstance(self.unwrapped, NESEnv) and obs.get("") is self.unwrapped.screen:  # OpenCV is slow on it
                obs = {"": self.unwrapped.observation("rgb_array_contiguous")}
            small = [cv2.resize(obs[key], (64, 64), interpolation=cv2.INTER_AREA) for key in self.images]
            senses["image"] = np.concatenate([image.reshape(64, 64, -1) for image in small], -1)
        if self.vectors:
            senses["vector"] = gym.spaces.flatten(self.vectors, {key: obs[key] for key in self.vectors})
        return senses

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return self.sense(obs), info

    def step(self, action):
        space, total, obs = self.env.action_space, 0.0, None
        if self.discrete:
            action = int(np.argmax(action)) + int(space.start)
        else:
            action = np.clip(np.reshape(action, space.shape), -self.limit, self.limit)
            action = self.low + (action + 1) / 2 * (self.high - self.low)
            action = np.clip(action, space.low, space.high).astype(space.dtype)  # rounding can lead out, too
        for _ in range(self.repeat):
            before = obs
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        if self.flickers and before is not None:
            obs = np.maximum(before, obs)
        return self.sense(obs), total, terminated, truncated, info


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
    space = getattr(env, "action_space", None)
    if not isinstance(space, (gym.spaces.Discrete, gym.spaces.Box)):
        fail(f"--env {env_id} cannot work; {SCRIPT}.py needs a Discrete or Box space where it has {space}.")
    space = getattr(env, "observation_space", None)
    if not getattr(space, "is_np_flattenable", False):
        fail(f"--env {env_id} cannot work; {SCRIPT}.py needs a Box or Dict space of fixed size where it has {space}.")
    return Senses(env)


class Envs:
    """Environments stepped together, in threads where that pays: the NES emulator releases Python's lock.

    Every array has one row per environment and is overwritten by the next step. Where an episode ends, `obs` already
    holds the first observation of the next one, `final_obs` the last of the old, and `finished` its figures.
    """

    def __init__(self, env_id: str, num_envs: int, num_threads: int = 0, render_mode: str | None = None):
        self.envs = [make_env(env_id, render_mode if i == 0 else None) for i in range(num_envs)]
        spaces, actions = self.envs[0].observation_space, self.envs[0].action_space
        self.image = "image" in spaces.keys()
        self.num_actions, self.discrete = actions.shape[0], self.envs[0].discrete
        self.obs = {sense: np.zeros((num_envs, *space.shape), space.dtype) for sense, space in spaces.items()}
        self.final_obs, self.finished = copy.deepcopy(self.obs), {}
        self.rewards, self.returns, self.lengths = np.zeros((3, num_envs))
        self.terminated, self.truncated = np.zeros((2, num_envs), bool)
        num_threads = min(num_envs, num_threads or (CORES + 1 if self.image else 1))
        self.map = ThreadPoolExecutor(num_threads).map if num_threads > 1 else map

    def reset(self, seed: int | list[int]) -> None:
        """Begin new episodes, each environment with a seed of its own drawn from `seed`."""
        for i, s in enumerate(np.random.SeedSequence(seed).generate_state(len(self.envs))):
            self.keep(self.obs, i, self.envs[i].reset(seed=int(s))[0])
        self.returns[:] = self.lengths[:] = 0

    def keep(self, rows: dict, i: int, obs: dict) -> None:
        for sense, value in obs.items():
            rows[sense][i] = np.asarray(value).reshape(rows[sense].shape[1:])  # a wrong shape shall not be broadcast

    def step(self, actions: list, rows=None) -> None:
        """Step the environments in `rows` (default: all) with their actions, one per environment."""
        self.finished = {}
        deque(self.map(self.step_one, range(len(self.envs)) if rows is None else rows, actions), maxlen=0)
        if not all(np.isfinite(figures).all() for figures in (self.rewards, self.obs.get("vector", 0))):
            raise FloatingPointError("a reward or an observation of the environment is not finite")

    def step_one(self, i: int, action: list[float]) -> None:
        try:
            obs, reward, terminated, truncated, info = self.envs[i].step(action)
            self.keep(self.obs, i, obs)
            self.rewards[i] = reward
            self.terminated[i], self.truncated[i] = terminated, truncated and not terminated
            self.returns[i] += reward
            self.lengths[i] += 1
            if terminated or truncated:
                figures = {"episodic_return": float(self.returns[i]), "episodic_length": int(self.lengths[i])}
                if "flag_get" in info:
                    figures |= {"flag": int(info["flag_get"]), "x_pos": int(info["x_pos"])}
                self.keep(self.final_obs, i, obs)
                self.finished[i] = figures
                self.returns[i] = self.lengths[i] = 0
                self.keep(self.obs, i, self.envs[i].reset()[0])
        except Exception as error:
            raise RuntimeError(f"environment {i} raised {type(error).__name__}: {error}") from error


class Replay:
    """The latest records of every environment, one stream each, with which the world model is trained.

    A record holds what the agent saw (image, vector), what it was paid on arriving there (reward), whether an episode
    began here (first), ended (last), ended for good (terminal), what it did then (action) and the latent state it was
    in (deter, stoch as class numbers). Every environment writes one record at a time, so all streams have one length.
    """

    def __init__(self, args: Args, envs: Envs, agent: "Agent", device: torch.device):
        self.args, self.folder = args, Path(args.run_dir) / "replay"
        self.window = args.batch_length + 1  # one more, whose latent state and action lead to the first
        self.length = min(args.replay_size, args.total_timesteps) // args.num_envs
        columns = {sense: (value.shape[1:], torch.as_tensor(value).dtype) for sense, value in envs.obs.items()}
        columns |= {"reward": ((), torch.float32), "action": ((envs.num_actions,), torch.float32)}
        columns |= dict.fromkeys(("first", "last", "terminal"), ((), torch.bool))
        columns |= {"deter": ((agent.rssm.deter_size,), agent.dtype), "stoch": ((LATENTS,), torch.uint8)}
        shape = self.length, args.num_envs
        size = math.prod(shape) * sum(math.prod(s) * dtype.itemsize for s, dtype in columns.values())
        self.memory = f"{size / 1e6:,.1f} MB for {math.prod(shape):,} steps"
        if device.type == "cuda":
            room = torch.cuda.mem_get_info(device)[0]
        else:
            room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
        room *= 0.75  # the rest is for what learns from it
        if size > room:
            remedy = f"at most {int(room / size * math.prod(shape)):,} steps fit"
            fail(f"--replay-size {args.replay_size} cannot work; it takes {self.memory}, but {remedy} in memory.")
        self.columns = {
            name: torch.empty(shape + s, dtype=dtype, device=device) for name, (s, dtype) in columns.items()
        }
        self.count, self.saved = 0, 0  # records of each stream so far, and how many of them are on the disk
        self.dropped = 0  # those that a smaller replay had overwritten before this run was resumed
        self.owed = 1.0  # updates that are due
        self.online, self.files = deque(), []

    def add(self, record: dict) -> None:
        """Add a record of every environment, each value (N, ...)."""
        for name, value in record.items():
            self.columns[name][self.count % self.length] = torch.as_tensor(value)
        self.count += 1
        if self.count > self.window and self.count % self.window == 1:  # what is new is soon replayed once
            self.online.extend((self.count - self.window, i) for i in range(self.args.num_envs))
        if self.ready:
            self.owed += self.args.num_envs * self.args.train_ratio / (self.args.batch_size * self.args.batch_length)

    @property
    def oldest(self) -> int:
        return max(self.dropped, self.count - self.length)

    @property
    def ready(self) -> bool:
        return self.count - self.oldest >= self.args.ready_at

    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where batch_size windows lie: rows (window, B) and streams (1, B) of the columns. Fresh first, then any."""
        starts = torch.randint(self.oldest, self.count - self.window + 1, (self.args.batch_size,))
        streams = torch.randint(self.args.num_envs, (self.args.batch_size,))
        for b in range(self.args.batch_size):
            while self.online:
                start, stream = self.online.popleft()
                if start >= self.oldest:
                    starts[b], streams[b] = start, stream
                    break
        rows = (starts + torch.arange(self.window)[:, None]) % self.length
        return rows, streams[None]

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Where the records from begin to end lie in the columns, which are rings."""
        return torch.arange(begin, end) % self.length

    def read(self, name: str, begin: int, end: int) -> torch.Tensor:
        return self.columns[name][self.rows(begin, end)].cpu()

    def state_dict(self) -> dict:
        """Write what is new beside the checkpoint -> what tells the rest, for the checkpoint.

        Steps never change: those since the last time become a new file. Latent states do: all are written anew. The
        files that the last checkpoint names stay until a new one has been written, so a kill loses nothing."""
        self.folder.mkdir(exist_ok=True)
        last = self.folder.parent / "checkpoint.pt"  # not always that of the last call: writing it can fail
        named = torch.load(last, weights_only=True, mmap=True)["replay"]["files"] if last.exists() else []
        for path in [*self.folder.glob("steps-*"), *self.folder.glob("latents-*")]:
            if path.name not in {*named, *self.files}:
                path.unlink()
        files = [name for name in self.files if name[:5] == "steps" and int(name[6:-3].split("-")[1]) > self.oldest]
        begin = max(self.saved, self.oldest)
        if self.count > begin:
            files.append(f"steps-{begin}-{self.count}.pt")
            steps = {name: self.read(name, begin, self.count) for name in self.columns if name not in LATENT}
            save(self.folder / files[-1], steps)
        files.append(f"latents-{self.oldest}-{self.count}.pt")
        save(self.folder / files[-1], {name: self.read(name, self.oldest, self.count) for name in LATENT})
        self.saved, self.files = self.count, files
        state = {"count": self.count, "oldest": self.oldest, "owed": self.owed, "files": files}
        return state | {"online": list(self.online)}

    def load_state_dict(self, state: dict) -> None:
        """Read back what state_dict has written; what --replay-size has no room for any more is left out."""
        self.count, self.dropped = state["count"], state["oldest"]
        self.owed, self.files = state["owed"], state["files"]
        whole = [(start, i) for start, i in state["online"] if start + self.window <= self.count]  # windows can grow
        self.online, self.saved = deque(whole), self.count
        for name in self.files:
            try:
                saved = torch.load(self.folder / name, weights_only=True, mmap=True)
            except Exception as error:
                fail(f"{self.folder / name} cannot be read ({type(error).__name__}); a run is resumed with its replay.")
            end, (length, streams) = int(name[:-3].split("-")[-1]), next(iter(saved.values())).shape[:2]
            if streams != self.args.num_envs:
                fail(f"--num-envs {self.args.num_envs} does not fit the replay, which has {streams}; leave it out.")
            kept = max(0, min(end - self.oldest, length))
            for key, column in saved.items():  # device and type may have changed
                self.columns[key][self.rows(end - kept, end)] = column[length - kept :].to(self.columns[key])


# ------------------------------------------------------------------------------------------------ network


def symlog(x: torch.Tensor) -> torch.Tensor:
    """sign(x) ln(1 + |x|): large numbers brought near, small ones left as they are."""
    return x.sign() * x.abs().log1p()


def symexp(x: torch.Tensor) -> torch.Tensor:
    """The inverse of symlog."""
    return x.sign() * x.abs().expm1()


def initialise(weight: torch.Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Normal weights of variance 1 / fan_in, cut off at two deviations (of the normal that is cut)."""
    std = 1.1368 * scale / math.sqrt(fan_in)
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std) if scale else nn.init.zeros_(weight)


class Linear(nn.Linear):
    def __init__(self, n_in: int, n_out: int, scale: float = 1.0):
        super().__init__(n_in, n_out)
        initialise(self.weight, n_in, scale)
        nn.init.zeros_(self.bias)


class BlockLinear(nn.Module):
    """A matrix for each block of the features: (B, BLOCKS, n_in / BLOCKS) -> (B, n_out), block after block."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(BLOCKS, n_in // BLOCKS, n_out // BLOCKS))
        self.bias = nn.Parameter(torch.zeros(BLOCKS, 1, n_out // BLOCKS))
        initialise(self.weight, n_in)  # as wide as if it were one matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x.transpose(0, 1), self.weight).transpose(0, 1).flatten(1)


class RMSNorm(nn.Module):
    """Divides the last axis by its root mean square, in float32, and scales it."""

    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.scale.shape, self.scale, 1e-4).to(x.dtype)


def mlp(n_in: int, units: int, layers: int, n_out: int = 0, scale: float = 1.0) -> nn.Sequential:
    """Linear, norm, SiLU, `layers` times; then a linear layer, if n_out says how wide."""
    modules = []
    for i in range(layers):
        modules += Linear(units if i else n_in, units), RMSNorm(units), nn.SiLU()
    return nn.Sequential(*modules, *([Linear(units, n_out, scale)] if n_out else []))


def doubled_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x (B, C, H, W), doubled, then convolved with weight (O, C, 5, 5) -> (B, O, 2 H, 2 W).

    Neighbours in a doubled image are equal, so that 5 taps meet no more than 3 pixels of the small one. Which of them
    meet depends on the place of the new pixel: taps that do are added up, for each of the 4 places, and the small image
    is convolved with the 4 kernels of 3 x 3. The sums are the same, from 36 products where there were 100.
    """
    pads = [(right, 1 - right, lower, 1 - lower) for lower in (0, 1) for right in (0, 1)]
    kernels = [F.avg_pool2d(F.pad(weight, pad), 2, divisor_override=1) for pad in pads]
    x = F.conv2d(x, torch.cat(kernels), bias.repeat(4), padding=1)
    x = x.movedim(1, -1).unflatten(-1, (2, 2, -1)).transpose(2, 3)  # (B, H, 2, W, 2, O)
    return x.flatten(3, 4).flatten(1, 2).movedim(-1, 1)


class Conv(nn.Module):
    """5 x 5 convolution, then halved by maximum; or, first doubled, a convolution alone. Images are (B, C, H, W)."""

    def __init__(self, n_in: int, n_out: int, up: bool, last: bool = False):
        super().__init__()
        self.conv, self.up = nn.Conv2d(n_in, n_out, 5, padding=2), up
        self.norm = None if last else RMSNorm(n_out)
        initialise(self.conv.weight, n_in * 25)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = doubled_conv(x, self.conv.weight, self.conv.bias) if self.up else F.max_pool2d(self.conv(x), 2)
        return x if self.norm is None else F.silu(self.norm(x.movedim(1, -1)).movedim(-1, 1))


class Encoder(nn.Module):
    """Observations -> tokens (B, size): a CNN for images, three layers for vectors."""

    def __init__(self, senses: dict, units: int, dtype: torch.dtype):
        super().__init__()
        depth, self.size, self.dtype = units // 16, 0, dtype
        if "vector" in senses:
            self.mlp = mlp(senses["vector"][0], units, 3)
            self.size += units
        if "image" in senses:
            channels = senses["image"][-1], 2 * depth, 3 * depth, 4 * depth, 4 * depth
            self.cnn = nn.Sequential(*(Conv(a, b, up=False) for a, b in itertools.pairwise(channels)))
            self.size += 4 * 4 * 4 * depth

    def forward(self, obs: dict) -> torch.Tensor:
        tokens = [self.mlp(symlog(obs["vector"]))] if "vector" in obs else []
        if "image" in obs:
            image = obs["image"].movedim(-1, 1).to(self.dtype) / 255 - 0.5
            tokens.append(self.cnn(image).movedim(1, -1).flatten(1))
        return torch.cat(tokens, -1)


class Decoder(nn.Module):
    """Latent states -> the observations that they stand for, vectors by their symlog, pixels from 0 to 1."""

    def __init__(self, senses: dict, units: int):
        super().__init__()
        depth, deter, stoch = units // 16, 8 * units, 2 * units
        if "vector" in senses:
            self.mlp = mlp(stoch + deter, units, 3, senses["vector"][0])
        if "image" in senses:
            self.size = 4 * depth
            self.from_deter = BlockLinear(deter, 4 * 4 * self.size)
            self.from_stoch = mlp(stoch, 2 * units, 1, 4 * 4 * self.size)
            self.norm = RMSNorm(self.size)
            channels = 4 * depth, 4 * depth, 3 * depth, 2 * depth
            convs = [Conv(a, b, up=True) for a, b in itertools.pairwise(channels)]
            self.cnn = nn.Sequential(*convs, Conv(2 * depth, senses["image"][-1], up=True, last=True))

    def forward(self, deter: torch.Tensor, stoch: torch.Tensor) -> dict:
        obs = {}
        if hasattr(self, "mlp"):
            obs["vector"] = self.mlp(torch.cat([stoch, deter], -1)).float()
        if hasattr(self, "cnn"):
            x = self.from_deter(deter.unflatten(-1, (BLOCKS, -1)))
            x = x.unflatten(-1, (BLOCKS, 4, 4, -1)).movedim(1, 3).flatten(3)  # each block draws some of the channels
            x = F.silu(self.norm(x + self.from_stoch(stoch).unflatten(-1, (4, 4, -1))))
            obs["image"] = self.cnn(x.movedim(-1, 1)).movedim(1, -1).float().sigmoid()
        return obs


def unimix(logits: torch.Tensor, share: float) -> torch.Tensor:
    """Probabilities of which a share is uniform, so that none is 0 and no KL divergence infinite; (..., C)."""
    probs = (1 - share) * logits.float().softmax(-1) + share / logits.shape[-1]
    return probs if share else probs.clamp(min=1e-30)  # whose logarithm is finite


def pick(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """One-hot samples of probs (..., C), drawn with exponential noise: the first of C alarms with these rates."""
    return torch.zeros_like(probs).scatter_(-1, (probs / noise).argmax(-1, keepdim=True), 1.0)


def exponential(like: torch.Tensor, *shape: int, generator=None) -> torch.Tensor:
    """As exponential_, which on the CPU takes five times as long."""
    return torch.rand(shape, device=like.device, generator=generator).log_().neg_()


class RSSM(nn.Module):
    """The recurrent state space model, equation (7): the state is deter (B, D) and LATENTS one-hot variables, stoch."""

    def __init__(self, units: int, num_actions: int, tokens: int, share: float):
        super().__init__()
        self.deter_size, self.classes, self.share = 8 * units, units // 16, share
        deter, stoch = self.deter_size, LATENTS * self.classes
        self.from_deter, self.from_stoch = mlp(deter, units, 1), mlp(stoch, units, 1)
        self.from_action = mlp(num_actions, units, 1)
        self.hidden, self.norm = BlockLinear(deter + BLOCKS * 3 * units, deter), RMSNorm(deter)
        self.gates = BlockLinear(deter, 3 * deter)
        self.posterior = mlp(deter + tokens, units, 1, stoch)
        self.prior = mlp(deter, units, 2, stoch)

    def embed(self, action: torch.Tensor) -> torch.Tensor:
        """Actions (..., num_actions) as the core takes them."""
        return self.from_action(action / action.abs().clamp(min=1))

    def core(self, deter: torch.Tensor, stoch: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """deter (B, D) of the next step: a GRU whose recurrent weights are BLOCKS separate blocks."""
        inputs = torch.cat([self.from_deter(deter), self.from_stoch(stoch), embedded], -1)
        blocks = deter.unflatten(-1, (BLOCKS, -1))
        x = torch.cat([blocks, inputs[:, None].expand(-1, BLOCKS, -1)], -1)  # all inputs go to every block
        x = F.silu(self.norm(self.hidden(x)))
        reset, cand, update = self.gates(x.unflatten(-1, (BLOCKS, -1))).unflatten(-1, (BLOCKS, 3, -1)).unbind(2)
        update = torch.sigmoid(update - 1)  # at first most of the old state stays
        return (update * torch.tanh(torch.sigmoid(reset) * cand) + (1 - update) * blocks).flatten(1)

    def logits(self, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net(x).float().unflatten(-1, (LATENTS, self.classes))

    def sample(self, logits: torch.Tensor, noise: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """stoch (B, Z), drawn; the gradient passes straight through to the probabilities."""
        probs = unimix(logits, self.share)
        return (pick(probs.detach(), noise) + (probs - probs.detach())).flatten(-2).to(dtype)

    def observe(self, deter, stoch, actions, tokens, noise, first) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """T steps with observations (T, B, ...), from the state (B, ...) before them -> deter, stoch and logits of the
        posterior of each. Where first (T, B) begins an episode, the old state and what was done in it are nothing."""
        keep, steps = ~first[..., None], []
        for t, embedded in enumerate(self.embed(actions * keep)):
            deter = self.core(deter * keep[t], stoch * keep[t], embedded)
            logits = self.logits(self.posterior, torch.cat([deter, tokens[t]], -1))
            stoch = self.sample(logits, noise[t], deter.dtype)
            steps.append((deter, stoch, logits))
        return tuple(torch.stack(column) for column in zip(*steps, strict=True))

    def imagine(self, deter, stoch, action, noise) -> tuple[torch.Tensor, torch.Tensor]:
        """One step without: deter, stoch of the prior."""
        deter = self.core(deter, stoch, self.embed(action))
        return deter, self.sample(self.logits(self.prior, deter), noise, deter.dtype)


class Agent(nn.Module):
    """The world model, the policy pi(a|s) and the value V(s), where s = (deter, stoch) is the model's latent state."""

    def __init__(self, senses: dict, num_actions: int, discrete: bool, args: Args, dtype: torch.dtype = torch.float32):
        super().__init__()
        units = SIZES[args.size]
        self.num_actions, self.discrete, self.share, self.dtype = num_actions, discrete, args.actor_unimix, dtype
        self.encoder, self.decoder = Encoder(senses, units, dtype), Decoder(senses, units)
        self.rssm = RSSM(units, num_actions, self.encoder.size, args.unimix)
        state = 10 * units
        self.reward = mlp(state, units, 1, BINS, 0.0)
        self.going_on = mlp(state, units, 1, 1)
        self.actor = mlp(state, units, 3, num_actions if discrete else 2 * num_actions, 0.01)
        self.critic = mlp(state, units, 3, BINS, 0.0)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        half = symexp(torch.linspace(-20, 0, BINS // 2 + 1))
        self.register_buffer("bins", torch.cat([half, -half[:-1].flip(0)]))
        self.register_buffer("range", torch.zeros(2))  # of the returns: 5th and 95th percentile, slowly averaged

    def autocast(self):
        """Convolutions and matrix products in bfloat16, if that is the dtype. Unless compiled, a context casts each
        weight once and keeps it. Some versions of torch lose the gradient of what was first cast without one, so dreams
        have a context of their own."""
        return torch.autocast(self.bins.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def initial(self, rows: int) -> tuple[torch.Tensor, ...]:
        """(deter, stoch, action) before the first step: zeros."""
        sizes = self.rssm.deter_size, LATENTS * self.rssm.classes, self.num_actions
        return tuple(torch.zeros(rows, size, dtype=self.dtype, device=self.bins.device) for size in sizes)

    def noise(self, *shape: int, generator=None) -> torch.Tensor:
        """What draw needs to draw actions of this shape."""
        if self.discrete:
            return exponential(self.bins, *shape, self.num_actions, generator=generator)
        return torch.randn(*shape, self.num_actions, device=self.bins.device, generator=generator)

    def normal(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = out.float().chunk(2, -1)
        return mean.tanh(), 0.9 * torch.sigmoid(std + 2) + 0.1

    def draw(self, states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Actions (..., num_actions) from the policy."""
        out = self.actor(states)
        if self.discrete:
            return pick(unimix(out, self.share), noise)
        mean, std = self.normal(out)
        return mean + std * noise

    def judge(self, states: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi(a|s) and the policy's entropy, (...,) each."""
        out = self.actor(states)
        if self.discrete:
            log_probs = unimix(out, self.share).log()
            return (log_probs * actions).sum(-1), -(log_probs.exp() * log_probs).sum(-1)
        mean, std = self.normal(out)
        log_probs = -0.5 * ((actions - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        return log_probs.sum(-1), (0.5 + 0.5 * math.log(2 * math.pi) + std.log()).sum(-1)

    @torch.no_grad()
    def act(self, obs: dict, latent: tuple, first: torch.Tensor, generator=None) -> tuple[torch.Tensor, tuple]:
        """obs (B, ...) and the latent state that led there -> actions (B, num_actions) drawn from the policy, and the
        new latent state (deter, stoch, action). Rows of first (B,) begin an episode: their old state is nothing."""
        with self.autocast():
            deter, stoch, action = latent
            noise = exponential(deter, 1, len(deter), LATENTS, self.rssm.classes, generator=generator)
            steps = self.rssm.observe(deter, stoch, action[None], self.encoder(obs)[None], noise, first[None])
            deter, stoch, _ = (part[0] for part in steps)
            action = self.draw(torch.cat([deter, stoch], -1), self.noise(len(deter), generator=generator))
        return action, (deter, stoch, action.to(self.dtype))


# ------------------------------------------------------------------------------------------------ algorithm


def two_hot(x: torch.Tensor, bins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The bins below and above each x (...,), and the weight of the one above: x is their weighted mean."""
    count = torch.searchsorted(bins, x, right=True)
    below, above = (count - 1).clamp(0, len(bins) - 1), count.clamp(0, len(bins) - 1)
    gap = bins[above] - bins[below]
    return below, above, torch.where(gap > 0, (x - bins[below]) / gap, 0.0)  # no gap: x lies beyond the last bin


def two_hot_loss(logits: torch.Tensor, x: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Cross entropy between logits (..., BINS) and the two-hot code of x (...,)."""
    below, above, weight = two_hot(x, bins)
    log_probs = logits.float().log_softmax(-1)
    low, high = (log_probs.gather(-1, index[..., None]).squeeze(-1) for index in (below, above))
    return -((1 - weight) * low + weight * high)


def two_hot_mean(logits: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """The number that logits (..., BINS) stand for. Opposite bins are summed first: they cancel out to the digit."""
    terms, middle = logits.float().softmax(-1) * bins, len(bins) // 2
    return (terms[..., :middle].flip(-1) + terms[..., middle + 1 :]).sum(-1) + terms[..., middle]


def latent_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of probabilities (..., LATENTS, C), summed over the variables -> (...,)."""
    return (p * (p.log() - q.log())).sum((-2, -1))


def lambda_returns(rewards, discounts, values, decay) -> torch.Tensor:
    """Equation (9): R_k = r_{k+1} + c_{k+1} ((1 - lambda) v_{k+1} + lambda R_{k+1}), beginning with R = v at the end.

    All (K, ...), each row of the step that follows: reward, discount (0 where the episode ended for good), value and
    lambda (0 where it ended or was cut: no return flows back from the next episode)."""
    known, share = rewards + discounts * (1 - decay) * values, discounts * decay  # of all rows at once
    returns, last = [], values[-1]
    for k in reversed(range(len(values))):
        last = torch.addcmul(known[k], share[k], last)
        returns.append(last)
    return torch.stack(returns[::-1])


def observe(agent: Agent, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Follow the replayed sequences, from the stored state of their record 0 -> deter (T, B, D), stoch (T, B, Z) and
    logits of the posteriors (T, B, LATENTS, C) of the records 1 to T."""
    T, B = batch["reward"][1:].shape
    obs = {sense: batch[sense][1:].flatten(0, 1) for sense in ("image", "vector") if sense in batch}
    tokens = agent.encoder(obs).unflatten(0, (T, B))
    deter, stoch = batch["deter"][0], F.one_hot(batch["stoch"][0].long(), agent.rssm.classes).flatten(1).to(agent.dtype)
    noise, pieces = exponential(deter, T, B, LATENTS, agent.rssm.classes), []
    columns = batch["action"][:-1], tokens, noise, batch["first"][1:]
    for piece in zip(*(column.split(PIECE) for column in columns), strict=True):
        pieces.append(agent.rssm.observe(deter, stoch, *piece))
        deter, stoch = (part[-1] for part in pieces[-1][:2])
    return tuple(torch.cat(column) for column in zip(*pieces, strict=True))


def model_losses(agent: Agent, args: Args, batch: dict, deter, stoch, logits) -> dict:
    """Equation (8): the losses of the world model, each a mean over T x B steps."""
    losses, states, steps = {}, torch.cat([deter, stoch], -1), deter.shape[0] * deter.shape[1]
    for sense, prediction in agent.decoder(deter.flatten(0, 1), stoch.flatten(0, 1)).items():
        truth = batch[sense][1:].flatten(0, 1)
        truth = truth / 255 if sense == "image" else symlog(truth)
        losses[sense] = F.mse_loss(prediction, truth, reduction="sum") / steps
    losses["reward"] = two_hot_loss(agent.reward(states), batch["reward"][1:], agent.bins).mean()
    going_on = args.gamma * ~batch["terminal"][1:]
    losses["continue"] = F.binary_cross_entropy_with_logits(agent.going_on(states).float().squeeze(-1), going_on)
    posterior = unimix(logits, args.unimix)
    prior = unimix(agent.rssm.logits(agent.rssm.prior, deter), args.unimix)
    losses["dynamics"] = latent_kl(posterior.detach(), prior).clamp(min=args.free_nats).mean()
    losses["representation"] = latent_kl(posterior, prior.detach()).clamp(min=args.free_nats).mean()
    return losses


@torch.no_grad()
def imagine(agent: Agent, deter: torch.Tensor, stoch: torch.Tensor, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dream on from M states -> states (horizon + 1, M, D + Z), actions (horizon, M, num_actions)."""
    states, actions = [torch.cat([deter, stoch], -1)], []
    for _ in range(horizon):
        actions.append(agent.draw(states[-1], agent.noise(len(deter))))
        noise = exponential(deter, len(deter), LATENTS, agent.rssm.classes)
        deter, stoch = agent.rssm.imagine(deter, stoch, actions[-1].to(agent.dtype), noise)
        states.append(torch.cat([deter, stoch], -1))
    return torch.stack(states), torch.stack(actions)


def critic_loss(agent: Agent, states: torch.Tensor, logits: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
    """Equation (10): the critic's cross entropy to the returns, and to the slow critic, which steadies it; (...,)."""
    with torch.no_grad():
        slow = two_hot_mean(agent.slow_critic(states), agent.bins)
    return two_hot_loss(logits, returns, agent.bins) + two_hot_loss(logits, slow, agent.bins)


def percentiles(x: torch.Tensor, shares: tuple[float, ...]) -> torch.Tensor:
    """The values below which these shares of x lie, interpolated. (torch.quantile would copy the shares to the GPU.)"""
    ordered, places = x.flatten().sort().values, [share * (x.numel() - 1) for share in shares]
    return torch.stack([ordered[int(p)].lerp(ordered[math.ceil(p)], p % 1) for p in places])


def behaviour_losses(agent: Agent, args: Args, states, actions, terminal) -> tuple[dict, dict, torch.Tensor]:
    """Equations (9) to (11) on dreams that imagine has begun in M real states, of which those in terminal (M,) were
    ends: the losses of actor and critic, figures that are no losses, and the returns (horizon, M)."""
    logits = agent.critic(states)
    with torch.no_grad():
        rewards, values = two_hot_mean(agent.reward(states), agent.bins), two_hot_mean(logits, agent.bins)
        going_on = agent.going_on(states).float().squeeze(-1).sigmoid()  # gamma is in it
        if args.true_root:
            going_on[0] = args.gamma * ~terminal
        decay = torch.full_like(values[1:], args.return_lambda)
        returns = lambda_returns(rewards[1:], going_on[1:], values[1:], decay)
        weights = going_on.cumprod(0)[:-1]  # a state counts as much as it is likely to be reached
        agent.range.lerp_(percentiles(returns, (0.05, 0.95)), 0.01)
        scale = (agent.range[1] - agent.range[0]).clamp(min=1)
    log_probs, entropy = agent.judge(states[:-1], actions)
    policy_loss = -(log_probs * (returns - values[:-1]) / scale + args.ent_coef * entropy)
    value_loss = critic_loss(agent, states[:-1], logits[:-1], returns)
    losses = {"policy": (weights * policy_loss).mean(), "value": (weights * value_loss).mean()}
    return losses, {"entropy": entropy.mean().detach(), "return_scale": scale}, returns


def replay_value_loss(agent: Agent, args: Args, states, batch: dict, bootstrap: torch.Tensor) -> torch.Tensor:
    """Equation (10) on what was really paid, in states (T, B, D + Z) whose gradient reaches the world model.
    bootstrap (T, B) is what dreams that began there returned."""
    last, terminal = batch["last"][1:], batch["terminal"][1:]
    discounts, decay = args.gamma * ~terminal[1:], args.return_lambda * ~last[1:]
    returns = lambda_returns(batch["reward"][2:], discounts, bootstrap[1:], decay)
    errors = critic_loss(agent, states[:-1], agent.critic(states[:-1]), returns)
    return (errors * ~last[:-1]).mean()


class LaProp(torch.optim.Optimizer):
    """Momentum of gradients that are divided by their root mean square first (Ziyin et al. 2020), with each parameter's
    gradient held below a share of the parameter (adaptive gradient clipping, Brock et al. 2021) and a step size that
    rises from 0. Nothing here waits for the device."""

    def __init__(self, params, lr: float, warmup: int, agc: float, betas=(0.9, 0.999), eps: float = 1e-20):
        defaults = {"lr": lr, "warmup": warmup, "agc": agc, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"capturable": True})  # the loaded step count, too, goes to the device
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"square": torch.zeros_like(p), "momentum": torch.zeros_like(p)}
        self.first = self.param_groups[0]["params"][0]
        self.state[self.first]["step"] = torch.zeros((), device=self.first.device)  # one count serves all

    @property
    def rate(self) -> torch.Tensor:
        """The step size of the next update."""
        group, step = self.param_groups[0], self.state[self.first]["step"]
        return group["lr"] * (step / group["warmup"] if group["warmup"] else step + 1).clamp(max=1)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """One update -> the norm of the gradient, before any clipping."""
        group, rate = self.param_groups[0], self.rate
        step = self.state[self.first]["step"].add_(1)
        params, (beta1, beta2) = group["params"], group["betas"]
        grads = [p.grad for p in params]
        squares, momenta = ([self.state[p][name] for p in params] for name in ("square", "momentum"))
        norms = torch.stack(torch._foreach_norm(grads))
        longest = group["agc"] * torch.stack(torch._foreach_norm(params)).clamp(min=1e-3)
        torch._foreach_div_(grads, list((norms / longest).clamp(min=1)))
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_div(squares, 1 - beta2**step)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_lerp_(momenta, torch._foreach_div(grads, roots), 1 - beta1)
        torch._foreach_sub_(params, torch._foreach_mul(momenta, rate / (1 - beta1**step)))
        return norms.norm()


def update(agent: Agent, optimizer: LaProp, args: Args, columns: dict, rows, streams) -> dict:
    """One gradient step of everything, on the windows of the replay's columns at rows (T + 1, B) and streams (1, B) ->
    losses. The latent states found on the way replace those in the columns."""
    rate = optimizer.rate
    batch = {name: column[rows, streams] for name, column in columns.items()}
    batch["last"][:-1] |= batch["first"][1:]  # an episode that an interrupted run has left
    with agent.autocast():
        deter, stoch, posteriors = observe(agent, batch)
        losses = model_losses(agent, args, batch, deter, stoch, posteriors)
    with agent.autocast():
        dreams, actions = imagine(agent, deter.flatten(0, 1), stoch.flatten(0, 1), args.horizon)
    with agent.autocast():
        terminal = batch["terminal"][1:]
        behaviour, figures, returns = behaviour_losses(agent, args, dreams, actions, terminal.flatten())
        bootstrap = returns[0].view_as(terminal)
        losses["replay_value"] = replay_value_loss(agent, args, torch.cat([deter, stoch], -1), batch, bootstrap)
    losses |= behaviour
    scales = {"dynamics": args.dyn_scale, "representation": args.rep_scale, "replay_value": args.repval_scale}
    loss = sum(scales.get(name, 1.0) * term for name, term in losses.items())
    optimizer.zero_grad()
    loss.backward()
    figures |= losses | {"loss": loss, "grad_norm": optimizer.step()}
    slow, fast = ([p.detach() for p in critic.parameters()] for critic in (agent.slow_critic, agent.critic))
    torch._foreach_lerp_(slow, fast, args.slow_rate)
    classes = stoch.detach().unflatten(-1, (LATENTS, -1)).argmax(-1).to(torch.uint8)
    for b in range(streams.shape[1]):  # one after the other: where windows overlap, the later one wins as a whole
        where = rows[1:, b], streams[:, b]
        columns["deter"][where], columns["stoch"][where] = deter[:, b].detach(), classes[:, b]
    return {f"losses/{name}": figure.detach() for name, figure in figures.items()} | {"charts/learning_rate": rate}


def compile_parts(agent: Agent) -> None:
    """Compile the networks, some steps of the RSSM and the policy, not the loops, which would take many minutes."""
    torch._dynamo.config.recompile_limit = 64  # each network is compiled for acting, replaying, dreaming, judging
    agent.rssm.observe = torch.compile(agent.rssm.observe, dynamic=False)
    agent.rssm.imagine = torch.compile(agent.rssm.imagine, dynamic=False)
    agent.draw, agent.judge = (torch.compile(f, dynamic=False) for f in (agent.draw, agent.judge))
    for net in (agent.encoder, agent.decoder, agent.reward, agent.going_on, agent.critic, agent.slow_critic):
        net.compile(dynamic=False)


class Captured:
    """learn(rows, streams) as one CUDA graph: thousands of kernels, launched at once. The first calls run as they are
    and are updates like any other: they compile and allocate. Then one call is recorded, and from then on replayed."""

    def __init__(self, learn):
        self.learn, self.calls, self.stream = learn, 0, torch.cuda.Stream()

    def __call__(self, rows: torch.Tensor, streams: torch.Tensor) -> dict:
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                figures = self.learn(rows, streams)
            torch.cuda.current_stream().wait_stream(self.stream)
            return figures
        if self.calls == 4:
            self.graph, self.inputs = torch.cuda.CUDAGraph(), (rows.clone(), streams.clone())
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.figures = self.learn(*self.inputs)
        for static, given in zip(self.inputs, (rows, streams), strict=True):
            static.copy_(given)
        self.graph.replay()
        return {name: figure.clone() for name, figure in self.figures.items()}


@torch.no_grad()
def dream(agent: Agent, obs: dict, actions: torch.Tensor, context: int) -> torch.Tensor:
    """What the model makes of T steps, obs (T, ...) and actions (T, num_actions): from `context` steps that it is shown
    and T - context that it imagines from their actions alone -> images (T, 64, 64, C), from 0 to 1."""
    deter, stoch, action = agent.initial(1)
    before = torch.cat([action, actions[:-1].to(agent.dtype)])[:, None]  # what was done before each step
    generator = torch.Generator(deter.device).manual_seed(0)
    noise = exponential(deter, len(actions), 1, LATENTS, agent.rssm.classes, generator=generator)
    with agent.autocast():  # all as it is: compiled, each length would be compiled anew
        tokens = agent.encoder.forward({sense: values[:context] for sense, values in obs.items()})[:, None]
        first = torch.zeros(len(tokens), 1, dtype=torch.bool, device=deter.device)
        seen = RSSM.observe(agent.rssm, deter, stoch, before[:context], tokens, noise[:context], first)
        states = list(zip(*seen[:2], strict=True))
        for t in range(len(states), len(actions)):
            states.append(RSSM.imagine(agent.rssm, *states[-1], before[t], noise[t]))
        deter, stoch = (torch.cat(part) for part in zip(*states, strict=True))
        return agent.decoder.forward(deter, stoch)["image"]


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
    latent, first, seen = agent.initial(len(envs.envs)), np.ones(len(envs.envs), bool), []
    envs.reset([seed, 1])
    while left.any():
        if video:
            frame = envs.envs[0].render()
            writer = writer or open_video(video, frame, envs.envs[0].metadata.get("render_fps") or 30)
            writer.write_frame(frame)
        obs = {sense: torch.as_tensor(values, device=device) for sense, values in envs.obs.items()}
        actions, latent = agent.act(obs, latent, torch.as_tensor(first, device=device), generator)
        if video and len(seen) < DREAM:
            seen.append(({sense: values[:1].clone() for sense, values in obs.items()}, actions[:1]))
        rows = np.flatnonzero(left)
        envs.step(actions[rows].tolist(), rows)
        first[:] = [i in envs.finished for i in range(len(first))]
        for i, episode in sorted(envs.finished.items()):
            results.append(episode)
            left[i] -= 1
        if writer and 0 in envs.finished:
            writer.close()
            if envs.image:
                draw_dream(agent, seen, video.with_stem(f"{video.stem}-dream"), envs.envs[0].metadata["render_fps"])
            video = writer = None
    figures = {"eval/episodes": float(episodes)}
    for name in results[0]:
        column = np.array([episode[name] for episode in results])
        name = name.removeprefix("episodic_")
        figures |= {f"eval/{name}_{f}": float(getattr(column, f)()) for f in ("mean", "std", "max")}
    if "eval/flag_mean" in figures:
        figures["eval/flag_rate"] = figures["eval/flag_mean"]
    return figures


def draw_dream(agent: Agent, seen: list, path: Path, fps: float, context: int = 8) -> None:
    """A video of the steps seen, three rows of 256 x 256: the truth, what the model makes of it, grey plus half their
    difference. After `context` steps the model sees nothing more."""
    obs, actions = zip(*seen, strict=True)
    obs = {sense: torch.cat([o[sense] for o in obs]) for sense in obs[0]}
    model = dream(agent, obs, torch.cat(actions), context)
    truth = obs["image"] / 255
    frames = torch.cat([truth, model, (model - truth + 1) / 2], 1)[..., [0] * 3 if truth.shape[-1] < 3 else [0, 1, 2]]
    frames = (frames * 255).to(torch.uint8).repeat_interleave(4, 1).repeat_interleave(4, 2).cpu().numpy()
    writer = open_video(path, frames[0], fps)
    for frame in frames:
        writer.write_frame(frame)
    writer.close()


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
    elif args.cuda and not (args.compile or args.evaluate):
        print("--compile would make updates on this device many times faster, after minutes of compiling.")
    torch.manual_seed(args.seed)
    envs = Envs(args.env, 1 if args.evaluate else args.num_envs, args.num_threads)
    flat = [space for space in envs.envs[0].vectors.values() if space.dtype == np.uint8 and len(space.shape) > 1]
    if flat:
        print(f"--env {args.env}: a CNN sees only uint8 images of height x width x 1 to 4; {flat[0]} goes to an MLP.")
    if args.capture_video and "rgb_array" not in envs.envs[0].metadata.get("render_modes", []):
        print(f"--capture-video: {args.env} cannot draw itself; going on without videos.")
        args.capture_video = False
    torch.backends.cudnn.benchmark = True  # of a GPU's convolution algorithms the first calls find the fastest
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    dtype = torch.bfloat16 if fast else torch.float32
    senses = {sense: values.shape[1:] for sense, values in envs.obs.items()}
    agent = Agent(senses, envs.num_actions, envs.discrete, args, dtype)
    agent.to(device, memory_format=torch.channels_last if envs.image else torch.preserve_format)
    if device.type == "cpu" and sys.platform == "linux":  # let malloc keep large blocks: new ones cost a fault a page
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            if mallopt(-3, 2**30) or mallopt(-3, 2**25):  # M_MMAP_THRESHOLD; older ones take no more than 32 MB
                mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if args.compile:
        for name in ("torch._inductor", "torch.utils.cpp_extension"):
            logging.getLogger(name).setLevel(logging.ERROR)  # what the compiler says is to its developers
        warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo)")
        compile_parts(agent)
    return device, envs, agent


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while there is nothing to save, Ctrl-C simply ends the script
    args, state = parse()
    device, envs, agent = set_up(args)
    if args.evaluate:
        restore(agent, state["agent"], args)
        return play(agent, args)
    trained = [p for p in agent.parameters() if p.requires_grad]
    optimizer = LaProp(trained, args.learning_rate, args.warmup, args.agc)
    replay = Replay(args, envs, agent, device)
    print(f"The replay takes up to {replay.memory}.")
    learn_threads = torch.get_num_threads() if device.type == "cpu" else 1
    to_device = functools.partial(torch.as_tensor, device=device)
    learn = functools.partial(update, agent, optimizer, args, replay.columns)
    learn = Captured(learn) if args.compile and device.type == "cuda" else learn
    rewards = np.zeros(args.num_envs, np.float32)
    first, last, terminal = np.zeros((3, args.num_envs), bool)

    with Run(args, state, device, learn_threads, agent=agent, optimizer=optimizer, replay=replay) as run:
        # flags win over what a checkpoint brought
        optimizer.param_groups[0] |= {"lr": args.learning_rate, "warmup": args.warmup, "agc": args.agc}
        envs.reset([args.seed, 0, run.global_step])  # a resumed run meets new episodes
        latent, first[:] = agent.initial(args.num_envs), True
        while run.global_step < args.last_step:
            # act: one record of every environment; an episode's last observation is one, the next one's first another
            obs = {}
            for sense, values in envs.obs.items():
                obs[sense] = values.copy()
                obs[sense][last] = envs.final_obs[sense][last]
            actions, latent = agent.act({s: to_device(o) for s, o in obs.items()}, latent, to_device(first))
            actions[to_device(last)] = 0
            stoch = latent[1].unflatten(-1, (LATENTS, -1)).argmax(-1)
            record = {**obs, "reward": rewards, "first": first, "last": last, "terminal": terminal}
            replay.add(record | {"action": actions, "deter": latent[0], "stoch": stoch})
            rows = np.flatnonzero(~last)
            moves = actions[rows].tolist()

            # learn: a GPU works on the updates while the environments step
            ending = run.global_step + len(rows) >= args.last_step
            updates = max(int(replay.owed), int(ending)) if replay.ready else 0
            if updates or ending:
                run.begin_update()
                windows = [tuple(map(to_device, replay.sample())) for _ in range(updates)]  # a copy waits for the GPU
                figures = [learn(*window) for window in windows]
                replay.owed -= updates
            try:
                envs.step(moves, rows)
                run.step(len(rows), envs.finished)
            finally:  # an environment that raises shall not cost an update
                if updates or ending:  # a resumed run can end before its replay is ready again
                    names = figures[0] if figures else ()
                    run.end_update({name: sum(f[name] for f in figures) / updates for name in names})
            if not (updates or ending):
                run.mark()
            first, rewards = last, np.where(last, 0, envs.rewards)
            last, terminal = ~first & (envs.terminated | envs.truncated), ~first & envs.terminated


if __name__ == "__main__":
    main()
