"""Wrong versions of the scripts, each of which the tests of the numbers have to notice: with -m slow.

A row is (scripts, text, what stands there instead). The tests run on a copy of the repository with that one change.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RF, VPG, PPO = ["reinforce"], ["vpg_advantage"], ["ppo"]
RFJ, VPGJ, PPOJ = ["reinforce_jax"], ["vpg_advantage_jax"], ["ppo_jax"]
AC, ACJ = VPG + PPO, VPGJ + PPOJ
MUTANTS = [
    (RF + RFJ, "reward_t + gamma * (1 - done_t) * following", "reward_t + gamma * following"),
    (RF + RFJ, "reward_t + gamma * (1 - done_t) * following", "gamma * (reward_t + (1 - done_t) * following)"),
    (RF + RFJ, "return -(logp * ret * mask).sum()", "return (logp * ret * mask).sum()"),
    (RF + RFJ, "return -(logp * ret * mask).sum()", "return -(logp * ret).sum()"),
    (RF + RFJ, "* mask).sum() / mask.shape[-1]", "* mask).sum() / mask.sum()"),
    (RF + RFJ, "mean = (x * mask).sum() / mask.sum()", "mean = x.mean()"),
    (AC + ACJ, "gamma * (1 - terminated) * next_value", "gamma * next_value"),
    (AC + ACJ, "gamma * (1 - terminated) * next_value", "gamma * (1 - done) * next_value"),
    (AC + ACJ, "* next_value - value\n", "* next_value + value\n"),
    (AC + ACJ, "decay = gamma * gae_lambda * (1 - done)", "decay = gamma * gae_lambda * (1 - terminated)"),
    (AC + ACJ, "decay = gamma * gae_lambda * (1 - done)", "decay = gae_lambda * (1 - done)"),
    (AC, "delta_t + decay_t * following", "delta_t - decay_t * following"),
    (ACJ, "(delta, decay), reverse=True,", "(delta, decay),"),
    (AC, "carry = (1 - done_t) * ret[-1]", "carry = ret[-1]"),
    (ACJ, "return (1 - done_t) * ret, ret", "return (1 - done_t) * carry, ret"),
    (AC, "x.std(correction=0) + 1e-8", "x.std() + 1e-8"),
    (ACJ, "(x.std() + 1e-8)", "(x.std(ddof=1) + 1e-8)"),
    (VPG + VPGJ, "return -(logp * adv).mean()", "return (logp * adv).mean()"),
    (VPG + VPGJ, "return -(logp * adv).mean()", "return -(logp * adv).sum()"),
    (VPG + VPGJ, "return 0.5 * ((value - ret) ** 2).mean()", "return ((value - ret) ** 2).mean()"),
    (PPO, "return -torch.min(ratio", "return -torch.max(ratio"),
    (PPOJ, "return -jnp.minimum(ratio", "return -jnp.maximum(ratio"),
    (PPO, "ratio = (logp - logp_old).exp()", "ratio = (logp_old - logp).exp()"),
    (PPOJ, "ratio = jnp.exp(logp - logp_old)", "ratio = jnp.exp(logp_old - logp)"),
    (PPO, "ratio.clamp(1 - clip_coef, 1 + clip_coef)", "ratio.clamp(1 - clip_coef, 1)"),
    (PPOJ, "ratio.clip(1 - clip_coef, 1 + clip_coef)", "ratio.clip(1, 1 + clip_coef)"),
    (PPO, "error = torch.max(error,", "error = torch.min(error,"),
    (PPOJ, "error = jnp.maximum(error,", "error = jnp.minimum(error,"),
    (PPO, "(log_ratio.expm1() - log_ratio)", "(log_ratio.expm1() + log_ratio)"),
    (PPOJ, "(jnp.expm1(log_ratio) - log_ratio)", "-log_ratio"),
    (AC + ACJ, "args.vf_coef * v_loss - args.ent_coef * entropy", "args.vf_coef * v_loss + args.ent_coef * entropy"),
    (AC + ACJ, "ret = adv + value", "ret = adv"),
    (AC, "agent.value(batch.obs), agent.value(batch.next_obs)", "agent.value(batch.obs), agent.value(batch.obs)"),
    (ACJ, "for x in (obs, next_obs))", "for x in (obs, obs))"),
    (ACJ, "x.mean(0) if mean", "x.sum(0) if mean"),
    (AC + ACJ, 'next_obs[t, ended] = np.stack(info["final_obs"][ended])', "pass"),
    (ACJ, 'action, reward, info["final_observation"], terminated', "action, reward, next_obs, terminated"),
    (AC + ACJ, "return np.array(obs), *map", "return obs, *map"),
    (AC, "return (x - self.mean) / (self.var + 1e-8).sqrt()", "return x"),
    (ACJ, "return (x - self.mean.value) / jnp.sqrt(self.var.value + 1e-8)", "return x"),
    (AC, " + delta**2 * self.count * len(x) / total", ""),
    (ACJ, "squares += delta**2 *", "squares += 0 *"),
    (AC, "self.obs_stats(obs).clamp(-10, 10)", "self.obs_stats(obs)"),
    (ACJ, "self.obs_stats(obs).clip(-10, 10)", "self.obs_stats(obs)"),
    (AC, "var + 1e-8).sqrt()).clamp(-10, 10)", "var + 1e-8).sqrt())"),
    (ACJ, "jnp.sqrt(var + 1e-8)).clip(-10, 10)", "jnp.sqrt(var + 1e-8))"),
    (AC, "running, state.running_return = ", "running, _ = "),
    (ACJ, "running, running_return = running_returns", "running, _ = running_returns"),
    (PPO, "history[-args.num_minibatches :]]", "history[-1:]]"),
    (PPOJ, 'kl += metrics["approx_kl"] / args.num_minibatches', 'kl = metrics["approx_kl"]'),
    (RF + AC, "(params, args.max_grad_norm, foreach", "(params, 1e9, foreach"),
    (RFJ + ACJ, "optax.clip_by_global_norm(args.max_grad_norm)", "optax.clip(args.max_grad_norm)"),
    (RF + AC, "eps=1e-5", "eps=1e-8"),
    (RFJ + ACJ, "scale_by_adam(eps=1e-5)", "scale_by_adam(eps=1e-8)"),
    (RF + AC + RFJ + ACJ, "(args.last_step - step) / args.last_step", "step / args.last_step"),
    (RF + AC + RFJ + ACJ, "(-0.5 * z**2 - self.log_std - ", "(-0.5 * z**2 + self.log_std - "),
]
CASES = [
    pytest.param(script, *change, id=f"{script}-{i}")
    for i, (scripts, *change) in enumerate(MUTANTS)
    for script in scripts
]
CASES += [pytest.param(script, "", "", id=f"{script}-unchanged") for script in ("ppo", "ppo_jax")]  # to survive


def test_every_mutant_is_one_change():
    for scripts, old, new in MUTANTS:
        for script in scripts:
            assert (ROOT / f"{script}.py").read_text().count(old) == 1 and old != new, f"{script}.py: {old}"


@pytest.mark.slow
@pytest.mark.parametrize(("script", "old", "new"), CASES)
def test_killed(script, old, new, tmp_path):
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / f"{script}.py"
    path.write_text(path.read_text().replace(old, new))
    jax = [("math", "jax or shuffles"), ("parity", ""), ("jax", "in_the_program")]
    torch = [("math", "torch"), ("update", ""), ("parity", "")]
    killed = False
    for name, choice in jax if script.endswith("_jax") else torch:
        command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-k", choice, f"tests/test_{name}.py"]
        process = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True)
        assert process.returncode in (0, 1), process.stdout
        killed = killed or process.returncode == 1
        if killed:
            break
    assert killed == (old != new), process.stdout
