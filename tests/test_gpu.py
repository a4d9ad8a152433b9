"""What needs a GPU: pytest -m gpu."""

import jax
import numpy as np
import pytest

from tests.test_runs import SCRIPTS, run

pytestmark = pytest.mark.gpu
each_space = pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])


def devices(result):
    """Where the weights are."""
    if hasattr(result.agent, "parameters"):
        return {p.device.type for p in result.agent.parameters()}
    return {device.platform for leaf in jax.tree.leaves(result.agent) for device in leaf.devices()}


@each_space
@pytest.mark.parametrize("script", SCRIPTS)
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
