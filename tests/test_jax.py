"""What only the JAX scripts do: environments within the compiled program, many agents at once, few compilations."""

import dataclasses
import importlib
import os
import re
from functools import partial

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.test_runs import params, python, run, same
from tests.toy_envs import BOUNDS, RESET

TOY = "tests.toy_envs_jax:"
SCRIPTS = ("reinforce_jax", "vpg_advantage_jax", "ppo_jax")
each_script = pytest.mark.parametrize("script", SCRIPTS)


def slow_but(*fast, of=((),)):
    """All scripts, each with every case in `of`; compiling takes seconds, so that most are run with -m slow alone."""
    cases = [(script, *case) for script in SCRIPTS for case in of]
    return [pytest.param(*x, marks=[] if x in fast else [pytest.mark.slow]) for x in cases]


def new_state(module, **fields):
    fields |= {"key": jax.random.PRNGKey(0)}
    return module.State(*map(fields.get, module.State._fields))


def idle(state, obs, key):
    return jnp.zeros(len(obs), int)


# ==== Environments ====


@pytest.mark.parametrize(("script", "limit"), [("vpg_advantage_jax", None), ("ppo_jax", 3)])
def test_no_row_joins_two_episodes(script, limit):
    """As in test_update.py; every reset has its own key, and --max-episode-steps ends episodes."""
    module = importlib.import_module(script)
    env = module.make_jax_env(module.Args(env_id=TOY + "Ledger", max_episode_steps=limit))
    env_state, obs = jax.tree.map(lambda x: x[0], module.start(jax.random.PRNGKey(0)[None], env, 4))
    state = new_state(module, env_state=env_state, obs=obs, episode=jnp.zeros((4, 2)))
    rollout = jax.jit(partial(module.rollout, policy=idle, env=env, num_steps=50))
    state, first = rollout(state)
    obs, _, reward, next_obs, terminated, done, played = map(np.concatenate, zip(first, rollout(state)[1]))
    episode, now, length = obs[..., 1], obs[..., 2], next_obs[..., 2]
    assert not (next_obs[..., 0] == RESET).any()
    assert np.array_equal(obs[..., 0] == RESET, now == 0)
    assert np.array_equal(next_obs[..., 1:], np.stack([episode, now + 1], -1))
    assert np.array_equal(reward, 100 * episode + length)
    assert np.array_equal((next_obs[:-1] == obs[1:]).all(-1), ~done[:-1])
    assert np.array_equal(obs[1:, :, 0] == RESET, done[:-1])
    assert {*episode[now == 0]} == {*range(7)} and len({*map(tuple, episode.T)}) == 4

    natural = length == 1 + 3 * episode % 7
    truncated = (natural & (episode % 3 != 0)) | (length == (limit or 5))
    assert np.array_equal(terminated, natural & (episode % 3 != 1))
    assert np.array_equal(done, terminated | truncated)
    assert {*zip(terminated.flat, truncated.flat)} == {(0, 0), (1, 0), (0, 1), (1, 1)}
    returns = 100 * episode * length + length * (length + 1) / 2
    assert np.array_equal(played[done], np.stack([returns, length], -1)[done])


def test_reinforce_plays_one_whole_episode_per_environment():
    """Each column is one episode, first step to last, then masked, up to the time limit; the next batch has others."""
    module = importlib.import_module("reinforce_jax")
    env = module.make_jax_env(module.Args(env_id=TOY + "Ledger"))
    rollout = jax.jit(partial(module.rollout, policy=idle, env=env, num_envs=20))
    state, batch = rollout(new_state(module))
    episode, now = np.asarray(batch.obs)[0, :, 1], np.arange(5)[:, None]
    length = np.minimum(1 + 3 * episode % 7, 5)
    assert {*episode} == {*range(7)} and (rollout(state)[1].obs[0, :, 1] != episode).any()
    assert np.array_equal(batch.mask, now < length)
    assert np.array_equal(batch.done, now == length - 1)
    assert np.array_equal(batch.obs[..., 1:], np.stack(np.broadcast_arrays(episode, now), -1))
    assert np.array_equal(batch.reward, 100 * episode + now + 1)


@pytest.mark.parametrize("script", slow_but(("ppo_jax",)))
def test_gymnax_steps_as_gymnasium_does(script):
    """CartPole, one step from each of 1,000 states, within and beyond its bounds; a time limit is no termination."""
    twin, env = importlib.import_module(script).GymnaxEnv("CartPole-v1"), gym.make("CartPole-v1").unwrapped
    rng, key = np.random.default_rng(0), jax.random.PRNGKey(0)
    obs, action = rng.uniform(-1, 1, (1000, 4)) * [2.6, 3, 0.25, 3], rng.integers(2, size=1000)
    state = dict(zip(("x", "x_dot", "theta", "theta_dot"), jnp.array(obs.T, jnp.float32)))
    state = type(twin.reset(key)[0])(**state, time=498 + action)
    _, *ours = jax.vmap(twin.step, (None, 0, 0))(key, state, action)
    env.reset(seed=0)
    for i in range(1000):
        env.state, env.steps_beyond_terminated = obs[i], None
        expected, _, terminated, _, _ = env.step(action[i])
        np.testing.assert_allclose(ours[0][i], expected, rtol=1e-5, atol=1e-6)
        assert ours[2][i] == terminated and ours[3][i] == action[i]
    assert twin.max_steps == 500 and 0.1 < ours[2].mean() < 0.9


@each_script
def test_actions(script):
    """The environment gets them scaled to its bounds and clipped, or shifted to its start."""
    to_env, action = importlib.import_module(script).to_env, np.random.default_rng(0).normal(size=(100, 4))
    a, b, c, d = action.T
    expected = np.stack([0.5 + 2.5 * a, 0.5 + 0.5 * b, c, d], -1).clip(*BOUNDS)
    np.testing.assert_allclose(to_env(gym.spaces.Box(*BOUNDS), action), expected, rtol=1e-6)
    assert to_env(gym.spaces.Discrete(3, start=5), np.arange(3)).tolist() == [5, 6, 7]


# ==== Policy and update ====


@each_script
def test_sampled_actions(script):
    """From the softmax of logits / temperature, or independent Gaussians, with observations standardised where that is
    asked for: 50,000 draws, fixed seed."""
    module, key, n = importlib.import_module(script), jax.random.PRNGKey(0), 50_000
    args = module.Args(hidden_sizes=(), **{"temperature": 0.5} if script == "reinforce_jax" else {"norm_obs": True})
    logits, std = np.array([0.0, 1.0, -0.5]), np.array([0.3, 0.5, 2])
    layer = {"kernel": np.diag([2.0, 2, 2]), "bias": logits - 2}
    fields, obs, act = {"params": {"actor": {"layers_0": layer}, "log_std": np.log(std)}}, jnp.ones((n, 3)), module.act
    if script != "reinforce_jax":
        fields["obs_stats"] = module.RunningMeanStd(0.5, 0.04, 1.0)
        obs, act = 0.2 * obs + 0.5, partial(act, args=args)
    state = new_state(module, **fields)
    agents = [module.Agent(x, args) for x in (gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (3,)))]
    p = np.exp(logits / (0.5 if script == "reinforce_jax" else 1))
    assert stats.chisquare(np.bincount(act(state, obs, key, agents[0])), n * p / p.sum()).pvalue > 0.001
    z = (np.asarray(act(state, obs, key, agents[1])) - logits) / std
    assert (np.abs(z.mean(0)) < 5 / np.sqrt(n)).all() and (np.abs((z**2).mean(0) - 1) < 5 * np.sqrt(2 / n)).all()
    assert (np.abs(np.corrcoef(z.T) - np.eye(3)) < 5 / np.sqrt(n)).all()
    assert (act(state, obs, key, agents[0], greedy=True) == 1).all()
    np.testing.assert_allclose(act(state, obs[:1], key, agents[1], greedy=True), [logits], atol=1e-5)


# ==== Training ====


FIXED = [(TOY + "Fixed",), ("tests.toy_envs:Fixed-v0",)]  # in the compiled program, on the host
BACKENDS = [("auto",), ("gymnasium",)]


@pytest.mark.parametrize(("script", "env_id"), slow_but(("ppo_jax", *FIXED[0]), ("reinforce_jax", *FIXED[1]), of=FIXED))
def test_a_run_counts_and_compiles_once(script, env_id, caplog):
    """Three environments finish on the same step, 17 times: returns and steps in order; the evaluation counts first
    episodes alone. One program initialises the networks, then one plays and updates; on the host one acts, one
    updates; one evaluates."""
    flags = {} if script == "reinforce_jax" else {"num_steps": 4, "num_minibatches": 2}
    with jax.log_compiles():
        result = run(script, env_id=env_id, **flags, num_envs=3, total_timesteps=204, max_episode_steps=None)
    assert np.array_equal(result.episode_steps, np.repeat(np.arange(12, 205, 12), 3))
    returns = np.concatenate([result.episode_returns, result.eval_returns])
    assert ((returns - 10) % 400 == 0).all()  # 4 steps of episode e earn 400 e + 10
    programs = re.findall(r"Finished XLA compilation of jit\((scan|iterate|act|update|<lambda>)\)", caplog.text)
    compiled = ["scan", "iterate" if script == "reinforce_jax" else "scan", "<lambda>"]
    assert programs == (compiled if env_id == TOY + "Fixed" else ["scan", "act", "update", "act"])


@pytest.mark.parametrize(("script", "env_backend"), slow_but(of=BACKENDS))
def test_each_agent_follows_its_single_run(script, env_backend):
    """Up to the rounding of a wider matrix product. What REINFORCE's faster agents play while they wait is extra, and
    at learning rate 0."""
    many = run(script, num_seeds=3, env_backend=env_backend)
    for i in (0, 2):
        one = run(script, seed=1 + i, env_backend=env_backend)
        for x, y in zip(params(many.agent), params(one.agent), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6)
        for x, y in ((many.episode_returns[i], one.episode_returns), (many.episode_steps[i], one.episode_steps)):
            assert np.array_equal(x[: len(y)], y) and (len(x) == len(y) or script == "reinforce_jax")


@pytest.mark.parametrize("script", slow_but(("reinforce_jax",)))
def test_resume_of_several_agents(script):
    """To the last bit, though a call has 5 iterations in one run, 3 and then 2 in the other."""
    module, flags = importlib.import_module(script), {"num_seeds": 3, "anneal_lr": False}
    whole, part = (run(script, **flags, total_timesteps=steps) for steps in (640, 384))
    result = module.train(dataclasses.replace(module.saved_args(part.run_dir), total_timesteps=640))
    assert same(result.agent, whole.agent)
    assert all(np.array_equal(x, y) for x, y in zip(result.episode_returns, whole.episode_returns, strict=True))


@pytest.mark.parametrize(("script", "env_backend"), slow_but(of=BACKENDS))
def test_devices_do_not_talk(script, env_backend, tmp_path, monkeypatch):
    """Each has half of the agents, and the optimised programs hold nothing in which one would wait for the other."""
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_dump_to={tmp_path} --xla_dump_hlo_as_text")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # what is found there would not be dumped
    flags = f"num_seeds=4, env_backend='{env_backend}', eval_episodes=0"
    two_devices = "import os; os.cpu_count = lambda: 2; from tests.test_runs import run"
    process = python("-c", f"{two_devices}; run('{script}', {flags})")
    assert process.returncode == 0, process.stderr
    paths = [p for p in tmp_path.glob("*after_opt*.txt") if re.search("jit_(scan|iterate|act|update)", p.name)]
    programs = [text for text in (path.read_text() for path in paths) if "num_partitions=2" in text]
    assert len(programs) == (1 if env_backend == "auto" else 2)
    assert not re.search("all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter", "".join(programs))
