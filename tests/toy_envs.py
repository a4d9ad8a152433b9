"""Environments in which every number of a transition says where it came from: tests.toy_envs:Ledger-v0 and so on."""

import gymnasium as gym
import numpy as np

RESET = -1000.0


class Ledger(gym.Env):
    """Observations (RESET or 0, episode, step), rewards 100 * episode + step, actions ignored.

    Without `length`, episode e takes 1 + 3 e mod 7 steps; it is terminated if e mod 3 is 0, truncated if 1, both if 2.
    The seed chooses the first episode, so that environments side by side get out of step. Every observation is the same
    array, written over.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length=None):
        self.fixed_length, self.obs = length, np.zeros(3, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.episode = seed % 7
        self.episode, self.now = self.episode + 1, 0
        self.length = self.fixed_length or 1 + 3 * self.episode % 7
        self.obs[:] = RESET, self.episode, 0
        return self.obs, {}

    def step(self, action):
        self.now += 1
        over, kind = self.now == self.length, 0 if self.fixed_length else self.episode % 3
        self.obs[:] = 0, self.episode, self.now
        return self.obs, 100.0 * self.episode + self.now, over and kind != 1, over and kind != 0, {}


class Echo(gym.Env):
    """Episodes of five steps; the observation is the action as the environment got it."""

    def __init__(self, action_space):
        self.action_space = action_space
        size = 1 if isinstance(action_space, gym.spaces.Discrete) else action_space.shape[0]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now = 0
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action):
        self.now += 1
        return np.atleast_1d(action).astype(np.float32), 1.0, self.now == 5, False, {}


class Tabular(gym.Env):
    """Two states, two actions, at most three steps: small enough to enumerate."""

    start = np.array([0.6, 0.4])
    #                  state 0: action 0, 1; state 1: action 0, 1
    transition = np.array([[[0.5, 0.3, 0.2], [0.1, 0.4, 0.5]], [[0.3, 0.6, 0.1], [0.2, 0.2, 0.6]]])  # last: the end
    reward = np.array([[1.0, -0.5], [2.0, 0.5]])
    horizon = 3

    observation_space = gym.spaces.Discrete(2)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.choice(2, p=self.start))
        return self.state, {}

    def step(self, action):
        reward = self.reward[self.state, action]
        following = int(self.np_random.choice(3, p=self.transition[self.state, action]))
        self.state = following % 2
        return self.state, reward, following == 2, False, {}


class Large(gym.Env):
    """Observations as large as a picture, which say which of two actions is rewarded."""

    observation_space = gym.spaces.Box(-1, 1, (84 * 84,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.right = int(self.np_random.integers(2))
        return np.full(84 * 84, 2 * self.right - 1, np.float32), {}

    def step(self, action):
        reward = float(action == self.right)
        return self.reset()[0], reward, False, False, {}


BOUNDS = np.array([[-2, 0, -np.inf, -1], [3, 1, np.inf, np.inf]], np.float32)  # two-, two-, un- and half-bounded

gym.register("Ledger-v0", Ledger, max_episode_steps=5)
gym.register("Fixed-v0", Ledger, max_episode_steps=10, kwargs={"length": 4})
gym.register("EchoBox-v0", Echo, max_episode_steps=5, kwargs={"action_space": gym.spaces.Box(*BOUNDS)})
gym.register("EchoDiscrete-v0", Echo, max_episode_steps=5, kwargs={"action_space": gym.spaces.Discrete(3, start=5)})
gym.register("Tabular-v0", Tabular, max_episode_steps=Tabular.horizon)
gym.register("Large-v0", Large, max_episode_steps=20)
