"""The adapters in envs/ against the libraries themselves. Tests of a library that is not installed are skipped."""

import dataclasses
import importlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo_jax
from tests.test_runs import readme_code, run, same

LIBRARIES = {  # --env-id, time limit, the library's own counter of steps, in how many steps some episodes end
    "brax": ("envs.brax_env:inverted_pendulum", 1000, None, 40),
    "craftax": ("envs.craftax_env:Craftax-Classic-Symbolic-v1", 10_000, "timestep", 250),
    "jumanji": ("envs.jumanji_env:Snake-v1", 4000, "step_count", 40),
    "navix": ("envs.navix_env:Navix-Empty-5x5-v0", 100, "t", 90),
    "pgx": ("envs.pgx_env:minatar-breakout", 2500, "_step_count", 40),
}
RAW = {  # module, maker and step of the library; `now` is what its last step or reset returned
    "brax": ("brax.envs", "create", lambda env, key, now, action: env.step(now, action)),
    "craftax": ("craftax.craftax_env", "make_craftax_env_from_name", lambda env, key, now, a: env.step(key, now[1], a)),
    "jumanji": ("jumanji", "make", lambda env, key, now, action: env.step(now[0], action)),
    "navix": ("navix", "make", lambda env, key, now, action: env.step(now, action)),
    "pgx": ("pgx", "make", lambda env, key, now, action: env.step(now, action, key)),
}
LOOK = {  # obs, reward and whether the task ended in `now`, of which a reset may have the first alone
    "brax": lambda now: (now.obs, now.reward, now.done),
    "craftax": lambda now: (now[0], *now[2:4]),
    "jumanji": lambda now: (now[1].observation, now[1].reward, now[1].step_type == 2),
    "navix": lambda now: (now.observation, now.reward, now.step_type == 2),
    "pgx": lambda now: (now.observation, now.rewards[0], now.terminated),
}
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=[pytest.param(name, marks=[] if name == "pgx" else [pytest.mark.slow]) for name in LIBRARIES])
def library(request):
    return pytest.importorskip(request.param).__name__


def play(env_id, num_steps, limit=None):
    """A rollout of three environments and an untrained agent; also the environment and the key of the rollout."""
    args, key = ppo_jax.Args(env_id=env_id, max_episode_steps=limit), jax.random.PRNGKey(0)
    env = ppo_jax.make_jax_env(args)
    agent = ppo_jax.Agent(env.action_space, args)
    state = ppo_jax.init_state(key, *jax.tree.map(lambda x: x[0], ppo_jax.start(key[None], env, 3)), agent)
    policy = partial(ppo_jax.act, agent=agent, args=args)
    rollout = jax.jit(partial(ppo_jax.rollout, policy=policy, env=env, num_steps=num_steps))
    return env, state.key, jax.device_get(rollout(state)[1])


def by_hand(library, env, key, batch):
    """What the library gives for the actions of `batch`, stepped on from its own observations: obs, reward and
    terminated after each step, and obs of the resets; [T, 3, ...]."""
    (module, make, step), name = RAW[library], LIBRARIES[library][0].split(":")[1]
    raw = getattr(importlib.import_module(module), make)(name, **{} if make == "make" else {"auto_reset": False})
    reset, step = jax.jit(getattr(raw, "init", None) or raw.reset), jax.jit(partial(step, raw))
    starts, size = jax.random.split(jax.random.PRNGKey(0), env.pool_size), env.pool_size

    def begin(keys):
        return [reset(starts[jax.random.randint(key, (), 0, size)]) for key in jax.random.split(keys, 3)]

    def look(now):
        obs, *rest = LOOK[library](now)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(obs)]), *map(np.asarray, rest)

    now, rows = begin(jax.random.fold_in(jax.random.PRNGKey(0), 2**31)), []
    for action, done in zip(batch.action, batch.done):
        key, _, step_key, reset_key = jax.random.split(key, 4)
        now = [*map(step, jax.random.split(step_key, 3), now, ppo_jax.to_env(env.action_space, action))]
        fresh = begin(reset_key)
        rows.append([(*look(x), look(new)[0]) for x, new in zip(now, fresh)])
        now = [new if over else old for over, new, old in zip(done, fresh, now)]
    return [np.array([[x[i] for x in row] for row in rows]) for i in range(4)]


@pytest.mark.parametrize("limit", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_a_rollout_is_the_library_stepped_by_hand(library, limit):
    """From the same keys. next_obs is what the step led to, also where an episode ended or was cut; the row below has
    the next one's start. Cuts are no terminations."""
    env_id, *_, num_steps = LIBRARIES[library]
    env, key, batch = play(env_id, 12 if limit else num_steps, limit)
    obs, reward, terminated, resets = by_hand(library, env, key, batch)
    close(batch.next_obs, obs)
    close(batch.reward, reward)
    close(batch.obs[1:], np.where(batch.done[:-1, :, None], resets[:-1], obs[:-1]))
    cut = batch.episode[..., 1] == env.max_steps
    assert np.array_equal(batch.terminated, terminated) and np.array_equal(batch.done, batch.terminated | cut)
    assert cut.any() if limit else batch.terminated.any()


def test_the_time_limit_of_the_library_is_truncation(library):
    """With its counter one step before the limit."""
    env_id, limit, counter, _ = LIBRARIES[library]
    env, key = ppo_jax.make_jax_env(ppo_jax.Args(env_id=env_id)), jax.random.PRNGKey(0)
    (state, _), _ = env.reset(key)
    state = state.replace(**{counter: jnp.int32(limit - 1)}) if counter else state
    *_, terminated, truncated = env.step(key, (state, limit - 1), jnp.zeros(env.action_space.shape, int))
    assert truncated and not terminated


@pytest.mark.slow
def test_freeway_is_cut_not_terminated():
    pytest.importorskip("pgx")
    *_, batch = play("envs.pgx_env:minatar-freeway", 2502, 2502)
    assert not batch.terminated.any() and np.array_equal(np.flatnonzero(batch.done.any(1)), [2501])


@pytest.mark.slow
def test_trains_and_resumes(library):
    """To the last bit, all that is saved, in the midst of episodes."""
    flags = {"env_id": LIBRARIES[library][0], "anneal_lr": False, "eval_episodes": 0}
    whole, part = (run("ppo_jax", total_timesteps=steps, **flags) for steps in (640, 384))
    result = ppo_jax.train(dataclasses.replace(ppo_jax.saved_args(part.run_dir), total_timesteps=640))
    assert same(result.state, whole.state) and part.state.episode.any()
    assert np.array_equal(result.episode_returns, whole.episode_returns)


def test_readme_adapter(monkeypatch):
    """The one of ten lines learns: a cart left alone loses about 170."""
    Path("my_module.py").write_text(readme_code("class make_jax_env"))
    monkeypatch.syspath_prepend(".")
    result = ppo_jax.train(ppo_jax.Args(env_id="my_module:Cart", gamma=0.9, total_timesteps=30_000))
    assert result.episode_returns[:20].mean() < -100 and result.eval_returns.mean() > -40
