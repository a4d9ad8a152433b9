"""Agent, rollout and update of the PyTorch scripts: what enters the losses, what leaves them, the estimator itself."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax

import ppo
import reinforce
import vpg_advantage
from tests.test_runs import scalars
from tests.toy_envs import BOUNDS, RESET

ALL = pytest.mark.parametrize("script", [reinforce, vpg_advantage, ppo], ids=lambda script: script.__name__)
ACTOR_CRITIC = pytest.mark.parametrize("script", [vpg_advantage, ppo], ids=lambda script: script.__name__)
BOTH_SPACES = pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])  # Discrete and Box actions
BOTH_ECHOES = pytest.mark.parametrize("env_id", ["EchoDiscrete-v0", "EchoBox-v0"])
TOY = "tests.toy_envs:"


class Run:
    """What `train` sets up before the first rollout."""

    def __init__(self, script, env_id="CartPole-v1", **flags):
        small = {"num_envs": 3} if script is reinforce else {"num_envs": 3, "num_steps": 16, "norm_reward": False}
        self.script, self.args = script, script.Args(env_id=env_id, **small | flags)
        torch.manual_seed(self.args.seed)
        env_fns = [lambda: script.make_env(self.args)] * self.args.num_envs
        self.envs = gym.vector.SyncVectorEnv(env_fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
        self.agent = script.Agent(self.envs, self.args)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=self.args.learning_rate, eps=1e-5)
        if script is not reinforce:
            self.obs, _ = self.envs.reset(seed=list(range(self.args.num_envs)))

    def rollout(self):
        if self.script is reinforce:
            return reinforce.rollout(self.agent, self.envs, list(range(self.args.num_envs)), self.args)
        batch, self.obs = self.script.rollout(self.agent, self.envs, self.obs, self.args)
        return batch

    def update(self, batch):
        return self.script.update(self.agent, self.optimizer, self.script.loss_fn, batch, self.args)

    def gradient(self):
        """All gradients of the last step of the optimizer, as one vector."""
        return torch.cat([p.grad.flatten() for p in self.agent.parameters()])


def one_step(script):
    """Flags for an update of one gradient step."""
    return {} if script is reinforce else {"num_minibatches": 1, "update_epochs": 1}


@pytest.fixture
def spy(monkeypatch):
    """Lists the arguments of each call of a function of a script, which still does its work."""

    def install(script, name):
        function, calls = getattr(script, name), []
        monkeypatch.setattr(script, name, lambda *args: calls.append(args) or function(*args))
        return calls

    return install


def close(actual, expected, tol=1e-5):
    """Equal up to float32 rounding in networks of a few hundred terms, and of the same shape."""
    actual, expected = (np.asarray(x.detach() if torch.is_tensor(x) else x) for x in (actual, expected))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=tol, atol=tol)


# ==== Rollout ====


@ACTOR_CRITIC
def test_no_row_joins_two_episodes(script):
    """The sentinel of a reset is never a successor, and rows go on where the one before, or the last batch, stopped."""
    run = Run(script, TOY + "Ledger-v0", num_envs=4, num_steps=25)
    first, second = run.rollout(), run.rollout()
    obs, _, reward, next_obs, terminated, done, played = map(np.concatenate, zip(first, second))
    episode, now = obs[..., 1], obs[..., 2]
    assert not (next_obs[..., 0] == RESET).any()
    assert np.array_equal(obs[..., 0] == RESET, now == 0)
    assert np.array_equal(next_obs[..., 1:], np.stack([episode, now + 1], -1))
    assert np.array_equal(reward, 100 * episode + now + 1)
    assert np.array_equal((next_obs[:-1] == obs[1:]).all(-1), done[:-1] == 0)
    assert np.array_equal(obs[1:, :, 1] - episode[:-1], done[:-1])  # the next episode follows each end, none is lost

    natural = now + 1 == 1 + 3 * episode % 7  # where the environment, not its limit of 5 steps, ends
    truncated = (natural & (episode % 3 != 0)) | (now + 1 == 5)
    assert np.array_equal(terminated, natural & (episode % 3 != 1))
    assert np.array_equal(done, (terminated == 1) | truncated)
    assert {*zip(terminated.flat, truncated.flat)} == {(0, 0), (1, 0), (0, 1), (1, 1)}

    length = next_obs[..., 2]  # return and length stand in the row that ended the episode
    assert np.array_equal(played[..., 1], length * done)
    assert np.array_equal(played[..., 0], (100 * episode * length + length * (length + 1) / 2) * done)


def test_reinforce_plays_one_whole_episode_per_environment():
    """Each column is one episode, first step to last, then masked: the first N to finish would be the short ones."""
    batch = Run(reinforce, TOY + "Ledger-v0", num_envs=7).rollout()
    episode, now = batch.obs[0, :, 1], np.arange(len(batch.mask))[:, None]
    length = np.minimum(1 + 3 * episode % 7, 5)
    played = now < length
    assert len(played) == length.max()
    assert np.array_equal(batch.mask, played)
    assert np.array_equal(batch.done, now == length - 1)
    obs = np.stack(np.broadcast_arrays(np.where(now == 0, RESET, 0), episode, now), -1)
    assert np.array_equal(batch.obs[played], obs[played])
    assert np.array_equal(batch.reward[played], (100 * episode + now + 1)[played])
    ended = np.stack([(batch.reward * played).sum(0), length], -1)
    assert np.array_equal(batch.episode[length.astype(int) - 1, range(7)], ended)


@ALL
@BOTH_ECHOES
def test_stored_actions_are_the_sampled_ones(script, env_id):
    """The batch keeps them; the environment gets them scaled to its bounds and clipped, or shifted to its start."""
    run = Run(script, TOY + env_id, num_envs=20)
    batch = run.rollout()
    action = batch.action
    # reinforce has no next_obs, but each row is the successor of the one above, for all episodes take five steps
    received = batch.obs[1:] if script is reinforce else batch.next_obs[:-1]
    if env_id == "EchoDiscrete-v0":
        assert set(action.flat) == {0, 1, 2}
        expected = 5 + action[..., None]
    else:
        assert (np.abs(action) > 1).any(axis=(0, 1)).all()  # a third of a unit normal is out of bounds
        a, b, c, d = np.moveaxis(action, -1, 0)
        expected = np.stack([0.5 + 2.5 * a, 0.5 + 0.5 * b, c, d], -1).clip(*BOUNDS)
    close(received, expected[:-1], 1e-6)


# ==== Policy ====


@ALL
@BOTH_ECHOES
def test_policy_is_the_distribution_it_says(script, env_id):
    """Log-probability and entropy against scipy: of a softmax, or of independent normals, summed over dimensions. With
    REINFORCE's temperature, or with observations standardised."""
    discrete, flags = env_id == "EchoDiscrete-v0", {"temperature": 2.0} if script is reinforce else {"norm_obs": True}
    run = Run(script, TOY + env_id, **flags)
    agent, n = run.agent, run.envs.single_observation_space.shape[0]
    for p in agent.actor.parameters():  # at first all actions are nearly the same
        torch.nn.init.normal_(p)
    obs = seen = torch.randn(5, 2, n)
    if script is not reinforce:
        agent.obs_stats.mean[:], agent.obs_stats.var[:] = 0.5, 0.04
        seen = ((obs - 0.5) / 0.2).clamp(-10, 10)
    out = agent.actor(seen).detach().double().numpy()
    if discrete:
        action = torch.randint(3, (5, 2))
        logits = log_softmax(out / flags.get("temperature", 1.0), -1)
        logp = np.take_along_axis(logits, action.numpy()[..., None], -1)[..., 0]
        entropy = stats.entropy(np.exp(logits), axis=-1)
    else:
        action, std = torch.randn(5, 2, 4), np.array([0.4, 0.7, 1.2, 2.0])
        agent.log_std.data = torch.tensor(std).log().float()
        logp = stats.norm.logpdf(action, out, std).sum(-1)
        entropy = np.full((5, 2), stats.norm.entropy(scale=std).sum())
    actual = agent.log_prob(obs, action)
    close(actual[0], logp)
    close(actual[1], entropy)
    close(agent.act(obs, greedy=True), out.argmax(-1) if discrete else out)


@ALL
def test_sampled_actions(script):
    """From the softmax of logits / temperature, or independent Gaussians: 50,000 draws, fixed seed. Without hidden
    layers, and at observation 0, the output is the bias."""
    n, flags = 50_000, {"temperature": 0.5} if script is reinforce else {}
    agents = [Run(script, TOY + x, hidden_sizes=(), **flags).agent for x in ("EchoDiscrete-v0", "EchoBox-v0")]
    out, std = torch.tensor([0.0, 1.0, -0.5, 2.0]), torch.tensor([0.3, 0.5, 1.0, 2.0])
    agents[0].actor[0].bias.data, agents[1].actor[0].bias.data, agents[1].log_std.data = out[:3], out, std.log()
    with torch.no_grad():
        action, z = agents[0].act(torch.zeros(n, 1)), (agents[1].act(torch.zeros(n, 4)) - out) / std
    p = (out[:3].double() / flags.get("temperature", 1.0)).softmax(0)
    assert stats.chisquare(action.bincount(), n * p).pvalue > 0.001
    assert (z.mean(0).abs() < 5 / math.sqrt(n)).all() and ((z**2).mean(0) - 1).abs().max() < 5 * math.sqrt(2 / n)
    assert (torch.corrcoef(z.T) - torch.eye(4)).abs().max() < 5 / math.sqrt(n)
    assert stats.kstest(z[:, 0], "norm").pvalue > 0.001


@ALL
def test_initialisation(script):
    """W W^T (or W^T W, where that is the smaller) is gain^2 I, with gains sqrt 2, ..., 0.01 for the policy and 1 for
    the value; biases are 0, log deviations -0.5."""
    agent = Run(script, "Pendulum-v1", hidden_sizes=(5, 7, 3)).agent
    networks = {"actor": 0.01} if script is reinforce else {"actor": 0.01, "critic": 1.0}
    for name, last_gain in networks.items():
        layers = [layer for layer in getattr(agent, name) if isinstance(layer, torch.nn.Linear)]
        assert [layer.out_features for layer in layers] == [5, 7, 3, 1]
        for layer, gain in zip(layers, [math.sqrt(2)] * 3 + [last_gain]):
            w = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
            close(w @ w.T, gain**2 * np.eye(len(w)), 1e-5 * gain**2)
            assert not layer.bias.any()
    assert (agent.log_std == -0.5).all()


# ==== Statistics ====


@ACTOR_CRITIC
def test_observation_statistics_of_a_run(script):
    """They cover every observation that the policy acted on, once, after each update."""
    run, seen = Run(script, norm_obs=True), []
    for _ in range(4):
        batch = run.rollout()
        run.update(batch)
        seen.append(batch.obs.reshape(-1, 4).astype(np.float64))
        close(run.agent.obs_stats.mean, np.concatenate(seen).mean(0))
        close(run.agent.obs_stats.var, np.concatenate(seen).var(0))


@ACTOR_CRITIC
def test_values_of_final_observations(script, spy):
    """V(obs) and V(next_obs), final observations too, come from the same network on observations standardised by the
    statistics that the policy played with, to within [-10, 10]; flags and rewards enter as they were."""
    calls = spy(script, "gae")
    run = Run(script, TOY + "Ledger-v0", norm_obs=True)
    for i in range(3):
        batch = run.rollout()
        mean, var = (x.double().numpy() for x in (run.agent.obs_stats.mean, run.agent.obs_stats.var))
        critic = [p.detach().double().numpy() for p in run.agent.critic.parameters()]
        run.update(batch)
        reward, value, next_value, terminated, done, gamma, gae_lambda = calls[i]
        for obs, actual in ((batch.obs, value), (batch.next_obs, next_value)):
            x = np.clip((obs - mean) / np.sqrt(var + 1e-8), -10, 10)
            for w, b in (critic[:2], critic[2:4]):
                x = np.tanh(x @ w.T + b)
            close(actual, (x @ critic[4].T + critic[5])[..., 0], 1e-4)  # observations up to 1000: tanh is steep
        for actual, expected in ((reward, batch.reward), (terminated, batch.terminated), (done, batch.done)):
            close(actual, expected, 0)
        assert (gamma, gae_lambda) == (run.args.gamma, run.args.gae_lambda)


@ACTOR_CRITIC
def test_reward_scaling_of_a_run(script, spy):
    """Rewards are divided, not centred, by the deviation of all discounted returns so far, which go on from batch to
    batch and restart at the ends of episodes; at most 10, on either side."""
    calls = spy(script, "gae")
    run = Run(script, TOY + "Ledger-v0", norm_reward=True, num_steps=8, gamma=0.9)
    seen, following = [], np.zeros(3)
    for i in range(4):
        batch = run.rollout()
        run.update(batch)
        for reward, done in zip(batch.reward.astype(np.float64), batch.done):
            seen.append(reward + 0.9 * following)
            following = np.where(done, 0, seen[-1])
        close(calls[i][0], np.minimum(batch.reward / np.std(seen), 10), 1e-4)

    run = Run(script, norm_reward=True, gamma=0.0, num_steps=500)
    batch = run.rollout()
    reward = np.zeros_like(batch.reward)
    reward[3, 0], reward[5, 1] = 1e3, -1e3  # deviation 1e3 sqrt(2 / 1500) = 36.5
    run.update(batch._replace(reward=reward))
    assert calls[-1][0].unique().tolist() == [-10, 0, 10]


# ==== Update ====


@ALL
def test_clipping_by_global_norm(script):
    """The gradient keeps its direction and gets the maximum as its norm; the norm before that is what is logged."""
    grads = []
    for limit in (1e9, 0.01):
        run = Run(script, max_grad_norm=limit, **one_step(script))  # one seed: the same weights and batch
        logged = run.update(run.rollout())["grad_norm"]
        grads.append(run.gradient())
    norm = grads[0].norm()
    assert norm > 0.01
    close(grads[1] / 0.01, grads[0] / norm, 1e-4)  # torch adds 1e-6 to the norm
    close(logged, norm)


@ACTOR_CRITIC
def test_minibatches(script, spy):
    """Each step of the batch once per epoch, in a new random order, and what belongs to a step stays with it."""
    calls = spy(script, "loss_fn")
    run = Run(script, TOY + "EchoDiscrete-v0", gamma=0.0, update_epochs=3, num_minibatches=4, norm_adv=False)
    before = copy.deepcopy(run.agent)
    ids = np.arange(48, dtype=np.float32).reshape(16, 3)
    run.update(run.rollout()._replace(obs=ids[..., None], action=ids % 3, reward=ids))

    minibatches = [minibatch for _, minibatch, _ in calls]
    assert [len(obs) for obs, *_ in minibatches] == [12] * 12
    orders = torch.stack([obs[:, 0] for obs, *_ in minibatches]).reshape(3, 48)
    assert torch.equal(orders.sort().values, torch.arange(48.0).expand(3, 48))
    assert len({tuple(order.tolist()) for order in (*orders, torch.arange(48.0))}) == 4
    for obs, action, adv, ret, *old in minibatches:
        step = obs[:, 0]
        value, (logp, _) = before.value(obs), before.log_prob(obs, action)
        assert torch.equal(action, step % 3)
        close(ret, step)  # gamma 0: the reward itself
        close(adv, step - value)
        if script is ppo:
            close(old[0], logp)
            close(old[1], value)


KLS = [  # of each minibatch, four an epoch, three epochs; steps before the update ends
    ([0.9, 0, 0, 0], 4),  # the last minibatch alone would go on
    ([0, 0, 0, 0.3], 12),  # the last, or the largest, would stop
    ([0, 0, 0, 0, 0.15, 0.15, 0.15, 0.15], 8),  # the mean of the update so far would go on
]


@pytest.mark.parametrize(("kls", "steps"), KLS)
def test_target_kl_looks_at_the_mean_of_an_epoch(kls, steps, monkeypatch):
    """After an epoch whose mean is above the target of 0.1 the update ends."""
    left = [*kls, *[0] * (12 - len(kls))]
    monkeypatch.setattr(ppo, "approx_kl", lambda *_: torch.tensor(float(left.pop(0))))
    run = Run(ppo, target_kl=0.1, num_minibatches=4, update_epochs=3)
    run.update(run.rollout())
    assert 12 - len(left) == steps


def test_advantages_are_recomputed_by_the_present_critic(spy):
    """Those of the second epoch come from the values of an agent that has done the first; without the flag, of none."""
    seen, values = spy(ppo, "gae"), []
    for flags in ({"update_epochs": 1}, {"recompute_adv": True, "update_epochs": 2}, {"update_epochs": 2}):
        run = Run(ppo, num_minibatches=1, **flags)
        batch = run.rollout()
        run.update(batch)
        values.append(run.agent.value(torch.as_tensor(batch.obs)))
    _, first, second, _ = (value for _, value, *_ in seen)
    close(second, values[0])
    assert (first - second).abs().max() > 1e-3


@BOTH_SPACES
def test_first_ppo_gradient_is_the_vpg_gradient(env_id):
    """The first minibatch meets the policy that played the batch: the ratio is 1 and nothing is clipped."""
    grads = []
    for script in (vpg_advantage, ppo):
        flags = {"gamma": 0.97, "gae_lambda": 0.9, "norm_adv": True, "norm_obs": True}  # where their defaults differ
        run = Run(script, env_id, max_grad_norm=1e9, **one_step(script), **flags)
        metrics = run.update(run.rollout())
        grads.append(run.gradient() / run.gradient().norm())
    close(*grads, 1e-7)  # of vectors of length 1
    assert 0 <= metrics["approx_kl"] < 1e-9  # half the square of what rounding leaves


@ACTOR_CRITIC
@BOTH_SPACES
@pytest.mark.parametrize("on", [False, True])
def test_loss_and_metrics_of_a_minibatch(script, env_id, on, spy):
    """policy + 0.3 value - 0.07 entropy, in NumPy, with advantages standardised per minibatch and values clipped where
    asked for."""
    calls = spy(script, "loss_fn")
    flags = {"norm_adv": on, "clip_vloss": on} if script is ppo else {"norm_adv": on}
    run = Run(script, env_id, vf_coef=0.3, ent_coef=0.07, **one_step(script), **flags)
    run.update(run.rollout())
    _, minibatch, _ = calls[0]
    for p in run.agent.parameters():  # move far, so that ratios and values are past their clips
        p.data += 0.15 * torch.randn_like(p)
    loss, metrics = script.loss_fn(run.agent, minibatch, run.args)
    with torch.no_grad():
        logp, entropy = (x.double().numpy() for x in run.agent.log_prob(*minibatch[:2]))
        value = run.agent.value(minibatch[0]).double().numpy()
    adv, ret, *old = (x.double().numpy() for x in minibatch[2:])
    if on:
        adv = (adv - adv.mean()) / adv.std()
    expected = {"entropy": entropy.mean()}
    if script is vpg_advantage:
        expected["policy_loss"], expected["value_loss"] = -(logp * adv).mean(), 0.5 * ((value - ret) ** 2).mean()
    else:
        logp_old, value_old = old
        ratio = np.exp(logp - logp_old)
        expected["policy_loss"] = -np.minimum(ratio * adv, ratio.clip(0.8, 1.2) * adv).mean()
        near = value_old + (value - value_old).clip(-0.2, 0.2) if on else value
        expected["value_loss"] = 0.5 * np.maximum((value - ret) ** 2, (near - ret) ** 2).mean()
        expected["approx_kl"] = (ratio - 1 - np.log(ratio)).mean()
        expected["clipfrac"] = (np.abs(ratio - 1) > 0.2).mean()
        assert 0 < expected["clipfrac"] < 1
    total = expected["policy_loss"] + 0.3 * expected["value_loss"] - 0.07 * expected["entropy"]
    assert metrics.keys() == expected.keys()
    for name, x in expected.items():
        close(metrics[name], x, 1e-4)
    close(loss, total, 1e-4)


@pytest.mark.parametrize("norm_return", [False, True])
def test_reinforce_loss_and_metrics(norm_return, spy):
    """Returns to the episode's end, standardised over the steps that count, and -1/N times the sum of logp G + 0.07
    entropy over them; the entropy is logged per step."""
    calls, flags = spy(reinforce, "loss_fn"), {"norm_return": norm_return, "ent_coef": 0.07, "gamma": 0.9}
    run = Run(reinforce, TOY + "Ledger-v0", num_envs=7, learning_rate=0.0, **flags)
    for p in run.agent.actor.parameters():  # at first the entropy is the same everywhere
        torch.nn.init.normal_(p)
    batch = run.rollout()
    run.update(batch)
    loss, metrics = reinforce.loss_fn(*calls[0])
    with torch.no_grad():
        logp, entropy = (x.numpy() for x in run.agent.log_prob(torch.tensor(batch.obs), torch.tensor(batch.action)))
    counted = batch.mask == 1
    ret = np.zeros(counted.shape)
    for t, n in np.argwhere(counted):
        ret[t, n] = sum(0.9**i * r for i, r in enumerate(batch.reward[t : int(batch.mask[:, n].sum()), n]))
    if norm_return:
        ret = (ret - ret[counted].mean()) / ret[counted].std()
    policy = -(logp * ret)[counted].sum() / 7
    close(metrics["policy_loss"], policy)
    close(metrics["entropy"], entropy[counted].mean())
    close(loss, policy - 0.07 * entropy[counted].sum() / 7)


# ==== Training ====


def run_fixed(script, **flags):
    """Five iterations of three environments with episodes of four steps."""
    flags |= {} if script is reinforce else {"num_steps": 4}
    args = script.Args(env_id=TOY + "Fixed-v0", num_envs=3, total_timesteps=60, eval_episodes=0, **flags)
    return script.train(args)


@ALL
@pytest.mark.parametrize("anneal_lr", [True, False])
def test_learning_rate_and_optimizer(script, anneal_lr, monkeypatch):
    """Adam with eps 1e-5, the first update at the full learning rate, the last of five at a fifth of it."""
    update, used = script.update, []

    def recorded(agent, optimizer, *args):
        assert isinstance(optimizer, torch.optim.Adam)
        used.append([optimizer.param_groups[0][name] for name in ("lr", "eps", "betas", "weight_decay")])
        return update(agent, optimizer, *args)

    monkeypatch.setattr(script, "update", recorded)
    run_fixed(script, learning_rate=0.01, anneal_lr=anneal_lr)
    close([lr for lr, *_ in used], [0.01, 0.008, 0.006, 0.004, 0.002] if anneal_lr else [0.01] * 5)
    assert all(rest == [1e-5, (0.9, 0.999), 0] for _, *rest in used)


@ALL
def test_episodes_in_result_and_log(script):
    """Three environments finish on the same step, five times: returns and lengths in the order of the steps."""
    result = run_fixed(script)
    log = scalars(result.run_dir)
    assert np.array_equal(result.episode_steps, np.repeat([12, 24, 36, 48, 60], 3))
    assert ((result.episode_returns - 10) % 400 == 0).all()  # 4 steps of episode e earn 400 e + 10
    assert log["charts/episodic_return"] == list(zip(result.episode_steps, result.episode_returns))
    assert log["charts/episodic_length"] == [(step, 4.0) for step in result.episode_steps]


def test_reinforce_counts_only_unmasked_steps():
    """--total-timesteps ends with the first update that reaches it."""
    args = reinforce.Args(env_id=TOY + "Ledger-v0", num_envs=7, eval_episodes=0, total_timesteps=100)
    result = reinforce.train(args)
    lengths = np.array([length for _, length in scalars(result.run_dir)["charts/episodic_length"]])
    assert result.episode_steps[-1] == lengths.sum() >= 100 > lengths[:-7].sum()


# ==== The estimator ====


@pytest.mark.parametrize("baseline", [False, True])
def test_expected_gradient_is_the_true_one(baseline):
    """Two states, two actions, three steps, and an end before that where action 1 is taken in state 1. Every sequence
    once, weighted by its probability, is the exact mean of the estimate; a baseline that depends on time and state does
    not move it. What would follow an end must not count."""
    generator = torch.Generator().manual_seed(0)
    start, transition, rewards, theta, values = (
        torch.rand(shape, generator=generator, dtype=torch.float64)
        for shape in [(2,), (2, 2, 2), (2, 2), (2, 2), (3, 2)]  # by [time,] state [, action [, next state]]
    )
    start, transition = start / start.sum(), transition / transition.sum(-1, keepdim=True)
    columns = torch.cartesian_prod(*[torch.arange(2)] * 6).T  # s0, a0, s1, a1, s2, a2
    state, action, theta = columns[::2], columns[1::2], theta.requires_grad_()
    logp, reward = theta.log_softmax(-1)[state, action], rewards[state, action]
    end = state * action
    end[2] = 1
    mask = end.cumsum(0) - end == 0
    p = start[state[0]] * transition[state[:-1], action[:-1], state[1:]].prod(0) * logp.exp().prod(0)
    (true_gradient,) = torch.autograd.grad((p * (mask * reward).sum(0)).sum(), theta, retain_graph=True)

    weight = 64 * p.detach()
    ret = reinforce.discounted_returns(reward, end * mask, 1.0)
    if baseline:
        adv = (ret - values[torch.arange(3)[:, None], state]) * weight
        # the mean over steps, turned into the sum over each sequence
        loss = vpg_advantage.policy_loss(logp[mask], adv[mask]) * mask.sum() / 64
    else:
        loss = reinforce.policy_loss(logp, ret * weight, mask)
    close(-torch.autograd.grad(loss, theta)[0], true_gradient, 1e-12)
