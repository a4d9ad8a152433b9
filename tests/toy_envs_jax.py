"""The ledger of toy_envs.py for the compiled program: tests.toy_envs_jax:Ledger, and Fixed, four steps an episode."""

import gymnasium as gym
import jax.numpy as jnp
from jax import random

from tests.toy_envs import RESET


class Ledger:
    """Observations (RESET or 0, episode, step), rewards 100 * episode + step, actions ignored; an episode is a random
    number from 0 to 6, and takes 1 + 3 e mod 7 steps; terminated if e mod 3 is 0, truncated if 1, both if 2."""

    action_space, max_steps = gym.spaces.Discrete(2), 5

    def __init__(self, length=None):
        self.fixed_length = length

    def reset(self, key):
        episode = random.randint(key, (), 0, 7)
        return (episode, 0, 0.0), jnp.array([RESET, episode, 0], jnp.float32)  # 0, 0.0: of weak type, as in gymnax

    def step(self, key, state, action):
        episode, now = state[0], state[1] + 1
        over, kind = now == (self.fixed_length or 1 + 3 * episode % 7), 0 if self.fixed_length else episode % 3
        truncated = (over & (kind != 0)) | (now == self.max_steps)
        obs, reward = jnp.array([0, episode, now], jnp.float32), 100.0 * episode + now
        return (episode, now, obs[2]), obs, reward, over & (kind != 1), truncated


def make_jax_env(name):
    return Ledger(4 if name == "Fixed" else None)
