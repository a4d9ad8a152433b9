"""PointTarget-v0 for gymnax, to be stepped inside the compiled program: point_target.py tells what it is.

What gymnax asks for: a state and parameters that are pytrees, and pure functions of them. In a JAX script the id
envs.point_target:PointTarget-v0 is enough; where point_target was imported before JAX, import this module as well.
"""

import gymnax
import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces

import envs.point_target  # noqa: F401, known to Gymnasium too: --capture-video and --env-backend gymnasium play there


@struct.dataclass
class EnvState(environment.EnvState):
    position: jax.Array  # [dimensions], in cells
    target: jax.Array  # [dimensions]


class PointTarget(environment.Environment[EnvState, environment.EnvParams]):
    """Observations [2 * dimensions] float32: position, then target, in cells. Actions: -1 along one dimension, stay,
    or +1 along one dimension, in this order."""

    def __init__(self, grid_size=10, dimensions=1, episode_length=20):
        self.grid_size, self.dimensions, self.episode_length = grid_size, dimensions, episode_length
        unit = jnp.eye(dimensions, dtype=jnp.int32)
        self.moves = jnp.concatenate([-unit, 0 * unit[:1], unit])

    @property
    def name(self):
        return "PointTarget-v0"

    @property
    def default_params(self):
        # --max-episode-steps changes it, and cuts where it is less than episode_length
        return environment.EnvParams(max_steps_in_episode=self.episode_length)

    def reset_env(self, key, params):
        position, target = jax.random.randint(key, (2, self.dimensions), 0, self.grid_size)
        state = EnvState(position=position, target=target, time=0)
        return self.get_obs(state), state

    def step_env(self, key, state, action, params):
        position = (state.position + self.moves[action]).clip(0, self.grid_size - 1)
        state = EnvState(position=position, target=state.target, time=state.time + 1)
        reward = -jnp.abs(position - state.target).sum() / self.grid_size
        return self.get_obs(state), state, reward, self.is_terminated(state, params), {}

    def is_terminated(self, state, params):
        return state.time >= self.episode_length

    def is_truncated(self, state, params):  # left to itself, gymnax would truncate the last step as well
        return (state.time >= params.max_steps_in_episode) & ~self.is_terminated(state, params)

    def get_obs(self, state, params=None, key=None):
        return jnp.concatenate([state.position, state.target]).astype(jnp.float32)

    def observation_space(self, params):
        return spaces.Box(0, self.grid_size - 1, (2 * self.dimensions,), jnp.float32)

    def action_space(self, params=None):
        return spaces.Discrete(2 * self.dimensions + 1)


gymnax.register("PointTarget-v0", PointTarget)
