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
#     "stable-baselines3>=2.9,<3",
#     "sb3-contrib>=2.9,<3",
#     "sheeprl>=0.8.4,<1",
# ]
# ///
"""The scripts beside Stable-Baselines3, sb3-contrib and sheeprl, in one run: agent steps per second with learning
included, and for DreamerV3 gradient steps per second.

    uv run benchmark/speed.py                              # everything, about an hour
    uv run benchmark/speed.py --only CartPole              # what has this word in its name
    uv run benchmark/speed.py --only Dreamer --cuda        # DreamerV3, all sizes, on a GPU

Every contender runs in a process of its own, one after another, and the whole round is repeated, so that a slow minute
of the machine falls on all of them. Steps per second are counted behind the first 1,024 steps; `start` is the time from
the command until these have been played and learnt from. Both sides have 8 environments, the same network and the same
amount of learning per step (FLAGS and SB3), and each library's own choice of threads; the rows of "default flags" are
the scripts as a user starts them, beside nobody. DreamerV3's update replays 16 x
64 steps on both sides, with all cores; the first two are not counted. Run it on a quiet machine: what else runs is part
of the result.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARIO = "SuperMarioBros-1-1-v0"
COMMON = "--eval-every 0 --save-every 0 --eval-episodes 1 --log-every 512".split()
FLAGS = {
    "reinforce.py": "--num-envs 8",
    "reinforce_baseline.py": "--num-envs 8",
    "actor_critic.py": "--num-envs 1",
    "a2c.py": "--num-envs 8 --num-steps 5",
    "trpo.py": "--num-envs 8 --num-steps 128 --cg-iterations 15 --fisher-every 1"
    " --value-epochs 10 --value-batch-size 128",
    "ppo.py": "--num-envs 8 --num-steps 128 --num-minibatches 4 --update-epochs 4",
}
SB3 = {
    "PPO": {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "ent_coef": 0.01},
    "A2C": {"n_steps": 5, "ent_coef": 0.01},
    "TRPO": {"n_steps": 128, "batch_size": 128, "n_critic_updates": 10, "cg_max_steps": 15},
}

# name -> (kind, environment, steps to time); a script's row is compared with the rows of its group, before the colon
CONTENDERS = {
    "Mario, PPO: emulator alone": ("floor", MARIO, 0),
    "Mario, PPO: ppo.py": ("ppo.py", MARIO, 6144),
    "Mario, PPO: SB3, Gymnasium's wrappers": ("sb3 PPO", MARIO, 4096),
    "Mario, PPO: SB3, our preprocessing": ("ours PPO", MARIO, 4096),
    "Mario, A2C: a2c.py": ("a2c.py", MARIO, 4096),
    "Mario, A2C: SB3, Gymnasium's wrappers": ("sb3 A2C", MARIO, 2048),
    "Mario, A2C: SB3, our preprocessing": ("ours A2C", MARIO, 2048),
    "Mario, TRPO: trpo.py": ("trpo.py", MARIO, 2048),
    "Mario, TRPO: sb3-contrib, Gymnasium's wrappers": ("sb3 TRPO", MARIO, 2048),
    "Mario: actor_critic.py": ("actor_critic.py", MARIO, 1024),
    "Mario: reinforce_baseline.py": ("reinforce_baseline.py", MARIO, 4096),
    "Mario: reinforce.py": ("reinforce.py", MARIO, 4096),
    "CartPole, PPO: ppo.py": ("ppo.py", "CartPole-v1", 40960),
    "CartPole, PPO: SB3": ("sb3 PPO", "CartPole-v1", 20480),
    "CartPole, A2C: a2c.py": ("a2c.py", "CartPole-v1", 40960),
    "CartPole, A2C: SB3": ("sb3 A2C", "CartPole-v1", 20480),
    "CartPole, TRPO: trpo.py": ("trpo.py", "CartPole-v1", 40960),
    "CartPole, TRPO: sb3-contrib": ("sb3 TRPO", "CartPole-v1", 20480),
    "CartPole: actor_critic.py": ("actor_critic.py", "CartPole-v1", 4096),
    "CartPole: reinforce_baseline.py": ("reinforce_baseline.py", "CartPole-v1", 40960),
    "CartPole: reinforce.py": ("reinforce.py", "CartPole-v1", 40960),
    "Mario, default flags: reinforce.py": ("default reinforce.py", MARIO, 8192),
    "Mario, default flags: reinforce_baseline.py": ("default reinforce_baseline.py", MARIO, 8192),
    "Mario, default flags: actor_critic.py": ("default actor_critic.py", MARIO, 2048),
    "Mario, default flags: a2c.py": ("default a2c.py", MARIO, 8192),
    "Mario, default flags: trpo.py": ("default trpo.py", MARIO, 8192),
    "Mario, default flags: ppo.py": ("default ppo.py", MARIO, 11264),
    "Mario, default flags: dreamerv3.py": ("default dreamerv3.py", MARIO, 2048),
}

# name -> (kind, size, what is observed, gradient steps to time)
UPDATES = {
    "Dreamer 1m, vectors: dreamerv3.py": ("dreamerv3.py", "1m", "vector", 20),
    "Dreamer 1m, vectors: sheeprl": ("sheeprl", "1M", "vector", 20),
    "Dreamer 1m, images: dreamerv3.py": ("dreamerv3.py", "1m", "image", 10),
    "Dreamer 1m, images: sheeprl": ("sheeprl", "1M", "image", 10),
    "Dreamer 12m, images: dreamerv3.py": ("dreamerv3.py", "12m", "image", 3),
    "Dreamer 12m, images: sheeprl": ("sheeprl", "12M", "image", 3),
}
ON_A_GPU = {  # instead of these
    f"Dreamer {size}, images: {name}": (kind, size, "image", 100)
    for size in ("12m", "50m", "200m")
    for name, kind in (("eager", "dreamerv3.py"), ("--compile", "dreamerv3.py --compile"))
}


def floor(seconds: float = 10.0) -> float:
    """Frames per second of one emulator per core, all at once, under random play, divided by the 4 frames of a step."""
    import gym_super_mario_bros  # noqa: F401
    import gymnasium as gym

    counts = []

    def play(seed: int) -> None:
        env, rng, frames = gym.make(MARIO), random.Random(seed), 0
        env.reset()
        emulator, end = env.unwrapped, time.perf_counter() + seconds
        while time.perf_counter() < end:
            action = rng.choice((0, 128, 129, 130, 131, 1, 64))  # the bytes of SIMPLE_MOVEMENT
            for _ in range(4):
                emulator._frame_advance(action)
            frames += 4
            if emulator._is_dying or emulator._is_dead:
                env.reset()
        counts.append(frames)

    players = [threading.Thread(target=play, args=(i,)) for i in range(os.cpu_count())]
    for player in players:
        player.start()
    for player in players:
        player.join()
    return sum(counts) / seconds / 4


def rate(clock: list[tuple[int, float]]) -> tuple[float, float]:
    """(steps, time) whenever both were known -> steps/s behind the first 1,024 steps, the time at which these ended."""
    first = next(point for point in clock if point[0] >= 1024)
    return (clock[-1][0] - first[0]) / (clock[-1][1] - first[1]), first[1]


def ours(kind: str, env: str, steps: int) -> tuple[float, float]:
    """Run a script as a user does -> steps/s, seconds from the command to the end of the first 1,024 steps."""
    default, _, script = kind.rpartition(" ")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flags = ["--env", env, *COMMON, "--total-timesteps", str(1024 + steps)]
        flags += [] if default else FLAGS[script].split()
        began = time.time()
        subprocess.run([sys.executable, ROOT / script, *flags, "--run-dir", run], stdout=subprocess.DEVNULL, check=True)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        started = (run / "config.json").stat().st_mtime - began  # the clock of the rows begins right after it
    per_second, first = rate([(row["global_step"], row["time"]) for row in rows if "charts/SPS" in row])
    return per_second, started + first


def sb3(kind: str, env_id: str, steps: int) -> None:
    """In a process of its own: train the peer's algorithm and print steps and time whenever a rollout begins."""
    sys.path.insert(0, str(ROOT))
    import gymnasium as gym
    from gym_super_mario_bros.actions import SIMPLE_MOVEMENT
    from nes_py.wrappers import JoypadSpace
    from sb3_contrib import TRPO
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

    def standard() -> gym.Env:
        env = JoypadSpace(gym.make(f"gym_super_mario_bros:{env_id}"), SIMPLE_MOVEMENT)
        env = gym.wrappers.MaxAndSkipObservation(env, skip=4)
        env = gym.wrappers.GrayscaleObservation(env)
        env = gym.wrappers.ResizeObservation(env, (84, 84))
        return gym.wrappers.FrameStackObservation(env, 4)

    def with_ours() -> gym.Env:
        from ppo import make_env

        return make_env(env_id)

    class Clock(BaseCallback):
        def _on_rollout_start(self) -> None:
            print(self.num_timesteps, time.time(), flush=True)

        def _on_step(self) -> bool:
            return True

    image = env_id == MARIO
    preprocessing, name = kind.split()
    make = with_ours if preprocessing == "ours" else standard if image else env_id
    envs = make_vec_env(make, 8, vec_env_cls=SubprocVecEnv if image else DummyVecEnv)
    policy = "CnnPolicy" if image else "MlpPolicy"
    model = {"PPO": PPO, "A2C": A2C, "TRPO": TRPO}[name](policy, envs, **SB3[name], device="cpu")
    model.learn(1024 + steps, callback=Clock())
    print(model.num_timesteps, time.time(), flush=True)


def peer(kind: str, env: str, steps: int) -> tuple[float, float]:
    began = time.time()
    command = [sys.executable, __file__, "--worker", kind, env, str(steps)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in output.splitlines()]
    return rate([(int(line[0]), float(line[1]) - began) for line in lines])


def measure(kind: str, env: str, steps: int) -> tuple[float, float]:
    if kind == "floor":
        return floor(), 0.0
    return ours(kind, env, steps) if kind.endswith(".py") else peer(kind, env, steps)


def dreamer(kind: str, size: str, sense: str, steps: str, cuda: str) -> None:
    """In a process of its own: print the time after every gradient step, beginning with the end of the second."""
    if kind == "sheeprl":
        import sheeprl.algos.dreamer_v3_5.dreamer_v3_5 as algorithm
        from sheeprl.cli import run

        train, calls = algorithm.train, []

        def timed(*args, **kwargs):
            result = train(*args, **kwargs)
            calls.append(time.time())
            if len(calls) == 2 + int(steps):
                tell([str(t) for t in calls[1:]])
                os._exit(0)
            return result

        algorithm.train = timed
        space = "env=gym env.id=CartPole-v1 algo.mlp_keys.encoder=[state] algo.cnn_keys.encoder=[]"
        if sense == "image":
            space = "env=dummy env.id=discrete_dummy algo.cnn_keys.encoder=[rgb] algo.mlp_keys.encoder=[]"
        flags = (
            f"exp=dreamer_v3_5 algo=dreamer_v3_5_{size} {space} env.num_envs=16 env.sync_env=True algo.replay_ratio=1"
        )
        flags += " fabric.accelerator=cpu fabric.precision=bf16-mixed"
        flags += f" num_threads={os.cpu_count()} buffer.size=50000 buffer.memmap=False metric.log_level=0"
        flags += " checkpoint.save_last=False checkpoint.every=0 algo.run_test=False env.capture_video=False"
        sys.argv[1:] = flags.split()
        return run()

    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch

    import dreamerv3

    env = MARIO if sense == "image" else "CartPole-v1"
    flags = {"env": env, "size": size, "cuda": cuda == "cuda", "compile": "--compile" in kind, "run_dir": "."}
    args = dreamerv3.Args(total_timesteps=4096, batch_size=16, batch_length=64, **flags)
    device, envs, agent = dreamerv3.set_up(args)
    trained = [p for p in agent.parameters() if p.requires_grad]
    optimizer = dreamerv3.LaProp(trained, args.learning_rate, args.warmup, args.agc)
    replay = dreamerv3.Replay(args, envs, agent, device)
    envs.reset(1)
    none, stoch = np.zeros(args.num_envs, bool), torch.zeros(args.num_envs, dreamerv3.LATENTS)
    for _ in range(args.ready_at):
        obs = {name: torch.as_tensor(values, device=device) for name, values in envs.obs.items()}
        action, latent = agent.act(obs, agent.initial(args.num_envs), torch.as_tensor(none, device=device))
        record = {**envs.obs, "reward": envs.rewards, "first": none, "last": none, "terminal": none}
        replay.add(record | {"action": action, "deter": latent[0], "stoch": stoch})

    def learn(rows, streams):
        return dreamerv3.update(agent, optimizer, args, replay.columns, rows, streams)

    learn = dreamerv3.Captured(learn) if args.compile and device.type == "cuda" else learn
    times = []
    for step in range(5 + int(steps) if device.type == "cuda" else 2 + int(steps)):
        learn(*(index.to(device) for index in replay.sample()))
        if device.type == "cuda" and step in (4, 4 + int(steps)):
            torch.cuda.synchronize()
        times.append(time.time())
    memory = torch.cuda.max_memory_reserved() if device.type == "cuda" else None
    tell([str(t) for t in times[-1 - int(steps) :]], memory)


def tell(times: list[str], memory: int | None = None) -> None:
    """Times of a worker and the memory that it took, in bytes."""
    import resource

    memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("times", memory, *times, flush=True)


def gradient_steps(kind: str, size: str, sense: str, steps: int, cuda: bool) -> tuple[float, float, float]:
    """-> gradient steps/s, gigabytes, seconds from the command until the first can be counted."""
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--dreamer", kind, size, sense, str(steps), "cuda" if cuda else "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    told = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("times ")]
    if not told:
        raise RuntimeError(f"{kind} {size}: {done.stderr[-2000:]}")
    memory, first, *_, last = map(float, told[0])
    return steps / (last - first), memory / 1e9, first - began


def gradient_table(chosen: dict, repeats: int, cuda: bool) -> dict:
    results = {name: [] for name in chosen}
    for repeat in range(repeats):
        for name, contender in chosen.items():
            results[name].append(gradient_steps(*contender, cuda))
            print(f"round {repeat + 1}: {name}: {results[name][-1][0]:.2f} gradient steps/s", file=sys.stderr)
    print("\n| gradient steps/s, batch 16 x 64 | median | lowest - highest | the script is | memory (GB) | start (s) |")
    print("|---|---|---|---|---|---|")
    for name, rounds in results.items():
        speed, memory, start = (statistics.median(column) for column in zip(*rounds, strict=True))
        speeds, mine = [r[0] for r in rounds], name.split(":")[0] + ": dreamerv3.py"
        peer = mine in results and name != mine
        ratio = f"{statistics.median(r[0] for r in results[mine]) / speed:.2f} x" if peer else ""
        spread = f"{min(speeds):.2f} - {max(speeds):.2f}"
        print(f"| {name} | {speed:.2f} | {spread} | {ratio} | {memory:.1f} | {start:.0f} |")
    return results


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--only", default="", help="run only what has this word in its name")
    parser.add_argument("--json", help="write all figures to this file as well")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--cuda", action="store_true", help="DreamerV3 on a GPU")
    parser.add_argument("--dreamer", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return sb3(args.worker[0], args.worker[1], int(args.worker[2]))
    if args.dreamer:
        return dreamer(*args.dreamer)
    chosen = {name: contender for name, contender in CONTENDERS.items() if args.only in name and not args.cuda}
    updates = ON_A_GPU if args.cuda else UPDATES
    updates = {name: contender for name, contender in updates.items() if args.only in name}
    if not chosen and not updates:
        parser.error(f"--only {args.only} matches none of: {', '.join([*CONTENDERS, *UPDATES])}")
    machine = {"cpu": processor(), "cores": os.cpu_count(), "load before": os.getloadavg()[0]}
    results = {name: [] for name in chosen}
    for repeat in range(args.repeats):
        for name, contender in chosen.items():
            results[name].append(measure(*contender))
            print(f"round {repeat + 1}: {name}: {results[name][-1][0]:,.0f} steps/s", file=sys.stderr)

    packages = ("torch", "gymnasium", "nes-py", "stable-baselines3", "sb3-contrib", "sheeprl")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):  # DreamerV3 on a GPU needs no peer
            versions[package] = version(package)
    print(f"{machine['cores']} x {machine['cpu']}, load before the first round: {machine['load before']:.1f}")
    print(", ".join(f"{name} {number}" for name, number in versions.items()) + "\n")
    if chosen:
        print("| agent steps/s, learning included | median | lowest - highest | the script is | start (s) |")
        print("|---|---|---|---|---|")
    median = {name: statistics.median(rate for rate, _ in rates) for name, rates in results.items()}
    for name, rates in results.items():
        low, high = min(rate for rate, _ in rates), max(rate for rate, _ in rates)
        group = name.split(":")[0]
        mine = [median[other] for other in median if other.startswith(f"{group}:") and other.endswith(".py")]
        ratio = f"{mine[0] / median[name]:.2f} x" if mine and not name.endswith(".py") else ""
        start = statistics.median(start for _, start in rates)
        spread, start = f"{low:,.0f} - {high:,.0f}", f"{start:.1f}" if start else ""
        print(f"| {name} | {median[name]:,.0f} | {spread} | {ratio} | {start} |")
    gradients = gradient_table(updates, args.repeats, args.cuda) if updates else {}
    if args.json:
        figures = {"machine": machine, "versions": versions, "results": results, "gradient steps": gradients}
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
