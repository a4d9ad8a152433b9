"""The pure functions of every script against oracles that share no code with them: numbers worked out by hand, sums
written from the definition in float64, NumPy.

Tolerances are a few units in the last place of float32 (6e-8 of the largest number that takes part) unless said
otherwise.
"""

import importlib
import math
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

ACTOR_CRITIC = pytest.mark.parametrize("script", ["vpg_advantage", "ppo"])  # which have some functions in common


class Torch:
    """Calls a function of a PyTorch script with NumPy arrays, or lists, and gives NumPy back."""

    def __init__(self, suffix=""):
        names = "reinforce", "vpg_advantage", "ppo"
        self.reinforce, self.vpg_advantage, self.ppo = (importlib.import_module(name + suffix) for name in names)

    def convert(self, x):
        return torch.tensor(np.asarray(x, np.float32)) if isinstance(x, list | np.ndarray) else x

    def call(self, function, *args):
        """The result; a tuple of arrays where the function returns several."""
        out = function(*map(self.convert, args))
        return tuple(map(np.asarray, out)) if isinstance(out, tuple) else np.asarray(out)

    def grad(self, function, x, *args):
        """Gradient of the scalar function with respect to its first argument."""
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
    """Equal up to `tol` of the size of the numbers, and of the same shape: no broadcasting."""
    expected = np.asarray(expected)
    assert np.shape(actual) == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=tol, atol=tol)


def random_episodes(seed):
    """A batch in which terminations and time limits, sometimes both at once, cut several episodes."""
    rng = np.random.default_rng(seed)
    shape = T, _ = (12, 3) if seed else (1, 1)
    reward, value, final_value = rng.normal(size=(3, *shape))
    terminated, truncated = (rng.random((2, *shape)) < 0.2).astype(float)
    done = np.maximum(terminated, truncated)
    following = np.concatenate([value[1:], final_value[-1:]])
    next_value = np.where(done == 1, final_value, following)  # V of the last observation, not of the reset one
    return T, reward, value, next_value, terminated, done


# ==== Returns ====


def test_discounted_returns_printed_check(backend):
    """The course's printed numbers, two episodes of rewards 0, 1, ..., 10, to all their decimals."""
    printed = "1.9883 3.9766 5.9531 7.9062 9.8125 11.6250 13.2500 14.5000 15.0000 14.0000 10.0000"
    reward, done = column(*range(11), *range(11)), column(*[0] * 10, 1, *[0] * 10, 1)
    ret = backend.call(backend.reinforce.discounted_returns, reward, done, 0.5)
    assert " ".join(f"{x:.4f}" for x in ret[:, 0]) == f"{printed} {printed}"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounted_returns_double_sum(backend, seed, gamma):
    """G_t = sum_i gamma^(i-t) R_i up to the episode's end: a wrong exponent, or a sum that runs across the end."""
    T, reward, _, _, _, done = random_episodes(seed)
    expected = np.zeros_like(reward)
    for t, n in np.ndindex(reward.shape):
        end = next((i for i in range(t, T) if done[i, n]), T - 1)
        expected[t, n] = sum(gamma ** (i - t) * reward[i, n] for i in range(t, end + 1))
    close(backend.call(backend.reinforce.discounted_returns, reward, done, gamma), expected, 1e-5)


@ACTOR_CRITIC
def test_running_returns_by_hand(backend, script):
    """Two three-step episodes beside one that goes on: (1 - done) applied too early drops the history, applied not at
    all leaks an episode into the next one."""
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
    adv = backend.call(
        getattr(backend, script).gae, reward, value, next_value, column(0, terminated, 0), column(0, 1, 0), 0.5, 0.8
    )
    a1 = 2 + 0.5 * bootstrap - 0.7
    close(adv, column(1 + 0.5 * 0.7 - 0.5 + 0.4 * a1, a1, 3 + 0.5 * 60 - 100))


@ACTOR_CRITIC
@pytest.mark.parametrize("seed", range(20))
def test_gae_double_sum(backend, script, seed):
    """A_t = sum_l (gamma lambda)^l delta_{t+l} up to the episode's end: the exponent that three libraries misprint."""
    T, reward, value, next_value, terminated, done = random_episodes(seed)
    gamma, lam = np.random.default_rng(seed).uniform(0.5, 1, 2)
    expected = np.zeros_like(reward)
    for t, n in np.ndindex(reward.shape):
        for i in range(t, T):
            bootstrap = 0 if terminated[i, n] else gamma * next_value[i, n]
            expected[t, n] += (gamma * lam) ** (i - t) * (reward[i, n] + bootstrap - value[i, n])
            if done[i, n]:
                break
    adv = backend.call(getattr(backend, script).gae, reward, value, next_value, terminated, done, gamma, lam)
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
        loss_or_gradient = partial(compute, backend.reinforce.policy_loss)
        assert np.array_equal(loss_or_gradient(*with_junk, mask), loss_or_gradient(*without, mask))


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

LOG_RATIOS = st.lists(  # of all sizes, from far below the resolution of float32 up to 20
    st.tuples(st.sampled_from([1, -1]), st.floats(-12, math.log10(20))), min_size=1, max_size=5
).map(lambda draws: np.array([sign * 10**exponent for sign, exponent in draws], np.float32))


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(logp_old=st.floats(-12, 0, width=32), log_ratio=LOG_RATIOS)
def test_approx_kl(backend, logp_old, log_ratio):
    """The mean of expm1(x) - x, in float64; swapped arguments or the estimator -x differ in the first digit. Never
    negative, as (r - 1) - log r as in the textbook is for a quarter of these inputs, nor is the gradient infinite."""
    logp_old = np.full_like(log_ratio, logp_old)
    logp = logp_old + log_ratio
    x = logp.astype(np.float64) - logp_old
    tol = 3e-6 * (np.abs(np.expm1(x)) + np.abs(x)).mean()  # of a small x, subtraction leaves only x^2 / 2
    actual = backend.call(backend.ppo.approx_kl, logp, logp_old)
    assert actual.shape == () and actual >= 0
    assert abs(actual - (np.expm1(x) - x).mean()) <= tol
    assert np.isfinite(backend.grad(backend.ppo.approx_kl, logp, logp_old)).all()


# ==== Shapes ====


@pytest.mark.parametrize(
    ("script", "name", "count", "rest"),
    [
        ("vpg_advantage", "policy_loss", 2, ()),
        ("vpg_advantage", "value_loss", 2, ()),
        ("ppo", "policy_loss", 3, (0.2,)),
        ("ppo", "value_loss", 3, (0.2,)),
        ("ppo", "approx_kl", 2, ()),
    ],
)
def test_losses_take_any_leading_shape(backend, script, name, count, rest):
    """One sample at a time and averaged, or all at once in two axes: the same scalar."""
    f, x = getattr(getattr(backend, script), name), np.random.default_rng(0).normal(size=(count, 6))
    one_by_one = [backend.call(f, *(row[i : i + 1] for row in x), *rest) for i in range(6)]
    close(backend.call(f, *x.reshape(count, 2, 3), *rest), np.mean(one_by_one))


# ==== Shuffling ====


@pytest.mark.parametrize("script", ["vpg_advantage_jax", "ppo_jax"])
def test_shuffle(script):
    """Sorting words whose low bits are the index gives permutations, each index once, and of three things all six,
    equally often: chi-square over 6,000, fixed seed. (torch.randperm is not ours to test.)"""
    jax, shuffle = importlib.import_module("jax"), importlib.import_module(script).shuffle
    for size in (1, 48, 65):
        assert np.array_equal(np.sort(shuffle(jax.random.key(0), size)), np.arange(size))
    orders = jax.vmap(lambda key: shuffle(key, 3))(jax.random.split(jax.random.key(0), 6000))
    _, counts = np.unique(np.asarray(orders), axis=0, return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 0.001
