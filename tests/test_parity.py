"""PyTorch and JAX say the same: from equal weights and one batch, equal losses, gradients and updated parameters."""

import importlib
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.toy_envs import RESET

PAIRS = ("reinforce", "vpg_advantage", "ppo")
SPACES = {"discrete": gym.spaces.Discrete(3), "continuous": gym.spaces.Box(-1, 1, (2,))}
T, N, D = 16, 4, 5
each_pair = pytest.mark.parametrize("name", PAIRS)


def assert_close(ours, theirs, tol=1e-5):
    """One float32 rounding is 6e-8; sums over 64 steps and two layers of 64 units stay well below 1e-5."""
    leaves, others = jax.tree.leaves_with_path(ours), jax.tree.leaves_with_path(theirs)
    assert [path for path, _ in leaves] == [path for path, _ in others]
    for (path, x), (_, y) in zip(leaves, others):
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol, err_msg=str(path))


def to_flax(agent, get=lambda p: p):
    """The parameters of a PyTorch agent, or what `get` makes of each, in flax's layout: kernels are transposed."""
    params = {}
    for name, p in agent.named_parameters():
        *path, kind = name.split(".")
        layer = params.setdefault(path[0], {}).setdefault(f"layers_{path[1]}", {}) if path else params
        layer["kernel" if kind == "weight" else kind] = get(p).detach().numpy().T.copy()  # the optimizer writes into it
    return params


class Twins:
    """Both scripts of a pair, with equal arguments, weights and statistics, moved away from the initial ones. A quarter
    of the steps is done."""

    def __init__(self, name, kind, **flags):
        self.torch, self.jax = importlib.import_module(name), importlib.import_module(f"{name}_jax")
        batches = {} if name == "reinforce" else {"num_steps": T, "num_minibatches": 1, "update_epochs": 1}
        flags = batches | {"num_envs": N, "learning_rate": 1e-2, "total_timesteps": 20 * T * N} | flags
        self.args, self.jax_args = self.torch.Args(**flags), self.jax.Args(**flags)
        obs_space, space = gym.spaces.Box(-np.inf, np.inf, (D,)), SPACES[kind]
        envs = SimpleNamespace(single_observation_space=obs_space, single_action_space=space)
        torch.manual_seed(0)
        self.agent, self.jax_agent = self.torch.Agent(envs, self.args), self.jax.Agent(space, self.jax_args)
        self.initial = to_flax(self.agent)
        for p in self.agent.parameters():
            p.data += 0.1 * torch.randn_like(p)
        for buffer_name, x in self.agent.named_buffers():  # as if 100 rows had been seen
            x.copy_(100 * torch.ones_like(x) if "count" in buffer_name else 0.5 + torch.rand_like(x))
        self.agent.running_return = torch.linspace(-2, 3, N)
        state = {"params": to_flax(self.agent), "step": jnp.int32(5 * T * N), "key": jax.random.PRNGKey(0)}
        state |= {"opt_state": self.jax.optimizer.init(state["params"])} | self.statistics()
        self.state = self.jax.State(*map(state.get, self.jax.State._fields))

    def statistics(self):
        """What JAX keeps in its State; REINFORCE has none."""
        found = {}
        for name, x in self.agent.named_children():
            if name.endswith("stats"):
                found[name] = self.jax.RunningMeanStd(*(y.numpy().copy() for y in (x.mean, x.var, x.count)))
        return found and found | {"running_return": self.agent.running_return.numpy()}


def noise(name, kind, *rows):
    """Fields of a batch, with terminations and truncations; for REINFORCE one episode in each column, then the mask."""
    rng, rows = np.random.default_rng(1), rows or (T, N)
    action = rng.integers(0, 3, rows) if kind == "discrete" else rng.normal(size=(*rows, 2))
    terminated, truncated = rng.random((2, T, N)) < 0.15
    batch = {"obs": rng.normal(size=(*rows, D)), "next_obs": rng.normal(size=(*rows, D)), "action": action}
    batch |= {"reward": rng.normal(size=rows), "terminated": terminated, "done": terminated | truncated}
    t, ends = np.arange(T)[:, None], rng.integers(3, T, N)
    batch |= {"mask": t <= ends, "episode": np.zeros(0)} | ({"done": t == ends} if name == "reinforce" else {})
    return {field: x.astype(np.float32) for field, x in batch.items()}


# ==== Networks and update ====


@each_pair
def test_initial_weights(name):
    """Every layer starts at the same scale, which is that of all singular values; biases and log deviations, too."""
    twins, obs = Twins(name, "continuous", hidden_sizes=(32, 16)), jnp.zeros((N, D))
    arguments = (obs,) if name == "reinforce" else (None, obs)
    params = twins.jax.init_state(jax.random.PRNGKey(3), *arguments, twins.jax_agent).params
    scale = partial(jax.tree.map, lambda x: np.linalg.svd(x)[1] if x.ndim == 2 else x)
    assert_close(scale(twins.initial), scale(params))


@pytest.mark.parametrize("kind", [pytest.param("discrete", marks=pytest.mark.slow), "continuous"])
@each_pair
def test_loss_and_gradients(name, kind):
    """The loss of a minibatch, what is logged of it and the gradient of every parameter, with probability ratios on
    both sides of the clip range."""
    rows, flags = ((T, N), {}) if name == "reinforce" else ((T * N,), {"norm_adv": False})  # in JAX `update` does that
    twins = Twins(name, kind, ent_coef=0.01, **flags)
    batch = noise(name, kind, *rows)
    adv, ret, logp_old, value_old = np.random.default_rng(2).normal(size=(4, *rows)).astype(np.float32)
    last = {"reinforce": (ret, batch["mask"]), "vpg_advantage": (adv, ret), "ppo": (adv, ret, logp_old - 2, value_old)}
    minibatch = batch["obs"], batch["action"], *last[name]
    loss, metrics = twins.torch.loss_fn(twins.agent, tuple(map(torch.tensor, minibatch)), twins.args)
    loss.backward()
    grads = to_flax(twins.agent, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    loss_fn = partial(twins.jax.loss_fn, agent=twins.jax_agent, args=twins.jax_args)
    expected = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(twins.state.params, minibatch)
    assert_close(((loss.item(), metrics), grads), expected)
    assert 0.1 < metrics.get("clipfrac", 0.5) < 0.95


SMALL = {"ent_coef": 0.01, "max_grad_norm": 1e-3}  # gradients that Adam's eps is not small beside
FLAGS = {  # the last without -m slow
    "reinforce": [{}, {"gamma": 0.9, "activation": "relu"}, {"norm_return": False, **SMALL}],
    "vpg_advantage": [{}, {"norm_adv": True, **SMALL}, {"norm_obs": True, "norm_reward": True}],
    "ppo": [{}, {"norm_adv": False, "clip_vloss": True, **SMALL}, {"norm_obs": True, "norm_reward": True}],
}
CASES = []
for name in PAIRS:
    for i, flags in enumerate(FLAGS[name]):
        marks = [] if i == 2 else [pytest.mark.slow]
        CASES.append(pytest.param(name, flags, marks=marks, id="-".join([name, *flags])))


@pytest.mark.parametrize(("name", "flags"), CASES)
def test_one_update(name, flags, kind="continuous"):
    """The whole update: metrics, parameters after the optimizer's steps, running statistics, the number of steps."""
    twins, batch = Twins(name, kind, **flags), noise(name, kind)
    if "norm_obs" in flags:  # so far out that normalised they are clipped
        batch["obs"][2, 1] *= 50
        batch["reward"][3, 2] = 50
    optimizer = torch.optim.Adam(twins.agent.parameters(), twins.args.learning_rate * 0.75, eps=1e-5)
    batch = {field: batch[field] for field in twins.jax.Batch._fields}
    ours = twins.torch.Batch(**{"episode": np.zeros(0)} | batch)
    metrics = twins.torch.update(twins.agent, optimizer, twins.torch.loss_fn, ours, twins.args)
    update = jax.jit(partial(twins.jax.update, agent=twins.jax_agent, args=twins.jax_args))
    state, jax_metrics = update(twins.state, twins.jax.Batch(**batch))
    assert_close(metrics, jax_metrics, 1e-4 if name == "reinforce" else 1e-5)  # of REINFORCE, sums
    assert_close(to_flax(twins.agent), state.params)
    assert_close(twins.statistics(), {field: getattr(state, field) for field in twins.statistics()})
    assert state.step == 5 * T * N + (batch["mask"].sum() if name == "reinforce" else T * N)


@pytest.mark.parametrize("end", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_epochs_and_minibatches(end, monkeypatch):
    """Three epochs of four minibatches from the same shuffles; by a target KL above the first epoch's mean, though
    below its last minibatch's, two; or one."""
    orders = np.stack([np.random.default_rng(i).permutation(T * N) for i in range(3)])
    ppo, ppo_jax = importlib.import_module("ppo"), importlib.import_module("ppo_jax")
    kls, approx_kl = [], ppo.approx_kl
    monkeypatch.setattr(ppo, "approx_kl", lambda *x: kls.append(approx_kl(*x)) or kls[-1])
    keys = jax.random.split(jax.random.PRNGKey(0), 4)[1:]  # of State.key, as `update` splits it
    monkeypatch.setattr(ppo_jax, "shuffle", lambda key, _: jnp.asarray(orders)[(keys == key).all(-1).argmax()])

    def update(**flags):
        given = iter(orders)
        monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.tensor(next(given)))
        test_one_update("ppo", {"update_epochs": 3, "num_minibatches": 4, "learning_rate": 2e-3} | flags, "discrete")
        return 3 - len([*given])

    assert update() == 3
    first, second = torch.stack(kls).view(3, 4)[:2].mean(1).tolist()
    last = kls[3].item()
    assert 1.2 * first < last < 0.8 * second
    assert update(target_kl=(first + last) / 2 if end == 2 else 0.9 * first) == end
    assert update(recompute_adv=True) == 3


# ==== Rollout ====


@each_pair
def test_rollout_on_host(name):
    """What PyTorch sees of four environments that take no notice of actions, JAX sees, with two agents of two each."""
    ours, theirs = importlib.import_module(name), importlib.import_module(f"{name}_jax")
    flags = {"env_id": "tests.toy_envs:Ledger-v0"} | ({} if name == "reinforce" else {"num_steps": 24})
    args, jax_args = ours.Args(num_envs=4, **flags), theirs.Args(num_envs=2, num_seeds=2, **flags)
    mode = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv([lambda: ours.make_env(args)] * 4, autoreset_mode=mode)
    jax_envs, seeds = theirs.make_envs(jax_args, 2), [[0, 1, 2, 3]]
    obs, reset = jax_envs.reset(seed=seeds[0])[0], jax_envs.reset
    jax_envs.reset = lambda seed: seeds.append(seed) or reset(seed=seed)
    state = {"key": jnp.array([[1, 2], [3, 4]], jnp.uint32), "obs": obs.reshape(2, 2, 3)}
    state = theirs.State(*(state.get(field) for field in theirs.State._fields))
    size, idle = 2 if name == "reinforce" else 24, torch.nn.Linear(3, 1)
    idle.act = lambda obs: torch.zeros(len(obs), dtype=torch.int64)
    state, jax_batch = theirs.rollout_on_host(state, lambda _, obs, key: np.zeros((2, 2), int), jax_envs, size)
    if name == "reinforce":
        batch = ours.rollout(idle, envs, seeds[1], args)
    else:
        batch, obs = ours.rollout(idle, envs, envs.reset(seed=seeds[0])[0], args)
        np.testing.assert_array_equal(state.obs.reshape(4, 3), obs)
    assert (batch.obs[..., 0] == RESET).any() and batch.done.sum() >= 4
    for field in jax_batch._fields:  # of REINFORCE's rows those after the last end are zeros in JAX
        x, y = getattr(batch, field), np.concatenate(np.moveaxis(getattr(jax_batch, field), 1, 2)).swapaxes(0, 1)
        np.testing.assert_array_equal(x, y[: len(x)], err_msg=field)
        assert not y[len(x) :].any()
