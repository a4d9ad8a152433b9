"""What the adapters of libraries have in common: episodes start from a pool, steps are counted, observations are flat.

Their classes say how a library makes a first state, `new(key) -> state, obs`, and takes a step, `advance(key, state,
action) -> state, obs, reward, terminated`, without a time limit and without a reset at the end. They import the library
late: it starts JAX, whose devices the script has to choose first. The pool makes Craftax 6, Maze 60 times as fast.
"""

from functools import cached_property, partial

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree


class Adapter:
    pool_size = 1024  # first states, the same in every run: `reset`, which is computed at every step, picks one

    @cached_property
    def pool(self):
        with jax.ensure_compile_time_eval():  # now, though a program that needs it is being traced
            return jax.jit(partial(jax.lax.map, self.new))(jax.random.split(jax.random.PRNGKey(0), self.pool_size))

    def reset(self, key):
        state, obs = jax.tree.map(lambda x: x[jax.random.randint(key, (), 0, len(x))], self.pool)
        return (state, 0), ravel_pytree(obs)[0].astype(jnp.float32)

    def step(self, key, state, action):
        (state, obs, reward, terminated), time = self.advance(key, state[0], action), state[1] + 1
        obs, reward = ravel_pytree(obs)[0].astype(jnp.float32), jnp.float32(reward)
        return (state, time), obs, reward, terminated, time >= self.max_steps
