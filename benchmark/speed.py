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
#     "stable-baselines3>=2.9,<3",
# ]
# ///
"""Agent steps per second, learning included, of the scripts beside Stable-Baselines3, all in one run.

    uv run benchmark/speed.py                     # everything, about 12 minutes
    uv run benchmark/speed.py --only CartPole     # what has this word in its name

Every contender runs in a process of its own, one after another, and the whole round is repeated, so that a slow minute
of the machine falls on all of them. Steps per second are counted from the second update on; `start` is the time from
the command to the end of the first update. Both sides have 8 environments x 128 steps, minibatches of 256, 4 epochs,
the same network, and each library's own choice of threads. Run it on a quiet machine: what else runs is part of the
result.
"""

import argparse
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
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARIO = "SuperMarioBros-1-1-v0"
SAME = "--num-envs 8 --num-steps 128 --num-minibatches 4 --update-epochs 4 --eval-every 0 --save-every 0".split()

# name -> (kind, environment, updates to time)
CONTENDERS = {
    "Mario: emulator alone": ("floor", MARIO, 0),
    "Mario: ppo.py": ("ppo.py", MARIO, 8),
    "Mario: SB3 PPO, Gymnasium's wrappers": ("sb3", MARIO, 4),
    "Mario: SB3 PPO, our preprocessing": ("sb3 ours", MARIO, 6),
    "CartPole: ppo.py": ("ppo.py", "CartPole-v1", 40),
    "CartPole: SB3 PPO": ("sb3", "CartPole-v1", 20),
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


def ours(script: str, env: str, updates: int) -> tuple[float, float]:
    """Run a script as a user does -> steps/s from the second update on, seconds to the first."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--env", env, *SAME, "--total-timesteps", str(1024 * (updates + 1)), "--run-dir", f"{folder}/run"]
        began = time.time()
        process = subprocess.Popen(
            [sys.executable, ROOT / script, *flags, "--eval-episodes", "1"], stdout=subprocess.DEVNULL
        )
        metrics, first = Path(folder) / "run" / "metrics.jsonl", None
        while process.poll() is None and first is None:
            time.sleep(0.02)
            if metrics.exists() and "charts/SPS" in metrics.read_text():
                first = time.time() - began
        assert process.wait() == 0, f"{script} failed"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rates = [row["charts/SPS"] for row in rows if "charts/SPS" in row][1:]
    return statistics.harmonic_mean(rates), first


def sb3(kind: str, env_id: str, updates: int) -> None:
    """In a process of its own: train Stable-Baselines3's PPO and print the times at which its rollouts began."""
    sys.path.insert(0, str(ROOT))
    import gymnasium as gym
    from gym_super_mario_bros.actions import SIMPLE_MOVEMENT
    from nes_py.wrappers import JoypadSpace
    from stable_baselines3 import PPO
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
            print(time.time(), flush=True)

        def _on_step(self) -> bool:
            return True

    image = env_id == MARIO
    make = with_ours if kind == "sb3 ours" else standard if image else env_id
    envs = make_vec_env(make, 8, vec_env_cls=SubprocVecEnv if image else DummyVecEnv)
    policy = "CnnPolicy" if image else "MlpPolicy"
    model = PPO(policy, envs, n_steps=128, batch_size=256, n_epochs=4, ent_coef=0.01, device="cpu")
    model.learn(1024 * (updates + 1), callback=Clock())
    print(time.time(), flush=True)


def peer(kind: str, env: str, updates: int) -> tuple[float, float]:
    began = time.time()
    command = [sys.executable, __file__, "--worker", kind, env, str(updates)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    times = [float(line) for line in output.splitlines()]
    return 1024 * updates / (times[-1] - times[1]), times[1] - began


def measure(kind: str, env: str, updates: int) -> tuple[float, float]:
    if kind == "floor":
        return floor(), 0.0
    return ours(kind, env, updates) if kind.endswith(".py") else peer(kind, env, updates)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--only", default="", help="run only what has this word in its name")
    parser.add_argument("--json", help="write all figures to this file as well")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return sb3(args.worker[0], args.worker[1], int(args.worker[2]))
    chosen = {name: contender for name, contender in CONTENDERS.items() if args.only in name}
    if not chosen:
        parser.error(f"--only {args.only} matches none of: {', '.join(CONTENDERS)}")
    machine = {"cpu": processor(), "cores": os.cpu_count(), "load before": os.getloadavg()[0]}
    results = {name: [] for name in chosen}
    for repeat in range(args.repeats):
        for name, contender in chosen.items():
            results[name].append(measure(*contender))
            print(f"round {repeat + 1}: {name}: {results[name][-1][0]:,.0f} steps/s", file=sys.stderr)

    packages = ("torch", "gymnasium", "nes-py", "stable-baselines3")
    versions = {"python": platform.python_version()} | {package: version(package) for package in packages}
    print(f"{machine['cores']} x {machine['cpu']}, load before the first round: {machine['load before']:.1f}")
    print(", ".join(f"{name} {number}" for name, number in versions.items()) + "\n")
    print("| agent steps/s, learning included | median | lowest - highest | ppo.py is | start (s) |")
    print("|---|---|---|---|---|")
    median = {name: statistics.median(rate for rate, _ in rates) for name, rates in results.items()}
    for name, rates in results.items():
        low, high = min(rate for rate, _ in rates), max(rate for rate, _ in rates)
        mine = median.get(name.split(":")[0] + ": ppo.py")
        ratio = f"{mine / median[name]:.2f} x" if mine and not name.endswith("ppo.py") else ""
        start = statistics.median(start for _, start in rates)
        spread, start = f"{low:,.0f} - {high:,.0f}", f"{start:.1f}" if start else ""
        print(f"| {name} | {median[name]:,.0f} | {spread} | {ratio} | {start} |")
    if args.json:
        figures = {"machine": machine, "versions": versions, "results": results}
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
