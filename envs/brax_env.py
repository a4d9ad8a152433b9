"""Brax, continuous control: --env-id envs.brax_env:inverted_pendulum, ant, halfcheetah, hopper, reacher, ...

Brax gives bare environments, actions in [-1, 1]; its time limit and its automatic reset, which overwrites the final
observation, are wrappers, left out here. Added: the limit of those wrappers, 1,000 steps.
"""

import gymnasium as gym

from envs.adapter import Adapter


class BraxEnv(Adapter):
    def __init__(self, name):
        from brax import envs

        if name not in envs._envs:
            raise ValueError(f"Brax has {', '.join(envs._envs)}")
        self.env, self.max_steps = envs.get_environment(name), 1000
        self.action_space = gym.spaces.Box(-1, 1, (self.env.action_size,))

    def new(self, key):
        state = self.env.reset(key)
        return state, state.obs

    def advance(self, key, state, action):
        state = self.env.step(state, action)
        return state, state.obs, state.reward, state.done > 0


make_jax_env = BraxEnv
