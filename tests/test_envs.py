"""The environments of envs/, against episodes played by hand."""

import warnings

import gymnasium as gym
import jax
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import pixelcopter, point_target
from tests.test_runs import each, run

KINDS = [("PointTarget-v0", {}), ("PointTarget-v0", {"dimensions": 2}), ("PixelCopter-v0", {})]


@pytest.mark.parametrize(("env_id", "kwargs"), KINDS)
def test_gymnasium_accepts_it(env_id, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(env_id, render_mode="rgb_array", **kwargs).unwrapped)


@each(["ppo"], of=["ppo", "ppo_jax"])
def test_scripts_run_it(script):
    result = run(script, env_id="envs.point_target:PointTarget-v0")
    assert set(result.episode_steps % 80) == {0}  # four environments, 20 steps an episode


# ==== PointTarget ====


def point(position, goal, **kwargs):
    env = point_target.PointTarget(**kwargs)
    env.reset(seed=0)
    env.position, env.target = np.atleast_1d(position), np.atleast_1d(goal)
    return env


def test_point_target_by_hand():
    """From cell 1 to cell 3: right, right, stay; over the border from cell 0 one stays there. The 20th step terminates,
    it is no time limit."""
    env = point(1, 3)
    played = [env.step(a)[:2] for a in (2, 2, 1)]
    assert [(*obs, reward) for obs, reward in played] == [(2, 3, -0.1), (3, 3, 0), (3, 3, 0)]
    env = point(0, 9)
    obs, reward, *_ = env.step(0)
    assert list(obs) == [0, 9] and reward == -0.9
    assert [env.step(1)[2:4] for _ in range(19)] == [(False, False)] * 18 + [(True, False)]
    assert gym.spec("PointTarget-v0").max_episode_steps is None


def test_point_target_in_two_dimensions():
    """Five moves: -x, -y, stay, +x, +y; distance 3 + 4 is seven moves, of which one is made."""
    places = [list(point((5, 5), (8, 9), dimensions=2).step(a)[0][:2]) for a in range(5)]
    assert places == [[4, 5], [5, 4], [5, 5], [6, 5], [5, 6]]
    assert point((5, 5), (8, 9), dimensions=2).step(3)[1] == -0.6


def test_jax_twin():
    """The same states and actions give the same observations, rewards and flags; starts and targets are uniform, here
    and there."""
    twin, rng, key = point_target.make_jax_env("PointTarget-v0"), np.random.default_rng(0), jax.random.PRNGKey(0)
    assert twin.action_space == point(0, 0).action_space and twin.max_steps == 20
    step = jax.jit(twin.step)
    for _ in range(20):
        places = rng.integers(10, size=2)
        env, state = point(*places), (places, 0)
        for action in rng.integers(3, size=20):
            obs, reward, *flags, _ = env.step(action)
            state, obs_jax, reward_jax, *flags_jax = step(key, state, action)
            assert np.array_equal(obs, obs_jax) and flags == flags_jax
            assert reward == pytest.approx(reward_jax)
        assert flags == [True, False]
    for obs in ([env.reset()[0] for _ in range(5000)], jax.vmap(twin.reset)(jax.random.split(key, 5000))[1]):
        counts = np.bincount(np.array(obs, int) @ [10, 1], minlength=100)
        assert counts.min() > 15 and counts.max() < 85  # 50 each expected, with a standard deviation of 7


# ==== PixelCopter ====


def copter(cave_y=24.0, blocks=((60.0, 24.0),), y=24.0, **kwargs):
    """A straight cave, blocks at these places, the copter at y."""
    env = pixelcopter.PixelCopter(**kwargs)
    env.reset(seed=0)
    env.cave[1], env.blocks, env.y = cave_y, [list(block) for block in blocks], y
    return env


def hover(env):
    env.y, env.velocity = 24.0, 0.0
    return env.step(0)


def test_copter_by_hand():
    """A step is 100/3 ms at 0.0192 pixels per ms: 0.64 pixels of cave, 0.0576 of velocity falling, -0.56 climbing,
    times 0.99 of friction."""
    env, v = copter(), 0.0576 * 0.99
    obs, reward, terminated, truncated, _ = env.step(0)
    np.testing.assert_allclose(obs, [24 + v, v, 12 - v, 12 + v, 44 - 0.64, 24, 33], rtol=1e-6)
    assert (reward, terminated, truncated) == (0, False, False)
    y, v = 24 + v, (v - 0.56) * 0.99
    np.testing.assert_allclose(env.step(1)[0], [y + v, v, 36 - y - v, y + v - 12, 44 - 1.28, 24, 33], rtol=1e-6)


def test_columns_that_leave_are_rewarded():
    """Centres start at x = 2, 6, 10, ... and leave at -4: after 9.375, 15.625, 21.875 and 28.125 steps of 0.64."""
    env = copter(blocks=[(400.0, 24.0)])
    assert [t for t in range(1, 30) if hover(env)[1]] == [10, 16, 22, 29]


def test_block_that_is_passed_is_rewarded_and_followed():
    env = copter(blocks=[(17.0, 40.0)])
    assert env.step(0)[1] == 0  # 16.36: still ahead
    obs, reward, *_ = env.step(0)  # 15.72: passed
    assert reward == 1 and len(env.blocks) == 2
    assert 48 - 16 <= obs[4] < 72 - 16 and 12 <= obs[5] < 36 and obs[6] == obs[5] + 9


# centre of the block, after a step of 0.64 pixels to the left and rounded down
BLOCKS = [(24, 20.0, False), (24, 19.5, True), (24, 14.7, True), (24, 14.6, False)]
BLOCKS += [(28.0, 17, True), (29.0, 17, False), (19.0, 17, True), (18.0, 17, False)]


@pytest.mark.parametrize(("y", "x", "crash"), BLOCKS)
def test_crash_into_a_block(y, x, crash):
    """The copter covers 2 x 2 pixels, a block 4 x 9."""
    _, reward, terminated, *_ = copter(blocks=[(x, y)]).step(0)
    assert terminated == crash and reward == (x - 0.64 <= 16) - crash


# y, middle of the cave: floor 12 below, ceiling 12 above, met 2.4 pixels before the centre; 42 and 6 are the band's
CAVES = [(35.8, 24, False), (36.0, 24, True), (14.5, 24, False), (14.2, 24, True)]
CAVES += [(41.9, 34, False), (42.1, 34, True), (6.1, 14, False), (5.9, 14, True)]


@pytest.mark.parametrize(("y", "cave_y", "crash"), CAVES)
def test_crash_into_the_cave(y, cave_y, crash):
    env = copter(cave_y, y=y - 0.0576 * 0.99, crash_reward=-5.0)  # less what the step falls
    assert env.step(0)[1:4] == (-5.0 * crash, crash, False)


def test_cave_goes_on_and_stays_within_bounds():
    """It is never out of columns, however long the play, and its middle is 24 give or take 6."""
    env = copter()
    for _ in range(2000):
        env.blocks = [[60.0, 24.0]]
        hover(env)
        assert env.cave[0].max() > 44 and env.touched().sum() in (1, 2) and (np.diff(env.cave[0]) > 0).all()
        assert 18 <= env.cave[1].min() <= env.cave[1].max() <= 30
    assert gym.spec("PixelCopter-v0").max_episode_steps == 1000
