"""Environments with known answers. `--env probes:Id-v0` makes each script meet them as it meets any other."""

import gym_super_mario_bros  # noqa: F401, makes the Mario ids known
import gymnasium as gym
import numpy as np
from nes_py.wrappers import JoypadSpace

DISCRETE = gym.spaces.Discrete(2)


class Constant(gym.Env):
    """Reward 1 at every step, one observation, for ever: V = 1 / (1 - gamma). The time limit only cuts it."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,), np.float32), DISCRETE
    terminates_after = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, self.steps == self.terminates_after, False, {}


class OneStep(Constant):
    """Reward 1, then the end: V = 1."""

    terminates_after = 1


class Delayed(Constant):
    """Observation 0, then 1; the second step pays 1 and ends: V(1) = 1, V(0) = gamma."""

    def step(self, action):
        self.steps += 1
        return np.ones(1, np.float32), float(self.steps == 2), self.steps == 2, False, {}


class Copycat(gym.Env):
    """One step; reward 1 where the action is the observation, else -1: V = 1 for a policy that looks."""

    observation_space, action_space, one = gym.spaces.Box(0, 1, (1,), np.float32), DISCRETE, 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.bit = int(self.np_random.integers(2))
        return np.full(1, self.bit * self.one, np.float32), {}

    def step(self, action):
        reward = 1.0 if action == self.bit else -1.0
        return np.full(1, self.bit * self.one, np.float32), reward, True, False, {}


class Loud(Copycat):
    """The same with observations that are far apart. A world model pays for what it remembers: 0 or 1 is hardly worth
    its KL divergence, as not knowing it costs symlog(1)^2 / 4 = 0.12; 0 or 20 costs 2.3."""

    observation_space, one = gym.spaces.Box(0, 20, (1,), np.float32), 20


class Diary(gym.Env):
    """The observation is (episode, step). Episode e lasts 2 + e % 5 steps; odd ones terminate, even ones are cut."""

    observation_space, action_space = gym.spaces.Box(0, np.inf, (2,), np.float32), DISCRETE

    episode = -1

    def obs(self):
        return np.array([self.episode, self.steps], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.steps = 0
        return self.obs(), {}

    def step(self, action):
        self.steps += 1
        over, odd = self.steps == 2 + self.episode % 5, self.episode % 2 == 1
        return self.obs(), self.episode + self.steps / 100, over and odd, over and not odd, {}


class Clockwork(Diary):
    """Every episode lasts 8 steps and looks the same, whatever the seed; the reward depends on the action."""

    def obs(self):
        return np.array([0, self.steps], np.float32)

    def step(self, action):
        self.steps += 1
        return self.obs(), float(action == self.steps % 2), self.steps == 8, False, {}


class Screen(gym.Env):
    """An image whose every pixel is the number of frames shown, always in the same memory; 58 frames an episode."""

    observation_space, action_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8), DISCRETE
    metadata = {"render_modes": ["rgb_array"], "render_fps": 60}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode, self.screen = render_mode, np.zeros((96, 96, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.screen[:] = 0
        return self.screen, {}

    def step(self, action):
        self.screen += 1
        return self.screen, 1.0, bool(self.screen[0, 0, 0] == 58), False, {}

    def render(self):
        return self.screen


class CutScreen(Screen):
    """The same with a time limit where that ends."""

    def step(self, action):
        obs, reward, over, _, info = super().step(action)
        return obs, reward, False, over, info


class AtariEnv(Screen):
    """Repeats actions itself, as ale_py's environments do unless told not to; with "ram" it shows no images. On odd
    frames, which the 4th never is, there is something on the right."""

    def __init__(self, frameskip=4, obs_type="rgb"):
        super().__init__()
        self.frameskip = frameskip
        if obs_type == "ram":
            self.observation_space = gym.spaces.Box(0, 255, (128,), np.uint8)

    def step(self, action):
        image, *rest = super().step(action)
        image = image.copy()
        image[:, 48:] = 200 * (image[:, 48:] % 2)
        return image, *rest


class TwoLengths(gym.Env):
    """An episode lasts 1 or 40 steps, with the same probability: 20.5 on average."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,), np.float32), DISCRETE

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 1 if self.np_random.random() < 0.5 else 40
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}


class TwoCuts(TwoLengths):
    """The same, cut by time limits instead."""

    def step(self, action):
        obs, reward, over, _, info = super().step(action)
        return obs, reward, False, over, info


class Breaks(Constant):
    """Raises at its 100th step."""

    def step(self, action):
        if self.steps == 99:
            raise OSError("the joystick is gone")
        return super().step(action)


class NotANumber(Constant):
    """Pays NaN from its 100th step on."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward if self.steps < 100 else np.nan, terminated, truncated, info


class Both(Constant):
    """Terminates at step 5, where the time limit falls too."""

    terminates_after = 5


class BoxActions(Constant):
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)


class DictObs(Constant):
    observation_space = gym.spaces.Dict({"x": gym.spaces.Box(-1, 1, (1,), np.float32)})

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return {"x": obs}, info

    def step(self, action):
        obs, *rest = super().step(action)
        return {"x": obs}, *rest


class ManyActions(Constant):
    action_space = gym.spaces.MultiBinary(2)


class Words(Constant):
    observation_space = gym.spaces.Sequence(gym.spaces.Discrete(9))


class FromOne(Constant):
    """Actions 1 and 2, not 0 and 1."""

    action_space = gym.spaces.Discrete(2, start=1)

    def step(self, action):
        assert action in (1, 2), action
        return super().step(action)


class Scalar(Constant):
    """A number without axes is observed."""

    observation_space = gym.spaces.Box(-1, 1, (), np.float32)

    def reset(self, **kwargs):
        return np.float32(0.5), super().reset(**kwargs)[1]

    def step(self, action):
        return np.float32(0.5), *super().step(action)[1:]


class ByteActions(Constant):
    action_space = gym.spaces.Box(0, 255, (1,), np.uint8)

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action)


class UnevenActions(Constant):
    """Bounds that rounding leaves, and one that is not there."""

    action_space = gym.spaces.Box(np.float32([-3.6, 0]), np.float32([2.2, np.inf]))

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action)


def dark_mario(render_mode=None):
    """Mario without light and with two buttons of somebody else's choice."""
    env = gym.make("SuperMarioBros-1-1-v0", render_mode=render_mode, disable_env_checker=True)
    env = gym.wrappers.TransformObservation(env, np.zeros_like, env.observation_space)
    return JoypadSpace(env, [["NOOP"], ["right"]])


gym.register("DarkMario-v0", entry_point=dark_mario)
gym.register("Atari-v0", entry_point="probes:AtariEnv", kwargs={"frameskip": 4})
gym.register("Atari-ram-v0", entry_point="probes:AtariEnv", kwargs={"frameskip": 4, "obs_type": "ram"})
for probe, limit in {
    Constant: 5, OneStep: None, Delayed: None, Copycat: None, Loud: None, Diary: None, Clockwork: None, Screen: None,
    TwoLengths: None, TwoCuts: None, CutScreen: None, Breaks: 200, NotANumber: 200, Both: 5, BoxActions: 5,
    DictObs: 5, FromOne: 5, ManyActions: 5, Words: 5, Scalar: 5, ByteActions: 5, UnevenActions: 5,
}.items():  # fmt: skip
    gym.register(f"{probe.__name__}-v0", entry_point=probe, max_episode_steps=limit)
