"""Navix, MiniGrid in JAX: --env-id envs.navix_env:Navix-Empty-5x5-v0, Navix-DoorKey-8x8-v0, ...

Navix tells its time limit, 100 steps, from terminations. Its `step` resets one step after an end, `_step` does not.
"""

import gymnasium as gym

from envs.adapter import Adapter


class NavixEnv(Adapter):
    def __init__(self, name):
        import navix

        if name not in navix.registry():
            raise ValueError(f"Navix has {', '.join(navix.registry())}")
        self.env = navix.make(name)
        self.max_steps = self.env.max_steps
        self.action_space = gym.spaces.Discrete(len(self.env.action_set))

    def new(self, key):
        state = self.env.reset(key)
        return state, state.observation

    def advance(self, key, state, action):
        state = self.env._step(state, action)
        return state, state.observation, state.reward, state.is_termination()


make_jax_env = NavixEnv
