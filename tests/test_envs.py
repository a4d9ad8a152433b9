"""The environments of envs/, against episodes played by hand and arithmetic written out."""

import importlib
import os
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs.pixelcopter
import envs.point_target  # noqa: F401, for its registration

ROOT = Path(__file__).parents[1]
KINDS = [("PointTarget-v0", {}), ("PointTarget-v0", {"dimensions": 2}), ("PixelCopter-v0", {})]

each_kind = pytest.mark.parametrize(("env_id", "kwargs"), KINDS)


@each_kind
def test_gymnasium_accepts_it(env_id, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(env_id, render_mode="rgb_array", **kwargs).unwrapped)


@each_kind
def test_seed_fixes_the_episodes(env_id, kwargs):
    def play(seed):
        env = gym.make(env_id, **kwargs)
        env.action_space.seed(0)
        seen = [env.reset(seed=seed)[0]]
        for _ in range(100):
            obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
            seen.append(env.reset()[0] if terminated or truncated else obs)
        return np.array(seen)

    np.testing.assert_array_equal(play(3), play(3))
    assert (play(3) != play(4)).any()


@each_kind
def test_side_by_side(env_id, kwargs):
    """Four in a vector play as each would alone."""
    vector, rng = gym.make_vec(env_id, 4, vectorization_mode="sync", **kwargs), np.random.default_rng(0)
    alone = [gym.make(env_id, **kwargs) for _ in range(4)]
    obs, _ = vector.reset(seed=7)
    np.testing.assert_array_equal(obs, [env.reset(seed=7 + i)[0] for i, env in enumerate(alone)])
    for _ in range(5):
        action = rng.integers(2, size=4)
        obs, reward, *_ = vector.step(action)
        steps = [env.step(a) for env, a in zip(alone, action, strict=True)]
        np.testing.assert_array_equal(obs, [step[0] for step in steps])
        np.testing.assert_array_equal(reward, [step[1] for step in steps])


@pytest.mark.parametrize("script", ["reinforce", "vpg_advantage", "ppo"])
@pytest.mark.parametrize("env_id", ["envs.point_target:PointTarget-v0", "envs.pixelcopter:PixelCopter-v0"])
def test_scripts_run_it(script, env_id):
    module = importlib.import_module(script)
    limit = {"max_episode_steps": 20} if script == "reinforce" else {}
    args = module.Args(env_id=env_id, total_timesteps=1024, eval_episodes=2, hidden_sizes=(4,), **limit)
    assert np.isfinite(module.train(args).eval_returns).all()


# ==================================================== PointTarget =====================================================


def point_target(position, target, **kwargs):
    env = gym.make("PointTarget-v0", **kwargs).unwrapped
    env.reset(seed=0)
    env.position, env.target = np.array([position]).reshape(-1), np.array([target]).reshape(-1)
    return env


def test_point_target_by_hand():
    """From cell 1 to cell 3: right, right, stay; over the border from cell 0 one stays there."""
    env = point_target(1, 3)
    played = [env.step(a)[:3] for a in (2, 2, 1)]
    assert [list(obs) for obs, _, _ in played] == [[2, 3], [3, 3], [3, 3]]
    assert [reward for _, reward, _ in played] == [-0.1, 0, 0] and not any(over for *_, over in played)
    env = point_target(0, 9)
    obs, reward, *_ = env.step(0)
    assert list(obs) == [0, 9] and reward == -0.9


def test_point_target_ends_by_termination():
    env = point_target(0, 9)
    flags = [env.step(1)[2:4] for _ in range(20)]
    assert flags == [(False, False)] * 19 + [(True, False)]
    assert gym.spec("PointTarget-v0").max_episode_steps is None


def test_point_target_in_two_dimensions():
    """Five moves: -x, -y, stay, +x, +y; distance 3 + 4 is seven moves, of which one is made."""
    places = [list(point_target((5, 5), (8, 9), dimensions=2).step(a)[0][:2]) for a in range(5)]
    assert places == [[4, 5], [5, 4], [5, 5], [6, 5], [5, 6]]
    assert point_target((5, 5), (8, 9), dimensions=2).step(3)[1] == -0.6


def test_best_possible_return():
    """Straight to the target, from each of the 100 pairs of cells: -0.66 on average."""
    returns = []
    for position, target in product(range(10), range(10)):
        env, here = point_target(position, target), position
        rewards = []
        for _ in range(20):
            obs, reward, *_ = env.step(int(np.sign(target - here)) + 1)
            rewards.append(reward)
            here = obs[0]
        assert rewards[-1] == 0
        returns.append(sum(rewards))
    assert np.mean(returns) == pytest.approx(-0.66)


def test_starts_and_targets_are_uniform():
    env = gym.make("PointTarget-v0")
    env.reset(seed=0)
    pairs = np.array([env.reset()[0] for _ in range(5000)], int)
    counts = np.bincount(pairs @ [10, 1], minlength=100)  # 50 each expected, with a standard deviation of 7
    assert counts.min() > 15 and counts.max() < 85


@pytest.mark.parametrize("dimensions", [1, 2])
def test_gymnax_twin(dimensions):
    """The same states and actions give the same observations, rewards and flags."""
    import jax

    from envs.point_target_jax import EnvState, PointTarget

    twin = PointTarget(dimensions=dimensions)
    rng, key = np.random.default_rng(0), jax.random.PRNGKey(0)
    for _ in range(20):
        position, target = rng.integers(10, size=(2, dimensions))
        env = point_target(position, target, dimensions=dimensions)
        state = EnvState(position=position, target=target, time=0)
        for _ in range(20):
            action = rng.integers(2 * dimensions + 1)
            obs, reward, terminated, truncated, _ = env.step(action)
            _, state, reward_jax, terminated_jax, truncated_jax, info = twin.step(key, state, action)
            np.testing.assert_array_equal(info["final_observation"], obs)
            np.testing.assert_allclose(reward_jax, reward, rtol=1e-6)
            assert (bool(terminated_jax), bool(truncated_jax)) == (terminated, truncated)
        assert terminated
    obs = np.array([twin.reset(jax.random.PRNGKey(i))[0] for i in range(200)], int)
    assert obs.shape == (200, 2 * dimensions) and set(obs.ravel()) == set(range(10))
    assert PointTarget(episode_length=5).default_params.max_steps_in_episode == 5


RUN = ["--env-id", "envs.point_target:PointTarget-v0", "--total-timesteps", "2048", "--eval-episodes", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["reinforce_jax", "ppo_jax"])
def test_jax_scripts_run_it_in_graph(script):
    """--num-seeds is possible in the compiled program alone."""
    command = [sys.executable, ROOT / f"{script}.py", *RUN, "--num-seeds", "2"]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    assert process.stdout.count("evaluation: ") == 2


@pytest.mark.parametrize(("script", "others"), [("ppo", {"jax", "gymnax"}), ("ppo_jax", {"torch"})])
def test_a_run_imports_one_framework(script, others):
    code = f"import sys, {script}; sys.argv[1:] = {RUN}; {script}.main(); assert not {others} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


# ===================================================== PixelCopter ====================================================


def copter(cave_y=24.0, blocks=((60.0, 24.0),), seed=0, **kwargs):
    """A straight cave, and blocks at these places."""
    env = gym.make("PixelCopter-v0", **kwargs).unwrapped
    env.reset(seed=seed)
    env.cave[1], env.blocks = cave_y, [list(block) for block in blocks]
    return env


def test_copter_by_hand():
    """A step is 100/3 ms at 0.0192 pixels per ms: 0.64 pixels of cave, 0.0576 of velocity falling, -0.56 climbing,
    times 0.99 of friction."""
    env = copter()
    obs, reward, terminated, truncated, _ = env.step(0)
    v = 0.0576 * 0.99
    np.testing.assert_allclose(obs, [24 + v, v, 12 - v, 12 + v, 44 - 0.64, 24, 33], rtol=1e-6)
    assert (reward, terminated, truncated) == (0, False, False)
    obs, *_ = env.step(1)
    y, v = 24 + v, (v - 0.56) * 0.99
    np.testing.assert_allclose(obs, [y + v, v, 12 - y - v + 24, y + v - 12, 44 - 1.28, 24, 33], rtol=1e-6)


def test_columns_that_leave_are_rewarded():
    """Centres start at x = 2, 6, 10, ... and leave at -4: after 6 / 0.64 = 9.4 steps, then every 6.25."""
    env, rewarded = copter(blocks=[(400.0, 24.0)]), []
    for t in range(1, 30):
        env.y, env.velocity = 24.0, 0.0
        if env.step(0)[1]:
            rewarded.append(t)
    assert rewarded == [10, 16, 22, 29]  # the ceilings of 9.375, 15.625, 21.875 and 28.125


def test_block_that_is_passed_is_rewarded_and_followed():
    env = copter(blocks=[(17.0, 40.0)])
    assert env.step(0)[1] == 0  # 16.36: still ahead
    obs, reward, *_ = env.step(0)  # 15.72: passed
    assert reward == 1 and len(env.blocks) == 2
    assert 48 - 16 <= obs[4] < 72 - 16 and 12 <= obs[5] < 36 and obs[6] == obs[5] + 9
    while len(env.blocks) == 2:  # gone at -4
        env.y, env.velocity = 24.0, 0.0
        x = env.blocks[0][0]
        env.step(0)
    assert x - 0.64 <= -4 < x


# The copter is at y = 24, the pixel rows 23 and 24, columns 15 and 16. A block of centre y covers y - 4 to y + 4, of x
# covers x - 2 to x + 1; all after a step of 0.64 pixels to the left, and rounded down.
BLOCKS = [(24, 20.0, False), (24, 19.5, True), (24, 14.7, True), (24, 14.6, False)]
BLOCKS += [(28.0, 17, True), (29.0, 17, False), (19.0, 17, True), (18.0, 17, False)]


@pytest.mark.parametrize(("y", "x", "crash"), BLOCKS)
def test_crash_into_a_block(y, x, crash):
    """Against the sets of pixels that both cover."""
    env = copter(blocks=[(x, y)])
    copter_pixels = set(product((15, 16), (23, 24)))
    left, top = int(x - 0.64) - 2, int(y) - 4
    block_pixels = set(product(range(left, left + 4), range(top, top + 9)))
    assert bool(copter_pixels & block_pixels) == crash
    _, reward, terminated, *_ = env.step(0)
    assert terminated == crash
    passed = x - 0.64 <= 16
    assert reward == passed - crash


@pytest.mark.parametrize(
    ("y", "cave_y", "crash"),
    [
        (35.8, 24, False),  # the floor is at 24 + 12
        (36.0, 24, True),
        (14.5, 24, False),  # the ceiling at 24 - 12, which the copter meets 2.4 pixels before its centre does
        (14.2, 24, True),
        (41.9, 34, False),  # 42 is 7/8 of the screen, here far from both walls
        (42.1, 34, True),
        (6.1, 14, False),  # 6 is 1/8 of it
        (5.9, 14, True),
    ],
)
def test_crash_into_the_cave(y, cave_y, crash):
    env = copter(cave_y=cave_y)
    env.y = y - 0.0576 * 0.99  # what the next step falls
    assert env.step(0)[2] == crash


def test_cave_goes_on_and_stays_within_bounds():
    """It is never out of columns, however long the play, and its middle is 24 give or take 6."""
    env = copter()
    for _ in range(2000):
        env.y, env.velocity, env.blocks = 24.0, 0.0, [[60.0, 24.0]]
        env.step(0)
        assert env.cave[0].max() > 44 and env.touched().sum() in (1, 2) and (np.diff(env.cave[0]) > 0).all()
        assert 18 <= env.cave[1].min() <= env.cave[1].max() <= 30


def test_crash_reward_and_time_limit():
    env = copter(crash_reward=-5.0)
    env.y = 41.99
    assert env.step(0)[1:4] == (-5.0, True, False)
    assert gym.spec("PixelCopter-v0").max_episode_steps == 1000


def test_picture():
    env = copter(render_mode="rgb_array", blocks=[(40.0, 24.0)])
    pixels = env.render()[::8, ::8]
    white, green = (pixels == 255).all(-1), (pixels == (120, 240, 80)).all(-1)
    assert np.argwhere(white).tolist() == [[23, 15], [23, 16], [24, 15], [24, 16]]
    assert green[20:29, 38:42].all() and green[:12].all() and green[38:].all()
    assert green.sum() == 9 * 4 + 22 * 48
