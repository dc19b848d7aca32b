r"""A game of small things: can a model of the world see a ball of 4 x 4 pixels?

    PYTHONPATH=benchmark uv run dreamerv3.py --env catch:Catch-v0 --total-timesteps 40000 --num-envs 8 --batch-size 8 \
        --batch-length 32 --learning-rate 3e-4 --warmup 100 --ent-coef 3e-4 --eval-every 10000 --eval-episodes 100 \
        --capture-video

A ball falls from the top of a dark screen, 15 agent steps long; a paddle, three times as wide, moves below it. Catching
the ball pays 1, missing it -1. In the video of the dream look for the ball.
"""

import gymnasium as gym
import numpy as np

CELLS, SIZE = 16, 4  # the screen is so many cells wide and high; a cell is so many pixels


class Catch(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 60}  # noqa: RUF012
    observation_space = gym.spaces.Box(0, 255, (CELLS * SIZE, CELLS * SIZE, 3), np.uint8)
    action_space = gym.spaces.Discrete(3)  # left, stay, right

    def __init__(self, render_mode: str | None = None, frames: int = 4):
        self.render_mode = render_mode
        self.frames = frames  # things move once in so many: as often as the scripts repeat an action

    def render(self) -> np.ndarray:
        cells = np.full((CELLS, CELLS, 3), 60, np.uint8)
        cells[self.y, self.x] = 200, 180, 40
        cells[-1, max(0, self.paddle - 1) : self.paddle + 2] = 40, 200, 200
        return cells.repeat(SIZE, 0).repeat(SIZE, 1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.paddle = int(self.np_random.integers(CELLS)), int(self.np_random.integers(CELLS))
        self.y = self.frame = 0
        return self.render(), {}

    def step(self, action):
        self.frame += 1
        if self.frame % self.frames != 1 % self.frames:
            return self.render(), 0.0, False, False, {}
        self.y += 1
        self.paddle = min(CELLS - 1, max(0, self.paddle + int(action) - 1))
        landed = self.y == CELLS - 1
        paid = (1.0 if abs(self.x - self.paddle) <= 1 else -1.0) if landed else 0.0
        return self.render(), paid, landed, False, {}


gym.register("Catch-v0", entry_point=Catch)
