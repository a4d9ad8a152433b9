"""Environments so simple that what must be learned is known: V in closed form, and the one best policy."""

import importlib

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.test_runs import SCRIPTS, each

GAMMA = 0.5  # so that a discount that is missing, or one too many, shows
SETTINGS = {"learning_rate": 0.01, "num_envs": 16, "hidden_sizes": (16,), "gamma": GAMMA, "eval_episodes": 20}
BATCHES = {"num_steps": 16, "num_minibatches": 4, "gae_lambda": 0.9, "norm_adv": True, "norm_reward": False}
EPOCHS = BATCHES | {"total_timesteps": 8_192, "update_epochs": 4}
BUDGET = {  # 400, 256 and 512 gradient steps; without clipping, several epochs are good for the value alone
    "reinforce": {"total_timesteps": 6_400},
    "vpg_advantage": BATCHES | {"total_timesteps": 16_384, "update_epochs": 1},
    "ppo": EPOCHS,
}


def train(script: str, name: str, **flags):
    """Module, arguments and result of a run on a probe."""
    module = importlib.import_module(script)
    args = module.Args(env_id=f"tests.toy_envs:{name}-v0", **SETTINGS | BUDGET[script.removesuffix("_jax")] | flags)
    return module, args, module.train(args)


V = {
    "LaterReward": {0.0: GAMMA, 1.0: 1},
    "Forever": {0.0: 1 / (1 - GAMMA)},  # cut by a time limit every five steps; 5/3 if that counted as an end
}


@each(["ppo"], of=[script for script in SCRIPTS if "reinforce" not in script])
@pytest.mark.parametrize("name", V)
def test_value(script, name):
    module, args, result = train(script, name, **EPOCHS)
    obs, expected = np.array([*V[name]], np.float32)[:, None], [*V[name].values()]
    if script.endswith("_jax"):
        value = module.Agent(gym.spaces.Discrete(2), args).apply({"params": result.agent}, obs, method="value")
    else:
        value = result.agent.value(torch.from_numpy(obs))
    # what was left after Adam's last steps was 0.002 at most; a wrong formula is off by a quarter or more
    assert value.tolist() == pytest.approx(expected, abs=0.02)


@each(["reinforce", "ppo"])
def test_discrete_policy(script):
    """The best action, which the observation tells, earns 1, the other 0."""
    _, _, result = train(script, "MatchObs")
    assert result.eval_returns.tolist() == [1] * 20
    assert result.episode_returns[:64].mean() < 0.8 < 0.9 < result.episode_returns[-64:].mean()


@each(["reinforce", "ppo"])
def test_continuous_policy(script):
    """The mean action is within 0.1 of the best one, which is half of the observation."""
    _, _, result = train(script, "MatchObsContinuous")
    assert (result.eval_returns > -(0.1**2)).all()
    # The first deviation, 0.6, costs 0.37 by itself; REINFORCE lowers it 16 times within the first 256 episodes.
    assert result.episode_returns[:256].mean() < -0.3 < -0.05 < result.episode_returns[-256:].mean()
