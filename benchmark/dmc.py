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
#     "dm-control>=1.0.50,<2",
#     "mujoco>=3.17,<4",
# ]
# [tool.uv]
# override-dependencies = ["labmaze; python_version < '3.13'"]
# ///
r"""DreamerV3 on the DeepMind Control Suite, where its authors have published their curves.

    uv run benchmark/dmc.py --env dmc/cartpole-swingup-v0 --num-envs 4 --train-ratio 512 --total-timesteps 30000 \
        --batch-size 16 --batch-length 64 --learning-rate 1.6e-4 --warmup 1000 --ent-coef 3e-4

All flags are those of dreamerv3.py. The task is what the published runs saw: positions and velocities as vectors, each
action for two of the simulator's steps, 500 actions to an episode, which a time limit cuts. Nothing can be drawn, so
--capture-video does not work. (labmaze, which dm-control asks for, serves its mazes only and has no wheel for Python
3.13; the last line of the metadata leaves it out.)
"""

import importlib.util
import os
from pathlib import Path

import gymnasium as gym
import numpy as np

os.environ.setdefault("MUJOCO_GL", "disabled")  # nothing is drawn; without it, a machine without a screen complains
from dm_control import suite


class Task(gym.Env):
    """A task of the Control Suite: observations as named vectors, rewards summed over the repeated steps."""

    def __init__(self, domain: str, task: str, repeat: int = 2):
        self.domain, self.task, self.repeat = domain, task, repeat
        self.simulator = suite.load(domain, task, task_kwargs={"random": 0})
        action, senses = self.simulator.action_spec(), self.simulator.observation_spec()
        self.action_space = gym.spaces.Box(action.minimum, action.maximum, action.shape, np.float64)
        spaces = {key: gym.spaces.Box(-np.inf, np.inf, spec.shape, np.float64) for key, spec in senses.items()}
        self.observation_space = gym.spaces.Dict(spaces)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.simulator.task.random.seed(seed)
        return self.sense(self.simulator.reset()), {}

    def sense(self, moment) -> dict:
        return {key: np.array(value, np.float64) for key, value in moment.observation.items()}

    def step(self, action):
        total = 0.0
        for _ in range(self.repeat):
            moment = self.simulator.step(action)
            total += moment.reward
            if moment.last():
                break
        ended = moment.last() and moment.discount == 0
        return self.sense(moment), total, ended, moment.last() and not ended, {}


for domain, task in suite.ALL_TASKS:
    gym.register(f"dmc/{domain}-{task}-v0", Task, kwargs={"domain": domain, "task": task})


if __name__ == "__main__":
    path = Path(__file__).parent.parent / "dreamerv3.py"
    spec = importlib.util.spec_from_file_location("dreamerv3", path)
    dreamerv3 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dreamerv3)
    dreamerv3.main()
