"""PyTorch and JAX say the same: from equal weights and one batch, equal losses, gradients and updated parameters."""

import importlib
import sys
from contextlib import closing
from functools import partial

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

PAIRS = ("reinforce", "vpg_advantage", "ppo")
SPACES = {"discrete": gym.spaces.Discrete(3), "continuous": gym.spaces.Box(-1, 1, (2,))}
T, N, D = 16, 4, 5
# One float32 rounding is 6e-8; sums over 64 steps and two layers of 64 units stay well below this.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Spaces:
    """All of a vector environment that an agent is built from."""

    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (D,))

    def __init__(self, kind):
        self.single_action_space = SPACES[kind]


def modules(name):
    return importlib.import_module(name), importlib.import_module(f"{name}_jax")


def args_for(name, torch_module, jax_module, **flags):
    if name != "reinforce":  # one minibatch, for the two shuffle differently
        flags = {"num_steps": T, "num_minibatches": 1, "update_epochs": 1, "total_timesteps": 10 * T * N} | flags
    flags = {"num_envs": N, "learning_rate": 1e-2} | flags
    return torch_module.Args(**flags), jax_module.Args(**flags)


def to_flax(agent):
    """The parameters of a PyTorch agent in flax's layout: kernels are transposed weights."""
    params = {}
    for name, x in agent.named_parameters():
        x = x.detach().numpy().copy()  # JAX may share memory with an array, and the optimiser writes into it
        if name == "log_std":
            params[name] = jnp.asarray(x)
            continue
        network, layer, kind = name.split(".")
        layers = params.setdefault(network, {}).setdefault(f"layers_{layer}", {})
        layers["kernel" if kind == "weight" else "bias"] = jnp.asarray(x.T)
    return params


def assert_same_tree(ours, theirs):
    leaves, others = jax.tree.leaves_with_path(ours), jax.tree.leaves_with_path(theirs)
    assert [path for path, _ in leaves] == [path for path, _ in others]
    for (path, x), (_, y) in zip(leaves, others, strict=True):
        np.testing.assert_allclose(x, y, **CLOSE, err_msg=str(path))


def random_flags(rng, p=0.15):
    return (rng.random((T, N)) < p).astype(np.float32)


def random_batch(name, module, kind, rng):
    """A batch of noise, with terminations and truncations; for REINFORCE one episode in each column, then the mask."""
    space = SPACES[kind]
    action = rng.integers(0, 3, (T, N)) if kind == "discrete" else rng.normal(size=(T, N, *space.shape))
    fields = {
        "obs": rng.normal(size=(T, N, D)),
        "next_obs": rng.normal(size=(T, N, D)),
        "action": action,
        "reward": rng.normal(size=(T, N)),
        "terminated": random_flags(rng),
        "truncated": random_flags(rng),
        "step": np.arange(1, T + 1) * N,
        "episode_return": np.zeros((T, N)),
        "episode_length": np.zeros((T, N)),
    }
    if name == "reinforce":
        ends = rng.integers(3, T, N)
        t = np.arange(T)[:, None]
        fields |= {"done": (t == ends), "mask": (t <= ends)}
    fields = {k: x if x.dtype == np.int64 else x.astype(np.float32) for k, x in fields.items()}
    return module.Batch(*(fields[field] for field in module.Batch._fields))


def build(name, kind, **flags):
    """Twin agents with equal weights and statistics, moved away from the initial ones (a policy that is nearly uniform,
    statistics that do nothing)."""
    torch_module, jax_module = modules(name)
    torch_args, jax_args = args_for(name, torch_module, jax_module, **flags)
    torch.manual_seed(0)
    agent = torch_module.Agent(Spaces(kind), torch_args)
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name_, buffer in agent.named_buffers():  # as if 100 rows had been seen
            buffer.copy_(torch.tensor(100.0) if name_.endswith("count") else 0.5 + torch.rand_like(buffer))
    jax_agent = jax_module.make_agent(Spaces(kind), jax_args)
    variables = jax.jit(jax_agent.init)(jax.random.PRNGKey(0), jnp.zeros((N, D)))
    variables = {**variables, "params": to_flax(agent)}
    for name_, buffer in agent.named_buffers():
        stats, field = name_.split(".")
        variables["stats"][stats][field] = jnp.asarray(buffer.numpy().copy())
    return torch_module, torch_args, agent, jax_module, jax_args, jax_agent, variables


FLAGS = {
    "reinforce": [{}, {"norm_return": False, "ent_coef": 0.01}, {"gamma": 0.9, "activation": "relu"}],
    "vpg_advantage": [{}, {"norm_adv": True, "ent_coef": 0.01}, {"norm_obs": True, "norm_reward": True}],
    "ppo": [{}, {"norm_adv": False, "ent_coef": 0.01, "clip_vloss": True}, {"norm_obs": True, "norm_reward": True}],
}


def half_slow(cases):
    """Every value among the fast tests, but only half of the combinations."""
    return [pytest.param(*case, marks=[] if i % 4 in (0, 3) else [pytest.mark.slow]) for i, case in enumerate(cases)]


UPDATES = [(name, flags, kind) for name in PAIRS for flags in FLAGS[name] for kind in SPACES]


@pytest.mark.parametrize(("name", "flags", "kind"), half_slow(UPDATES))
def test_one_update(name, flags, kind):
    """The whole update: metrics, parameters after the optimiser's steps, running statistics, next step count."""
    torch_module, torch_args, agent, jax_module, jax_args, jax_agent, variables = build(name, kind, **flags)
    batch = random_batch(name, torch_module, kind, np.random.default_rng(1))
    if name != "reinforce":  # so far out that normalised they are clipped
        batch.obs[2, 1] *= 50 if torch_args.norm_obs else 1
        batch.reward[3, 2] = 50 if torch_args.norm_reward else 1
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
    running = np.linspace(-2, 3, N, dtype=np.float32)
    extra = {} if name == "reinforce" else {"obs": np.zeros((N, D)), "running_return": torch.tensor(running)}
    state = torch_module.State(agent, agent.act, torch_module.backward, optimizer, torch.device("cpu"), [], **extra)
    state, torch_metrics = torch_module.update(state, batch, torch_args)

    opt_state = jax_module.make_optimizer(jax_args).init(variables["params"])
    zero, key = jnp.zeros((), jnp.int32), jax.random.PRNGKey(0)
    extra = {} if name == "reinforce" else {"env": None, "obs": None, "running_return": jnp.asarray(running)}
    jax_state = jax_module.State(variables, opt_state, key, step=zero, iteration=zero, **extra)
    jax_batch = jax_module.Batch(*map(jnp.asarray, batch))
    jax_update = jax.jit(partial(jax_module.update, agent=jax_agent, args=jax_args))
    jax_state, jax_metrics = jax_update(jax_state, jax_batch)

    assert set(torch_metrics) == set(jax_metrics)
    for key, x in torch_metrics.items():
        np.testing.assert_allclose(x, jax_metrics[key], rtol=1e-4, atol=1e-5, err_msg=key)  # sums, not means
    assert_same_tree(to_flax(agent), jax_state.variables["params"])
    if "stats" in jax_state.variables:
        for stats in ("obs_stats", "return_stats"):
            for buffer, x in jax_state.variables["stats"][stats].items():
                np.testing.assert_allclose(getattr(getattr(agent, stats), buffer), x, **CLOSE, err_msg=buffer)
        np.testing.assert_allclose(state.running_return, jax_state.running_return, **CLOSE)
    assert int(jax_state.step) == state.step == T * N


@pytest.mark.parametrize(("name", "kind"), half_slow([(name, kind) for name in PAIRS[1:] for kind in SPACES]))
def test_one_update_in_parts(name, kind, monkeypatch):
    """4,800 rows, which JAX takes in ten parts and PyTorch all at once."""
    monkeypatch.setattr(sys.modules[__name__], "N", 300)
    test_one_update(name, {"norm_adv": True, "norm_reward": True, "ent_coef": 0.01, "norm_obs": True}, kind)


@pytest.mark.parametrize("end", [3, 2, 1])
def test_epochs_and_minibatches(end, monkeypatch):
    """Three epochs of four minibatches from the same shuffles; or, by a target KL, two: it is above the first epoch's
    mean, though below its last minibatch's; or one."""
    torch_module, jax_module = modules("ppo")
    orders, kls = [np.random.default_rng(i).permutation(T * N) for i in range(3)], []
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.as_tensor(next(given)))
    monkeypatch.setattr(jax_module, "shuffles", lambda *_: jnp.asarray(np.stack(orders)))
    flags = {"update_epochs": 3, "num_minibatches": 4, "learning_rate": 1e-3}
    if end < 3:
        given, approx_kl = iter(orders), torch_module.approx_kl
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_module, "approx_kl", lambda *x: kls.append(approx_kl(*x)) or kls[-1])
            test_one_update("ppo", flags, "discrete")
        first, second = torch.stack(kls).view(3, 4)[:2].mean(1).tolist()
        last = kls[3].item()
        assert 1.2 * first < last < 0.8 * second
        flags["target_kl"] = (first + last) / 2 if end == 2 else 0.9 * first
    given = iter(orders)
    test_one_update("ppo", flags, "discrete")
    assert len(list(given)) == 3 - end


@pytest.mark.parametrize("name", PAIRS)
def test_rollout_on_host(name, first_step=2**24 + 1):  # which float32 cannot count
    """What PyTorch sees of an environment that takes no notice of actions, JAX sees."""
    torch_module, jax_module = modules(name)
    flags = {"env_id": "tests.toy_envs:Ledger-v0", "num_envs": 4} | ({} if name == "reinforce" else {"num_steps": 25})
    args, jax_args = torch_module.Args(**flags), jax_module.Args(**flags)
    with closing(torch_module.make_envs(args)) as envs:
        agent, extra = torch_module.Agent(envs, args), {}
        if name != "reinforce":
            extra = {"obs": envs.reset(seed=torch_module.env_seeds(1, first_step, 4))[0], "running_return": None}
        state = torch_module.State(agent, agent.act, None, None, torch.device("cpu"), [], **extra, step=first_step)
        state, batch = torch_module.rollout(state, envs, args)
    with closing(jax_module.make_envs(jax_args)) as envs:
        agent = jax_module.make_agent(envs, jax_args)
        jax_state = jax_module.init_state(1, agent, *([] if name == "reinforce" else [envs]), jax_args)
        if name != "reinforce":
            jax_state = jax_state._replace(obs=envs.reset(seed=jax_module.env_seeds(1, first_step, 4))[0])
        jax_state = jax_state._replace(step=jnp.array(first_step))
        act = partial(agent.apply, method="act")
        jax_state, jax_batch = jax_module.rollout_on_host(jax_state, act, envs, jax_args)
    assert batch._fields == jax_batch._fields and batch.done.any() and batch.step[0] == first_step + 4
    for field in set(batch._fields) - {"action"}:  # of REINFORCE's rows those after the last end are zeros in JAX
        np.testing.assert_array_equal(getattr(batch, field), getattr(jax_batch, field)[: len(batch.obs)], err_msg=field)
    if name == "reinforce":
        assert not jax_batch.mask[len(batch.obs) :].any()
    else:
        np.testing.assert_array_equal(state.obs, jax_state.obs)


def minibatch(module, kind, rng):
    """Rows for the loss, with probability ratios on both sides of the clip range."""
    m = T * N
    action = rng.integers(0, 3, m) if kind == "discrete" else rng.normal(size=(m, 2)).astype(np.float32)
    obs = rng.normal(size=(m, D)).astype(np.float32)
    others = {k: rng.normal(size=m).astype(np.float32) for k in ("adv", "ret", "logp_old", "value_old")}
    fields = {"obs": obs, "action": action, **others}
    fields["logp_old"] -= 2
    return [fields[field] for field in module.Minibatch._fields]


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_gradients(name, kind):
    """The loss, what is logged of it and the gradient of every parameter."""
    torch_module, torch_args, agent, jax_module, jax_args, jax_agent, variables = build(name, kind, ent_coef=0.01)
    rng = np.random.default_rng(2)
    if name == "reinforce":
        batch, ret = random_batch(name, torch_module, kind, rng), rng.normal(size=(T, N)).astype(np.float32)
        rows = torch_module.Batch(*map(torch.as_tensor, batch)), torch.as_tensor(ret)
        jax_rows = (variables["params"], jax_module.Batch(*map(jnp.asarray, batch)), jnp.asarray(ret))
    else:
        fields = minibatch(torch_module, kind, rng)
        rows = (torch_module.Minibatch(*map(torch.as_tensor, fields)),)
        jax_rows = (variables["params"], variables["stats"], jax_module.Minibatch(*map(jnp.asarray, fields)))
    loss, metrics = torch_module.loss_fn(agent, *rows, torch_args)
    loss.backward()
    jax_loss_fn = partial(jax_module.loss_fn, agent=jax_agent, args=jax_args)
    (jax_loss, jax_metrics), grads = jax.jit(jax.value_and_grad(jax_loss_fn, has_aux=True))(*jax_rows)
    np.testing.assert_allclose(loss.item(), jax_loss, **CLOSE)
    for key, x in metrics.items():
        np.testing.assert_allclose(x.detach(), jax_metrics[key], **CLOSE, err_msg=key)
    for p in agent.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    assert_same_tree(to_flax(agent), grads)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", PAIRS)
def test_returns_and_advantages(name, seed):
    """The functions over time agree to 1e-6 of their scale, on noise cut by terminations and truncations."""
    torch_module, jax_module = modules(name)
    rng = np.random.default_rng(seed)
    reward, value, next_value = rng.normal(size=(3, 64, N)).astype(np.float32)
    terminated, truncated = (rng.random((2, 64, N)) < 0.1).astype(np.float32)
    done = np.maximum(terminated, truncated)
    if name == "reinforce":
        calls = [("discounted_returns", (reward, done), (0.99,))]
    else:
        carry = rng.normal(size=N).astype(np.float32)
        calls = [
            ("gae", (reward, value, next_value, terminated, done), (0.99, 0.95)),
            ("running_returns", (reward, done, carry), (0.99,)),
        ]
    for function, arrays, numbers in calls:
        ours = getattr(torch_module, function)(*map(torch.as_tensor, arrays), *numbers)
        theirs = getattr(jax_module, function)(*map(jnp.asarray, arrays), *numbers)
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6 * float(np.abs(y).max()), err_msg=function)


@pytest.mark.parametrize("name", PAIRS)
def test_initial_weights(name):
    """Every layer starts at the same scale: orthogonal with equal singular values, biases and log std at 0."""
    torch_module, jax_module = modules(name)
    torch_args, jax_args = args_for(name, torch_module, jax_module, hidden_sizes=(32, 16))
    ours = to_flax(torch_module.Agent(Spaces("continuous"), torch_args))
    agent = jax_module.make_agent(Spaces("continuous"), jax_args)
    theirs = agent.init(jax.random.PRNGKey(3), jnp.zeros((N, D)))["params"]
    for (path, x), (other, y) in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves_with_path(theirs), strict=True):
        assert path == other
        if x.ndim == 2:
            x, y = np.linalg.svd(x)[1], np.linalg.svd(y)[1]
        np.testing.assert_allclose(x, y, atol=1e-5, err_msg=str(path))


@pytest.mark.parametrize("anneal", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_learning_rate(name, anneal):
    """The schedule, at every update of a run."""
    torch_module, jax_module = modules(name)
    torch_args, jax_args = args_for(name, torch_module, jax_module, anneal_lr=anneal)
    steps = range(0, torch_args.last_step, T * N)
    ours = [torch_module.learning_rate(step, torch_args) for step in steps]
    theirs = [float(jax_module.learning_rate(jnp.asarray(step, jnp.int32), jax_args)) for step in steps]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert ours[0] == torch_args.learning_rate
    assert ours[-1] == pytest.approx(torch_args.learning_rate * (1 - steps[-1] / torch_args.last_step if anneal else 1))
