"""Environments with known answers, with odd spaces and with faults. Importing the module registers them with Gymnasium.

Their ids are "tests.probe_envs:OneStep-v0" and so on, for any script whose working directory or PYTHONPATH is the
repository.
"""

import os
import random
import signal
import sys
from collections import defaultdict

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiDiscrete, Sequence, Tuple

ACTIONS = defaultdict(list)  # id -> every action that a Toy received
RESETS = defaultdict(list)  # id -> (seed, first observation) of every reset of a Toy that was given a seed

BIT = Box(-1, 1, (1,), np.float32)


def floats(low, high) -> Box:
    return Box(np.array(low, np.float32), np.array(high, np.float32))


class Probe(gym.Env):
    """Observations -1, 0 or 1; the reward of a step is `reward_fn(obs, action)`, so V and the best policy are known."""

    def __init__(self, reward_fn, starts=(0.0,), length=1, continuous=False):
        self.observation_space = BIT
        # unbounded, for at a bound the reward would be flat
        self.action_space = Box(-np.inf, np.inf, (1,), np.float32) if continuous else Discrete(2)
        self.reward_fn, self.starts, self.length = reward_fn, starts, length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_number = 0
        self.obs = np.array([self.np_random.choice(self.starts)], np.float32)
        return self.obs, {}

    def step(self, action):
        reward = float(self.reward_fn(self.obs.item(), np.asarray(action).item()))
        self.step_number += 1
        if self.length > 1:  # the observation counts the steps, so that the state is known
            self.obs = np.array([float(self.step_number)], np.float32)
        return self.obs, reward, self.step_number == self.length, False, {}


class Toy(gym.Env):
    """Random observations, reward 1, 20 steps unless told otherwise. Refuses actions outside its action space.

    `fault` happens in the reset, or in the steps numbered `fault_steps`, counted from the environment's making.
    `talks` of what has another shape, or is of another kind, at every step.
    """

    def __init__(self, observation_space=BIT, action_space=None, length=20, fault=None, fault_steps=(5,), talks=False):
        self.observation_space, self.action_space = observation_space, action_space or Discrete(2)
        self.length, self.fault, self.fault_steps, self.lifetime = length, fault, fault_steps, 0
        self.talks = talks

    def reset(self, *, seed=None, options=None):
        if self.fault == "reset":
            raise RuntimeError("fault in reset")
        self.observation_space.seed(seed) if seed is not None else None
        self.step_number, obs = 0, self.observation_space.sample()
        if seed is not None:
            RESETS[self.spec.id].append((seed, obs))
        return obs, self.info()

    def info(self):
        if not self.talks:
            return {}
        n = int(self.observation_space.sample().item() > 0)
        info = {"moves": np.zeros(1 + n), "winner": (None, 1)[n], "team": (3, {"red": "x"})[n]}
        return info | {"episode": n, "final_obs": n}  # names that Gymnasium's wrappers and vectors use

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        ACTIONS[self.spec.id].append(action)
        self.step_number, self.lifetime, reward = self.step_number + 1, self.lifetime + 1, 1.0
        if self.lifetime in self.fault_steps:
            if self.fault == "step":
                raise RuntimeError("fault in step")
            if isinstance(self.fault, signal.Signals):
                signal.raise_signal(self.fault)
            if isinstance(self.fault, float):
                reward = self.fault
        return self.observation_space.sample(), reward, self.step_number == self.length, False, self.info()


class GlobalDice(gym.Env):
    """Draws from the generators of the modules `random` and numpy.random, whatever its seed."""

    observation_space, action_space = Box(0, 1, (2,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.array([random.random(), np.random.rand()], np.float32), {}

    def step(self, action):
        return self.reset()[0], 1.0, False, False, {}


PROBES = {
    "OneStep-v0": {"reward_fn": lambda obs, action: 1},
    "ObsReward-v0": {"reward_fn": lambda obs, action: obs, "starts": (-1.0, 1.0)},
    "LaterReward-v0": {"reward_fn": lambda obs, action: obs == 1, "length": 2},
    "ActionReward-v0": {"reward_fn": lambda obs, action: action},
    "ActionRewardContinuous-v0": {"reward_fn": lambda obs, action: -((action - 0.5) ** 2), "continuous": True},
    "MatchObs-v0": {"reward_fn": lambda obs, action: action == (obs > 0), "starts": (-1.0, 1.0)},
    "MatchObsContinuous-v0": {
        "reward_fn": lambda obs, action: -((action - obs / 2) ** 2),
        "starts": (-1.0, 1.0),
        "continuous": True,
    },
}
TOYS = {
    "DictObs-v0": {"observation_space": Dict(a=Discrete(3), b=Box(-1, 1, (2, 2), np.float32))},
    "TupleObs-v0": {"observation_space": Tuple((Discrete(2), Box(-1, 1, (3,), np.float64)))},
    "UnequalBox-v0": {"action_space": floats([-2, 0], [1, 10])},
    "UnboundedBox-v0": {"action_space": floats([-np.inf], [np.inf])},
    "HalfBoundedBox-v0": {"action_space": floats([0], [np.inf])},
    "DiscreteStart-v0": {"action_space": Discrete(3, start=3)},
    "Talks-v0": {"talks": True},
    "MultiDiscreteAction-v0": {"action_space": MultiDiscrete([2, 3])},
    "IntegerBoxAction-v0": {"action_space": Box(0, 5, (1,), np.int64)},
    "Image-v0": {"observation_space": Box(0, 255, (8, 8, 3), np.uint8)},
    "SequenceObs-v0": {"observation_space": Sequence(BIT)},
    "GraphObs-v0": {"observation_space": Graph(BIT, None)},
    "OneStepToy-v0": {"length": 1},
    "ResetFault-v0": {"fault": "reset"},
    "StepFault-v0": {"fault": "step"},
    "NanReward-v0": {"fault": float("nan"), "length": 4},  # in the second episode
    "NanAtOnce-v0": {"fault": float("nan"), "fault_steps": (1,)},
    "Interrupted-v0": {"fault": signal.SIGINT},
    "InterruptedTwice-v0": {"fault": signal.SIGINT, "fault_steps": (5, 6)},
    "Terminated-v0": {"fault": signal.SIGTERM},
}
for name, kwargs in PROBES.items():
    gym.register(name, entry_point=Probe, max_episode_steps=10, kwargs=kwargs)
for name, kwargs in TOYS.items():
    gym.register(name, entry_point=Toy, max_episode_steps=50, kwargs=kwargs)
gym.register("NoTimeLimit-v0", entry_point=Toy)
gym.register("GlobalDice-v0", entry_point=GlobalDice, max_episode_steps=10)
gym.register("Endless-v0", entry_point=Probe, kwargs=PROBES["OneStep-v0"] | {"length": 0})
# Reward 1 and the same observation until a time limit: V = 1 / (1 - gamma), if the limit counts as no end.
gym.register("Forever-v0", entry_point=Probe, max_episode_steps=5, kwargs=PROBES["OneStep-v0"] | {"length": 0})


class Broken(gym.Env):
    """Breaks in the way that its id says, the second copy alone: in the second or third step, or at a reset."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, how):
        self.how = how

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.unlucky = seed in (EVALUATION_SEEDS if "evaluation" in self.how else UNLUCKY_SEEDS)
            self.steps = 0
        if self.unlucky and (self.how == "start" or (self.how == "reset" and self.steps)):
            raise OSError("the simulator\nis gone")
        if self.how == "old":
            return np.zeros(3, np.float32)  # as before Gymnasium
        return np.zeros(3, np.float32), {}

    def step(self, action):
        sys.stdout.flush()  # as one that prints may, in every process
        self.steps += 1
        obs, reward = np.zeros(3, np.float32), 1.0
        if self.unlucky and self.steps == 2 and self.how == "nan":
            obs[1] = np.nan
        if self.unlucky and self.steps == 3:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how in ("step", "evaluation"):
                raise ZeroDivisionError("a mass of zero")
            obs = np.zeros(4, np.float32) if self.how == "shape" else obs
            reward = float("inf") if self.how in ("reward", "evaluation-reward") else reward
        return obs, reward, self.steps % 3 == 0, False, {}


# those of --seed 1's second environment
UNLUCKY_SEEDS = [np.random.SeedSequence(1, spawn_key=(stream, 0)).generate_state(2)[1] for stream in (0, 2)]
EVALUATION_SEEDS = np.random.SeedSequence(1, spawn_key=(1, 0)).generate_state(1)
for how in ("start", "reset", "step", "nan", "shape", "reward", "old", "evaluation", "evaluation-reward", "killed"):
    gym.register(f"Broken{how.title()}-v0", Broken, max_episode_steps=16, kwargs={"how": how})
