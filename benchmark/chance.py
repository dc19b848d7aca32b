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
"""What pressing random buttons is worth on Super Mario Bros 1-1: the ground from which every curve on Mario rises.

    uv run benchmark/chance.py                    # some minutes; 16 x 25 episodes -> benchmark/results/chance.json

Every action is drawn uniformly from the seven of SIMPLE_MOVEMENT, every environment plays the same number of episodes.
"""

import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo


def main(num_envs: int = 16, episodes: int = 25, seed: int = 1) -> None:
    envs, rng = ppo.Envs("SuperMarioBros-1-1-v0", num_envs), np.random.default_rng(seed)
    envs.reset(seed)
    left, played, bar = np.full(num_envs, episodes), [], tqdm(total=num_envs * episodes, unit=" episodes")
    while left.any():
        rows = np.flatnonzero(left)
        envs.step(rng.integers(envs.num_actions, size=len(rows)).tolist(), rows)
        for i, episode in sorted(envs.finished.items()):
            played.append(episode)
            left[i] -= 1
            bar.update()
    bar.close()
    path = Path(__file__).parent / "results" / "chance.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, played)) + "\n]\n")
    x = [episode["x_pos"] for episode in played]
    print(f"{len(x)} episodes, mean x {np.mean(x):.0f} +- {np.std(x):.0f}, best {max(x)}: {path}")


if __name__ == "__main__":
    main()
