"""What needs a GPU: pytest -m gpu."""

import importlib
from contextlib import closing
from functools import partial

import jax
import numpy as np
import pytest
import torch

SCRIPTS = ("reinforce", "vpg_advantage", "ppo", "reinforce_jax", "vpg_advantage_jax", "ppo_jax")
TORCH = SCRIPTS[:3]

pytestmark = pytest.mark.gpu
each_space = pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Short training of a script, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def short(script, **flags):
        module = importlib.import_module(script)
        sizes = {"num_envs": 4} | ({} if script.startswith("reinforce") else {"num_steps": 32})
        defaults = {"total_timesteps": 512, "eval_episodes": 2, "cuda": True}
        return module.train(module.Args(**{**defaults, **sizes, **flags}))

    return short


def devices(script, result):
    """Where the weights are."""
    if script in TORCH:
        return {p.device.type for p in result.agent.parameters()}
    return {device.platform for leaf in jax.tree.leaves(result.agent) for device in leaf.devices()}


@each_space
@pytest.mark.parametrize("script", SCRIPTS)
def test_trains_on_the_gpu(script, env_id, train):
    result = train(script, env_id=env_id)
    assert devices(script, result) <= {"cuda", "gpu"}
    assert np.isfinite(result.eval_returns).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumes_on_the_gpu_and_on_the_cpu(script, train):
    run_dir = train(script).run_dir
    for cuda, steps in ((True, 1024), (False, 1536)):
        result = train(script, resume=str(run_dir), cuda=cuda, total_timesteps=steps)
        assert result.run_dir == run_dir and (devices(script, result) <= {"cuda", "gpu"}) == cuda


@each_space
@pytest.mark.parametrize("script", TORCH)
def test_compiled_is_eager(script, env_id, train):
    """One update of one step: the same gradients, to the rounding of fused kernels."""
    flags = {"env_id": env_id, "total_timesteps": 1}
    flags |= {} if script == "reinforce" else {"total_timesteps": 128, "update_epochs": 1, "num_minibatches": 1}
    eager, compiled = (train(script, **flags, compile=on) for on in (False, True))
    assert devices(script, compiled) == {"cuda"}
    for ours, theirs in zip(compiled.agent.parameters(), eager.agent.parameters(), strict=True):
        np.testing.assert_allclose(ours.grad.cpu(), theirs.grad.cpu(), rtol=1e-3, atol=1e-5)


@each_space
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_gpu_computes_what_the_cpu_does(script, env_id, train):
    """In full float32: with TF32, which JAX takes by default, log-probabilities were 1e-4 off on an H100."""
    module, weights = importlib.import_module(script), train(script, env_id=env_id).agent
    args = module.Args(env_id=env_id)
    rng = np.random.default_rng(0)
    with closing(module.make_envs(args)) as envs:
        obs = rng.normal(size=(1024, envs.single_observation_space.shape[0])).astype(np.float32)
        discrete = env_id == "CartPole-v1"
        action = rng.integers(2, size=1024) if discrete else rng.normal(size=(1024, 1)).astype(np.float32)
        if script in TORCH:
            outcomes = []
            for device in ("cuda", "cpu"):
                inputs = torch.from_numpy(obs).to(device), torch.from_numpy(action).to(device)
                outcomes.append([x.detach().cpu() for x in weights.to(device).log_prob(*inputs)])
        else:
            log_prob = jax.jit(partial(module.make_agent(envs, args).apply, method="log_prob"))
            outcomes = [log_prob(*jax.device_put((weights, obs, action), jax.devices(x)[0])) for x in ("gpu", "cpu")]
    for ours, theirs in zip(*outcomes, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
