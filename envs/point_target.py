"""PointTarget-v0: walk to a target on a line or a square of cells. From a university course's assignment on policy
gradients, and the example of bringing an environment of one's own, with Gymnasium and, for the JAX scripts, in JAX.

The course prints: a line of ten cells, a random start and a random target, episodes of 20 steps, the moves -1, 0 and
+1, an observation of two numbers, the position and the target; that two dimensions are possible; and its results, by
"mean reward" and "success rate". It does not print the reward, nor what the border does.

Inferred, because it gives results of the printed kind: the reward of every step is minus the distance to the target
after it, in units of grid_size; observations are the raw cell numbers; the printed mean reward is that of the last
step; success is to stand on the target at the end. And because something must be chosen: a move over the border
stays in place, and in two dimensions the distance is the number of moves.

The best possible return, over random starts and targets on ten cells, is -0.66 on average: a distance of d costs
((d - 1) + (d - 2) + ... + 1) / 10 on the way. The last step terminates the episode, it is no time limit: nothing
follows that one could bootstrap from.
"""

import gymnasium as gym
import numpy as np


class PointTarget(gym.Env):
    """Observations [2 * dimensions] float32: position, then target, in cells. Actions: -1 along one dimension, stay,
    or +1 along one dimension, in this order."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012, it is Gymnasium's

    def __init__(self, grid_size=10, dimensions=1, episode_length=20, render_mode=None):
        self.grid_size, self.dimensions, self.episode_length = grid_size, dimensions, episode_length
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0, grid_size - 1, (2 * dimensions,), np.float32)
        self.action_space = gym.spaces.Discrete(2 * dimensions + 1)
        unit = np.eye(dimensions, dtype=int)
        self.moves = np.concatenate([-unit, 0 * unit[:1], unit])

    def obs(self):
        return np.concatenate([self.position, self.target]).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.target = self.np_random.integers(self.grid_size, size=(2, self.dimensions))
        self.time = 0
        return self.obs(), {}

    def step(self, action):
        self.position = (self.position + self.moves[action]).clip(0, self.grid_size - 1)
        self.time += 1
        reward = -float(np.abs(self.position - self.target).sum()) / self.grid_size
        return self.obs(), reward, self.time >= self.episode_length, False, {}

    def render(self):
        """The target green, the point red, yellow on the target; 32 pixels a cell."""
        cells = np.zeros((self.grid_size if self.dimensions == 2 else 1, self.grid_size, 3), np.uint8)
        for channel, place in enumerate((self.position, self.target)):
            cells[place[1] if self.dimensions == 2 else 0, place[0], channel] = 255
        return cells.repeat(32, 0).repeat(32, 1)


gym.register("PointTarget-v0", PointTarget)  # no max_episode_steps: REINFORCE takes --max-episode-steps 20


def make_jax_env(name: str):
    """The line of ten cells for the compiled program of the JAX scripts, with the members of their GymnaxEnv."""
    import jax.numpy as jnp  # here, for ppo.py and its like need no JAX
    from jax.random import randint

    class JaxPointTarget:
        action_space, max_steps = gym.spaces.Discrete(3), 20

        def reset(self, key):
            places = randint(key, (2,), 0, 10)
            return (places, 0), places.astype(jnp.float32)

        def step(self, key, state, action):
            (position, target), time = state
            places = jnp.array([(position + action - 1).clip(0, 9), target])
            reward = -jnp.abs(places[0] - places[1]) / 10
            return (places, time + 1), places.astype(jnp.float32), reward, time + 1 >= 20, jnp.array(False)

    return JaxPointTarget()
