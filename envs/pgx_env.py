"""Pgx, its games of one player: --env-id envs.pgx_env:minatar-breakout, -asterix, -freeway, -seaquest, -space_invaders.

Pgx gives bare environments, without a time limit but in Freeway, as a termination. Added: 2,500 steps, Freeway's.
"""

import gymnasium as gym

from envs.adapter import Adapter


class PgxEnv(Adapter):
    def __init__(self, name):
        import pgx

        self.env, self.max_steps = pgx.make(name), 2500
        if self.env.num_players > 1:
            raise ValueError(f"{name} has {self.env.num_players} players")
        self.unlimited = {"_terminate_timer": 2**30} if name == "minatar-freeway" else {}
        self.action_space = gym.spaces.Discrete(self.env.num_actions)

    def new(self, key):
        state = self.env.init(key).replace(**self.unlimited)
        return state, state.observation

    def advance(self, key, state, action):
        state = self.env.step(state, action, key)
        return state, state.observation, state.rewards[0], state.terminated


make_jax_env = PgxEnv
