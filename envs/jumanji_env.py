"""Jumanji, where an action is one number: --env-id envs.jumanji_env:Snake-v1, Maze-v0, Game2048-v1, TSP-v1, ...

Jumanji's time limits are terminations. They are put out of reach and added anew, or 1,000 steps where there is none.
Observations are nested, and contain the mask of valid actions, which the policy sees but does not apply.
"""

from envs.adapter import Adapter


class JumanjiEnv(Adapter):
    def __init__(self, name):
        import jumanji

        self.env = jumanji.make(name)
        self.max_steps = getattr(self.env, "time_limit", 1000)
        self.env.time_limit = 2**30
        self.action_space = jumanji.specs.jumanji_specs_to_gym_spaces(self.env.action_spec)

    def new(self, key):
        state, timestep = self.env.reset(key)
        return state, timestep.observation

    def advance(self, key, state, action):
        state, timestep = self.env.step(state, action)
        return state, timestep.observation, timestep.reward, timestep.last()


make_jax_env = JumanjiEnv
