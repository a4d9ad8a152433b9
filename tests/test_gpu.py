"""What needs a GPU: pytest -m gpu."""

import importlib

import numpy as np
import pytest

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
    leaves = importlib.import_module("jax").tree.leaves(result.agent)
    return {device.platform for leaf in leaves for device in leaf.devices()}


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
