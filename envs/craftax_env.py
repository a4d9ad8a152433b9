"""Craftax: --env-id envs.craftax_env:Craftax-Symbolic-v1 or Craftax-Classic-Symbolic-v1.

Craftax gives one `done`, for death and for its time limit. That is put out of reach and added anew: 10,000 steps, as in
Classic; of the 100,000 of the large game the evaluation would have to store every observation.
"""

import gymnasium as gym

from envs.adapter import Adapter


class CraftaxEnv(Adapter):
    pool_size = 256  # worlds, of 27 kB each in Classic and 0.3 MB in Craftax

    def __init__(self, name):
        from craftax.craftax_env import make_craftax_env_from_name

        self.env, self.max_steps = make_craftax_env_from_name(name, auto_reset=False), 10_000
        self.params = self.env.default_params.replace(max_timesteps=2**30)
        self.action_space = gym.spaces.Discrete(self.env.num_actions)

    def new(self, key):
        return self.env.reset_env(key, self.params)[::-1]

    def advance(self, key, state, action):
        obs, state, reward, terminated, _ = self.env.step_env(key, state, action, self.params)
        return state, obs, reward, terminated


make_jax_env = CraftaxEnv
