"""Wrong versions of the scripts, each of which one of the tests has to notice: with -m slow.

A row is (scripts, text, what stands there instead, file and name of the test). The test runs in this process, on the
module with that one change.
"""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RF, VPG, PPO = ["reinforce"], ["vpg_advantage"], ["ppo"]
RFJ, VPGJ, PPOJ = ["reinforce_jax"], ["vpg_advantage_jax"], ["ppo_jax"]
AC, ACJ = VPG + PPO, VPGJ + PPOJ
ALL, ALLJ = RF + AC, RFJ + ACJ
DECAY, CLIP = "decay = gamma * gae_lambda * (1 - done)", "ratio.clip(1 - clip_coef, 1 + clip_coef)"
ADVJ, CLIPJ = "gamma * gae_lambda * (1 - done_t) * adv", "ratio.clip(1 - clip_coef, 1 + clip_coef)"
FINAL_OBS = 'next_obs[info["_final_obs"]] = np.stack(info["final_obs"][info["_final_obs"]])'
MUTANTS = [
    (RF, "gamma * (1 - done_t) * ret[-1]", "gamma * ret[-1]", "math discounted_returns_printed"),
    (RFJ, "gamma * (1 - done_t) * ret\n", "gamma * ret\n", "math discounted_returns_printed"),
    (RF + RFJ, "sum() / mask.shape[-1]", "sum() / mask.sum()", "math reinforce_policy_loss"),
    (RF + RFJ, "-(logp * ret * mask)", "-(logp * ret)", "math reinforce_masked_steps"),
    (RF, "played = ret[mask > 0]", "played = ret", "update reinforce_loss_and_metrics"),
    (RFJ, "ret.mean(where=mask > 0)", "ret.mean()", "parity one_update"),
    (RF, "args.temperature if self.discrete else 1.0", "1.0", "update policy_is_the_distribution"),
    (RFJ, "self.args.temperature if self.discrete else 1.0", "1.0", "jax sampled_actions"),
    (RF, "episode = mask & (terminated | truncated)", "episode = terminated | truncated", "update reinforce_plays"),
    (RFJ, "(env_state, next_obs, mask & ~done)", "(env_state, next_obs, mask)", "jax reinforce_plays"),
    (RFJ, "obs, mask = new_obs, mask & ~done", "obs, mask = new_obs, mask", "parity rollout_on_host"),
    (AC + ACJ, "(1 - terminated) * next_value", "next_value", "math gae_time_limit"),
    (AC + ACJ, "(1 - terminated) * next_value", "(1 - done) * next_value", "math gae_time_limit"),
    (AC, DECAY, "decay = gamma * gae_lambda * (1 - terminated)", "math gae_time_limit"),
    (AC, DECAY, "decay = gae_lambda * (1 - done)", "math gae_double_sum"),
    (ACJ, ADVJ, "gamma * gae_lambda * adv", "math gae_time_limit"),
    (ACJ, ADVJ, "gae_lambda * (1 - done_t) * adv", "math gae_double_sum"),
    (AC, "carry = (1 - done_t) * ret[-1]", "carry = ret[-1]", "math running_returns_by_hand"),
    (ACJ, "return (1 - done_t) * ret, ret", "return ret, ret", "math running_returns_by_hand"),
    (VPG + VPGJ, "-(logp * adv).mean()", "-(logp * adv).sum()", "math vpg_policy_loss"),
    (VPG + VPGJ, "0.5 * error.mean()", "error.mean()", "math test_value_loss"),
    (PPO, "-torch.min(ratio", "-torch.max(ratio", "math ppo_policy_loss_cases"),
    (PPOJ, "-jnp.minimum(ratio", "-jnp.maximum(ratio", "math ppo_policy_loss_cases"),
    (PPO, CLIP, "ratio.clip(1 - clip_coef, 1)", "math ppo_policy_loss_cases"),
    (PPOJ, CLIPJ, "ratio.clip(1, 1 + clip_coef)", "math ppo_policy_loss_cases"),
    (PPO, "ratio = (logp - logp_old)", "ratio = (logp_old - logp)", "math ppo_policy_loss_cases"),
    (PPOJ, "ratio = jnp.exp(logp - logp_old)", "ratio = jnp.exp(logp_old - logp)", "math ppo_policy_loss_cases"),
    (PPO, "torch.max(error", "torch.min(error", "math value_loss_clipped"),
    (PPOJ, "jnp.maximum(error", "jnp.minimum(error", "math value_loss_clipped"),
    (PPO, "((logp - logp_old).expm1() - (logp", "(0 * logp - (logp", "math approx_kl"),
    (PPOJ, "(jnp.expm1(logp - logp_old) - (logp", "(0 * logp - (logp", "math approx_kl"),
    (AC, "- args.ent_coef * entropy", "+ args.ent_coef * entropy", "update loss_and_metrics"),
    (ACJ, "- args.ent_coef * entropy", "+ args.ent_coef * entropy", "parity loss_and_gradients"),
    (AC, "adv.std(correction=0)", "adv.std()", "update loss_and_metrics"),
    (ACJ, "adv.std()", "adv.std(ddof=1)", "parity one_update"),
    (AC, "ret = adv + value", "ret = adv", "update test_minibatches"),
    (ACJ, "ret = adv + value", "ret = adv", "parity one_update"),
    (AC, "agent.value(next_obs)", "agent.value(obs)", "update values_of_final"),
    (ACJ, "critic.value(next_obs)", "critic.value(obs)", "parity one_update"),
    (AC, "self.obs_stats.normalize(obs) if self.norm_obs else obs", "obs", "update values_of_final"),
    (ACJ, "state.obs_stats.normalize(obs) if args.norm_obs else obs", "obs", "jax sampled_actions"),
    (AC, "(self.var + 1e-8).sqrt()).clip(-10, 10)", "(self.var + 1e-8).sqrt())", "update values_of_final"),
    (ACJ, "jnp.sqrt(self.var + 1e-8)).clip(-10, 10)", "jnp.sqrt(self.var + 1e-8))", "parity one_update and norm_obs"),
    (AC, " + w * (1 - w) * delta**2", "", "update observation_statistics"),
    (ACJ, " + w * (1 - w) * delta**2", "", "parity one_update and norm_obs"),
    (AC, "running, agent.running_return =", "running, _ =", "update reward_scaling"),
    (ACJ, "running_return=carry, ", "", "parity one_update and norm_obs"),
    (AC, "return_stats.var + 1e-8).sqrt()).clip(-10, 10)", "return_stats.var + 1e-8).sqrt())", "update reward_sc"),
    (ACJ, "return_stats.var + 1e-8)).clip(-10, 10)", "return_stats.var + 1e-8))", "parity one_update and norm_obs"),
    (PPO, "history[-args.num_minibatches :]]", "history[-1:]]", "update target_kl"),
    (PPO, "if not history or args.recompute_adv", "if not history", "update recomputed"),
    (PPOJ, "learner[0] if args.recompute_adv else state.params", "state.params", "parity epochs"),
    (PPOJ, 'metrics["approx_kl"][:-1] >', 'metrics["approx_kl"][1:] >', "parity epochs"),
    (PPOJ, "x[last], learners", "x[-1], learners", "parity epochs"),
    (ALL, "parameters(), args.max_grad_norm)", "parameters(), 1e9)", "update clipping_by_global_norm"),
    (ALLJ, "jnp.minimum(1, args.max_grad_norm / norm)", "1", "parity one_update"),
    (ALL, "eps=1e-5", "eps=1e-8", "update learning_rate_and_optimizer"),
    (ALLJ, "scale_by_adam(eps=1e-5)", "scale_by_adam(eps=1e-8)", "parity one_update"),
    (ALL, "(1 - step / args.total_timesteps", "(step / args.total_timesteps", "update learning_rate_and_optimizer"),
    (ALLJ, "1 - state.step / args.total_timesteps", "state.step / args.total_timesteps", "parity one_update"),
    (ALL, "z**2 - self.log_std -", "z**2 + self.log_std -", "update policy_is_the_distribution"),
    (ALLJ, "z**2 - self.log_std -", "z**2 + self.log_std -", "parity loss_and_gradients"),
    (ALL, "gain=0.01)", "gain=1.0)", "update initialisation"),
    (ALLJ, "gain=0.01)", "gain=1.0)", "parity initial_weights"),
    (ALL, "gym.wrappers.ClipAction", "", "update stored_actions"),
    (ALLJ, ".clip(space.low, space.high)", "", "jax test_actions"),
    (AC, FINAL_OBS, "pass", "update no_row_joins"),
    (ACJ, FINAL_OBS, "pass", "parity rollout_on_host"),
    (AC, "new_obs.copy(), np.zeros", "new_obs, np.zeros", "update no_row_joins"),
    (ACJ, "optax.tree.where)(done, fresh", "optax.tree.where)(terminated, fresh", "jax no_row_joins"),
    (ACJ, "jnp.zeros_like(episode)", "episode", "jax no_row_joins"),
    (ALLJ, "state.time >= self.max_steps", "state.time > self.max_steps", "jax gymnax_steps"),
    (PPOJ, "np.cumsum(batch.done, 1) - batch.done == 0", "batch.reward > 0", "jax counts_and_compiles and ppo"),
    (RFJ, "args.seed + args.num_seeds)", "args.seed + args.num_seeds)[::-1]", "jax each_agent and reinforce"),
]
SHARED = {old for scripts, old, *_ in MUTANTS if len(scripts) > 1}  # by scripts that are parameters of the test
CASES = [pytest.param(script, *row[1:], id=f"{i}-{script}") for i, row in enumerate(MUTANTS) for script in row[0]]


def test_every_mutant_is_one_change():
    for scripts, old, new, _ in MUTANTS:
        for script in scripts:
            assert (ROOT / f"{script}.py").read_text().count(old) == 1 and old != new, f"{script}.py: {old}"


@pytest.mark.slow
@pytest.mark.parametrize(("script", "old", "new", "test"), CASES)
def test_killed(script, old, new, test):
    module, source = importlib.import_module(script), (ROOT / f"{script}.py").read_text()
    file, test = test.split(" ", 1)
    if file == "math":
        test += " and jax" if script.endswith("_jax") else " and torch"
    elif old in SHARED:
        test += f" and {script if file == 'jax' else script.removesuffix('_jax')}"

    def run(text):
        exec(compile(text, module.__file__, "exec"), vars(module))
        path = str(ROOT / "tests" / f"test_{file}.py")
        return pytest.main(["-o", "addopts=", "-x", "-q", "-p", "no:cacheprovider", "-k", test, path])

    try:
        assert run(source.replace(old, new)) == pytest.ExitCode.TESTS_FAILED
    finally:
        exec(compile(source, module.__file__, "exec"), vars(module))
