"""The equations of every script against numbers worked out by hand and sums written from the definition.

Tolerances are a few roundings of float32, 6e-8 each, of the largest number that takes part.
"""

import importlib
import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

ACTOR_CRITIC = pytest.mark.parametrize("script", ["vpg_advantage", "ppo"])  # which have some functions in common


class Torch:
    """Calls functions of the PyTorch scripts with NumPy arrays or lists, and gives NumPy back."""

    def __init__(self, suffix=""):
        names = "reinforce", "vpg_advantage", "ppo"
        self.reinforce, self.vpg_advantage, self.ppo = (importlib.import_module(name + suffix) for name in names)

    def convert(self, x):
        return torch.tensor(np.asarray(x, np.float32)) if isinstance(x, list | np.ndarray) else x

    def call(self, function, *args):
        out = function(*map(self.convert, args))
        return tuple(map(np.asarray, out)) if isinstance(out, tuple) else np.asarray(out)

    def grad(self, function, x, *args):
        """With respect to the first argument."""
        x = self.convert(x).requires_grad_()
        return torch.autograd.grad(function(x, *map(self.convert, args)), x)[0].numpy()


class Jax(Torch):
    """The same for the JAX scripts, compiled as they are in use."""

    def __init__(self):
        super().__init__("_jax")
        jax = importlib.import_module("jax")
        self.compile = cache(jax.jit)
        self.compile_grad = cache(lambda function: jax.jit(jax.grad(function)))

    def convert(self, x):
        return np.asarray(x, np.float32) if isinstance(x, list | np.ndarray) else x

    def call(self, function, *args):
        return super().call(self.compile(function), *args)

    def grad(self, function, *args):
        return super().call(self.compile_grad(function), *args)


@pytest.fixture(scope="module", params=[Torch, Jax], ids=["torch", "jax"])
def backend(request):
    return request.param()


def column(*numbers):
    """[T, 1], one environment."""
    return np.array(numbers, np.float32)[:, None]


def close(actual, expected, tol=1e-6):
    assert np.shape(actual) == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=tol, atol=tol)


# ==== Returns ====


def test_discounted_returns_printed_check(backend):
    """The course's printed numbers, two episodes of rewards 0, 1, ..., 10, to all their decimals."""
    printed = "1.9883 3.9766 5.9531 7.9062 9.8125 11.6250 13.2500 14.5000 15.0000 14.0000 10.0000"
    reward, done = column(*range(11), *range(11)), column(*[0] * 10, 1, *[0] * 10, 1)
    ret = backend.call(backend.reinforce.discounted_returns, reward, done, 0.5)
    assert " ".join(f"{x:.4f}" for x in ret[:, 0]) == f"{printed} {printed}"


@ACTOR_CRITIC
def test_running_returns_by_hand(backend, script):
    """Two three-step episodes beside one that goes on from the batch before."""
    reward = np.array([[1, 1], [2, 2], [3, 3], [4, 4], [5, 5], [6, 6]])
    done = np.array([[0, 0], [0, 0], [1, 0], [0, 0], [0, 0], [1, 0]])
    ret, carry = backend.call(getattr(backend, script).running_returns, reward, done, np.array([0, 2]), 0.5)
    close(ret[:, 0], [1, 2.5, 4.25, 4, 7, 9.5])
    close(ret[:, 1], [2, 3, 4.5, 6.25, 8.125, 10.0625])
    close(carry, [0, 10.0625])


# ==== Advantages ====


@ACTOR_CRITIC
@pytest.mark.parametrize(("terminated", "bootstrap"), [(0, 50), (1, 0)])
def test_gae_time_limit(backend, script, terminated, bootstrap):
    """A time limit bootstraps from V(final observation), unless the task ended on the same step; nothing is carried
    across it."""
    reward, value, next_value = column(1, 2, 3), column(0.5, 0.7, 100), column(0.7, 50, 60)
    ends = column(0, terminated, 0), column(0, 1, 0)
    adv = backend.call(getattr(backend, script).gae, reward, value, next_value, *ends, 0.5, 0.8)
    a1 = 2 + 0.5 * bootstrap - 0.7
    close(adv, column(1 + 0.5 * 0.7 - 0.5 + 0.4 * a1, a1, 3 + 0.5 * 60 - 100))


@ACTOR_CRITIC
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_gae_double_sum(backend, script, gamma):
    """A_t = sum_l (gamma lambda)^l delta_{t+l} up to the episode's end."""
    rng = np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, 50, 4))
    terminated, truncated = (rng.random((2, 50, 4)) < 0.1).astype(float)
    done, expected = np.maximum(terminated, truncated), np.zeros((50, 4))
    for t, n in np.ndindex(50, 4):
        for i in range(t, 50):
            delta = reward[i, n] + gamma * (1 - terminated[i, n]) * next_value[i, n] - value[i, n]
            expected[t, n] += (gamma * 0.8) ** (i - t) * delta
            if done[i, n]:
                break
    adv = backend.call(getattr(backend, script).gae, reward, value, next_value, terminated, done, gamma, 0.8)
    close(adv, expected, 1e-5)


# ==== Policy losses ====


def test_reinforce_policy_loss(backend):
    """-1/N sum_n sum_t logp G over two episodes, of two steps and of one: not the mean over steps."""
    logp, ret = np.array([[-1, -2], [-0.5, -3]]), np.array([[3, 5], [4, 7]])
    mask, f = np.array([[1, 1], [1, 0]]), backend.reinforce.policy_loss
    close(backend.call(f, logp, ret, mask), (1 * 3 + 2 * 5 + 0.5 * 4) / 2)
    close(backend.grad(f, logp, ret, mask), np.array([[-3, -5], [-4, 0]]) / 2)


@pytest.mark.parametrize("junk", [1.0, -1e3, 1e15])
def test_reinforce_masked_steps(backend, junk):
    """What an environment does after its episode, however large, changes neither loss nor gradient."""
    mask, noise = np.arange(5)[:, None] < [5, 2, 3], np.random.default_rng(0).normal(size=(2, 5, 3))
    with_junk, without = (np.where(mask, noise, x) for x in (junk, 0))
    for compute in (backend.call, backend.grad):
        losses = [compute(backend.reinforce.policy_loss, *x, mask) for x in (with_junk, without)]
        assert np.array_equal(*losses)


def test_vpg_policy_loss(backend):
    """-mean(logp A) and its gradient -A / n."""
    logp, adv = np.array([-1, -2, -0.5]), np.array([2, -1, 4])
    f = backend.vpg_advantage.policy_loss
    close(backend.call(f, logp, adv), (1 * 2 - 2 * 1 + 0.5 * 4) / 3)
    close(backend.grad(f, logp, adv), np.array([-2, 1, -4]) / 3)


CLIP_CASES = [  # ratio, advantage, loss = -min(r A, clip(r, 0.8, 1.2) A), d loss / d logp = -r A where r A is the min
    (1.5, 2, -2.4, 0.0),  # good and already likelier: nothing more to gain
    (0.5, 2, -1.0, -1.0),  # good and less likely: pulled back, however far
    (1.5, -2, 3.0, 3.0),  # bad and likelier: pushed down, however far
    (0.5, -2, 1.6, 0.0),  # bad and already less likely
    (1.1, 2, -2.2, -2.2),  # within the range it is the plain surrogate
    (0.9, -2, 1.8, 1.8),
]


@pytest.mark.parametrize(("ratio", "adv", "loss", "gradient"), CLIP_CASES)
def test_ppo_policy_loss_cases(backend, ratio, adv, loss, gradient):
    """Sign of the advantage x side of the clip range: a clip without the min stops the wrong two of them."""
    args = [math.log(ratio) - 3], [-3.0], [adv], 0.2
    close(backend.call(backend.ppo.policy_loss, *args), loss)
    close(backend.grad(backend.ppo.policy_loss, *args), [gradient])


# ==== Value losses ====


@pytest.mark.parametrize("script", ["vpg_advantage", "ppo without clipping"])
def test_value_loss(backend, script):
    """Half the mean squared error; PPO's old value has no say unless the clip is on."""
    value, ret = np.array([1, 2, 5]), np.array([0, 4, 2])
    rest, f = (ret,), backend.vpg_advantage.value_loss
    if script != "vpg_advantage":
        rest, f = (np.array([9, -9, 9]), ret, None), backend.ppo.value_loss
    close(backend.call(f, value, *rest), 0.5 * (1 + 4 + 9) / 3)
    close(backend.grad(f, value, *rest), np.array([1, -2, 3]) / 3)


VALUE_CASES = [  # value, return, 0.5 max((v - G)^2, (clip(v, 4.8, 5.2) - G)^2), d loss / d value; the old value is 5
    (6, 6, 0.32, 0.0),  # moved past the clip onto the return: the clipped error, 0.8, is the larger
    (4, 4, 0.32, 0.0),
    (6, 4, 2.0, 2.0),  # moved away from the return: the plain error is the larger
    (4, 6, 2.0, -2.0),
    (5.1, 6, 0.405, -0.9),  # not clipped, both are the same
]


@pytest.mark.parametrize(("value", "ret", "loss", "gradient"), VALUE_CASES)
def test_ppo_value_loss_clipped(backend, value, ret, loss, gradient):
    """The larger of the two losses: the smaller would reward large moves."""
    args = [value], [5.0], [ret], 0.2
    close(backend.call(backend.ppo.value_loss, *args), loss)
    close(backend.grad(backend.ppo.value_loss, *args), [gradient])


# ==== Approximate KL ====


@pytest.mark.parametrize("size", [1e-12, 1e-8, 1e-5, 1e-3, 0.1, 1, 20])
def test_approx_kl(backend, size):
    """The mean of expm1(x) - x, in float64. Never negative, as (r - 1) - log r is where rounding outweighs x^2 / 2."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        logp_old = rng.uniform(-12, 0, 5).astype(np.float32)
        logp = logp_old + size * rng.uniform(-1, 1, 5).astype(np.float32)
        x = logp.astype(np.float64) - logp_old
        actual = backend.call(backend.ppo.approx_kl, logp, logp_old)
        assert actual.shape == () and actual >= 0
        tol = 3e-6 * (np.abs(np.expm1(x)) + np.abs(x)).mean()  # of a small x, subtraction leaves only x^2 / 2
        assert abs(actual - (np.expm1(x) - x).mean()) <= tol
        assert np.isfinite(backend.grad(backend.ppo.approx_kl, logp, logp_old)).all()


# ==== Shuffling ====


@pytest.mark.parametrize("script", ["vpg_advantage_jax", "ppo_jax"])
def test_shuffle(script):
    """Each index once; the six orders of three equally often, by chi-square over 6,000, fixed seed."""
    jax, shuffle = importlib.import_module("jax"), importlib.import_module(script).shuffle
    for size in (1, 48, 65):
        assert np.array_equal(np.sort(shuffle(jax.random.key(0), size)), np.arange(size))
    orders = jax.vmap(lambda key: shuffle(key, 3))(jax.random.split(jax.random.key(0), 6000))
    _, counts = np.unique(np.asarray(orders), axis=0, return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 0.001
