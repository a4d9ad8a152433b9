"""Small environments with known answers, registered with Gymnasium as tests.toy_envs:Ledger-v0 and so on."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple

RESET = -1000.0


class Ledger(gym.Env):
    """Observations (RESET or 0, episode, step) in an array that is written over, rewards 100 * episode + step, actions
    ignored. The seed chooses the first episode. Without `length`, episode e takes 1 + 3 e mod 7 steps; it is terminated
    if e mod 3 is 0, truncated if 1, both if 2."""

    observation_space = Box(-np.inf, np.inf, (3,))
    action_space = Discrete(2)

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
        size = 1 if isinstance(action_space, Discrete) else action_space.shape[0]
        self.observation_space = Box(-np.inf, np.inf, (size,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now = 0
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action):
        self.now += 1
        return np.atleast_1d(action).astype(np.float32), 1.0, self.now == 5, False, {}


class Probe(gym.Env):
    """Observations -1, 0 or 1; the reward of a step is `reward_fn(obs, action)`, so V and the best policy are known."""

    observation_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, reward_fn, starts=(-1.0, 1.0), length=1, continuous=False):
        # unbounded, for at a bound the reward would be flat
        self.action_space = Box(-np.inf, np.inf, (1,), np.float32) if continuous else Discrete(2)
        self.reward_fn, self.starts, self.length = reward_fn, starts, length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now = 0
        self.obs = np.array([self.np_random.choice(self.starts)], np.float32)
        return self.obs, {}

    def step(self, action):
        reward = float(self.reward_fn(self.obs.item(), np.asarray(action).item()))
        self.now += 1
        if self.length > 1:  # the observation counts the steps, so that the state is known
            self.obs = np.array([float(self.now)], np.float32)
        return self.obs, reward, self.now == self.length, False, {}


class Toy(gym.Env):
    """Random observations of any space, reward 1, 20 steps; refuses actions outside its space."""

    def __init__(self, observation_space=Probe.observation_space, action_space=None):
        self.observation_space, self.action_space = observation_space, action_space or Discrete(2)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.observation_space.seed(seed)
        self.now = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.now += 1
        reward = float("nan") if self.spec.name == "NanReward" and self.now == 15 else 1.0
        return self.observation_space.sample(), reward, self.now == 20, False, {}


BOUNDS = np.array([[-2, 0, -np.inf, -1], [3, 1, np.inf, np.inf]], np.float32)  # two-, two-, un- and half-bounded
PROBES = {
    "LaterReward-v0": {"reward_fn": lambda obs, action: obs == 1, "starts": (0.0,), "length": 2},
    "MatchObs-v0": {"reward_fn": lambda obs, action: action == (obs > 0)},
    "MatchObsContinuous-v0": {"reward_fn": lambda obs, action: -((action - obs / 2) ** 2), "continuous": True},
    # Reward 1 and the same observation until a time limit: V = 1 / (1 - gamma), if the limit counts as no end.
    "Forever-v0": {"reward_fn": lambda obs, action: 1, "starts": (0.0,), "length": 0},
}
TOYS = {
    "DictObs-v0": {"observation_space": Dict(a=Discrete(3), b=Box(-1, 1, (2, 2), np.float32))},
    "TupleObs-v0": {"observation_space": Tuple((Discrete(2), Box(-1, 1, (3,), np.float64)))},
    "UnequalBox-v0": {"action_space": Box(np.float32([-2, 0]), np.float32([1, 10]))},
    "UnboundedBox-v0": {"action_space": Box(-np.inf, np.inf, (1,), np.float32)},
    "HalfBoundedBox-v0": {"action_space": Box(0, np.inf, (1,), np.float32)},
    "DiscreteStart-v0": {"action_space": Discrete(3, start=3)},
    "MultiDiscreteAction-v0": {"action_space": MultiDiscrete([2, 3])},
    "NanReward-v0": {},
}
for name, kwargs in PROBES.items():
    gym.register(name, Probe, max_episode_steps=5 if name == "Forever-v0" else 10, kwargs=kwargs)
for name, kwargs in TOYS.items():
    gym.register(name, Toy, max_episode_steps=50, kwargs=kwargs)
gym.register("NoTimeLimit-v0", Toy)
gym.register("Ledger-v0", Ledger, max_episode_steps=5)
gym.register("Fixed-v0", Ledger, max_episode_steps=10, kwargs={"length": 4})
gym.register("EchoBox-v0", Echo, max_episode_steps=5, kwargs={"action_space": Box(*BOUNDS)})
gym.register("EchoDiscrete-v0", Echo, max_episode_steps=5, kwargs={"action_space": Discrete(3, start=5)})
