"""What needs a GPU: pytest -m gpu."""

import importlib
from functools import partial

import jax
import numpy as np
import pytest
import torch

from tests.test_runs import SCRIPTS, make_args, run

pytestmark = pytest.mark.gpu
each_script = pytest.mark.parametrize("script", SCRIPTS)
each_space = pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])


def devices(result):
    """Where the weights are."""
    if hasattr(result.agent, "parameters"):
        return {p.device.type for p in result.agent.parameters()}
    return {device.platform for leaf in jax.tree.leaves(result.agent) for device in leaf.devices()}


@each_space
@each_script
def test_trains_and_resumes(script, env_id):
    """On the GPU, and a GPU's checkpoint also on the CPU (in JAX, whose devices stay those of the first run, on it)."""
    result = run(script, env_id=env_id, cuda=True, total_timesteps=300)
    assert devices(result) <= {"cuda", "gpu"}
    for cuda, steps in ((True, 640), (False, 900)):
        again = run(script, env_id=env_id, resume=result.run_dir, cuda=cuda, total_timesteps=steps)
        assert np.isfinite(again.eval_returns).all() and len(again.episode_returns) >= len(result.episode_returns)
        assert (devices(again) <= {"cuda", "gpu"}) == (cuda or script.endswith("_jax"))


@each_space
@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_compiled_is_eager(script, env_id):
    """One update of one step: the same gradients, to the rounding of fused kernels."""
    flags = {"total_timesteps": 1} if script == "reinforce" else {"total_timesteps": 128, "num_minibatches": 1}
    flags |= {"update_epochs": 1} if script == "ppo" else {}
    eager, compiled = (run(script, env_id=env_id, cuda=True, compile=on, **flags).agent for on in (False, True))
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        np.testing.assert_allclose(ours.grad.cpu(), theirs.grad.cpu(), rtol=1e-3, atol=1e-5)


@each_script
def test_the_gpu_computes_what_the_cpu_does(script):
    """In full float32, for which JAX has to be asked: with TF32 log-probabilities are 1e-4 off."""
    module, agent = importlib.import_module(script), run(script, env_id="Pendulum-v1", cuda=True).agent
    inputs = [np.random.default_rng(i).normal(size=(1024, size)).astype(np.float32) for i, size in enumerate((3, 1))]
    if hasattr(agent, "parameters"):
        outcomes = [agent.to(x).log_prob(*(torch.tensor(y, device=x) for y in inputs)) for x in ("cuda", "cpu")]
        outcomes = [[x.detach().cpu() for x in outcome] for outcome in outcomes]
    else:
        space = module.make_jax_env(make_args(script, env_id="Pendulum-v1")).action_space
        log_prob = jax.default_matmul_precision("float32")(
            partial(module.Agent(space, make_args(script)).apply, method="log_prob")
        )
        outcomes = [log_prob(*jax.device_put(({"params": agent}, *inputs), jax.devices(x)[0])) for x in ("gpu", "cpu")]
    for ours, theirs in zip(*outcomes, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
