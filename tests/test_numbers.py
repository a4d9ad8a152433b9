"""Random batches through all the math of a script: finite numbers in, finite numbers and gradients out, and close to
the same in float64.

The error bound: with u = 2^-24, the unit roundoff of float32, the recursions over T steps are within 4 (T + 4) u of the
float64 result, relative to the same recursion over absolute values, which is what cancellation can cost at most. The
losses are within 64 u of the mean absolute summand; where exp is taken of a log-ratio of at most 20 in size, its own
rounding adds 2 u for each unit of the two logarithms.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_math import backend  # noqa: F401, the fixture: PyTorch, JAX

U = 2.0**-24
SHAPES = [(1, 1), (1, 3), (2, 1), (7, 1), (5, 3)]  # few, for JAX compiles each
FLAGS = ["random", "none", "all terminated", "all truncated", "both"]


class Program(NamedTuple):
    seed: int
    shape: tuple
    flags: str
    gamma: float
    gae_lambda: float
    scale: float  # decimal exponent of the rewards and values
    spread: float  # largest |logp - logp_old|
    clip_coef: float
    constant: bool  # equal rewards and values: no spread to divide by


unit = st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])
programs = st.builds(
    Program,
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(SHAPES),
    flags=st.sampled_from(FLAGS),
    gamma=unit,
    gae_lambda=unit,
    scale=st.integers(-6, 6),
    spread=st.sampled_from([0.0, 1e-6, 0.1, 1.0, 20.0]),
    clip_coef=st.sampled_from([1e-3, 0.2, 0.9]),
    constant=st.booleans(),
)


def draw(p: Program) -> tuple[np.ndarray, ...]:
    """reward, value, next_value, terminated, done, logp, logp_old, all float32 of `shape`."""
    rng = np.random.default_rng(p.seed)
    numbers = np.ones((3, *p.shape)) if p.constant else rng.normal(size=(3, *p.shape))
    reward, value, next_value = (numbers * 10.0**p.scale).astype(np.float32)
    terminated, truncated = (rng.random((2, *p.shape)) < 0.3).astype(np.float32)
    if p.flags != "random":
        terminated[:], truncated[:] = p.flags in ("all terminated", "both"), p.flags in ("all truncated", "both")
    logp_old = -rng.exponential(size=p.shape).astype(np.float32)
    logp = logp_old + np.clip(rng.normal(size=p.shape), -1, 1).astype(np.float32) * np.float32(p.spread * 0.999)
    return reward, value, next_value, terminated, np.maximum(terminated, truncated), logp, logp_old


def recursion(x: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """y_t = x_t + decay_t y_{t+1}, in float64."""
    y = np.zeros((len(x) + 1, *x.shape[1:]))
    for t in reversed(range(len(x))):
        y[t] = x[t] + decay[t] * y[t + 1]
    return y[:-1]


def within(actual, expected, magnitude, units):
    assert np.isfinite(actual).all()
    assert (np.abs(actual - expected) <= units * U * magnitude + 1e-37).all(), (actual, expected)


def run(backend, p: Program) -> None:  # noqa: F811
    reward, value, next_value, terminated, done, logp, logp_old = draw(p)
    r, v, w, term, end = (x.astype(np.float64) for x in (reward, value, next_value, terminated, done))
    steps = 4 * (p.shape[0] + 4)

    ret = backend.call(backend.reinforce.discounted_returns, reward, done, p.gamma)
    exact, size = (recursion(x, p.gamma * (1 - end)) for x in (r, np.abs(r)))
    within(ret, exact, size, steps)
    ones = np.ones_like(reward)
    standard = backend.call(backend.reinforce.standardize, ret, ones)
    assert np.isfinite(standard).all()
    within(
        backend.call(backend.reinforce.policy_loss, logp, standard, ones),
        -(logp.astype(float) * standard).sum() / p.shape[1],
        np.abs(logp.astype(float) * standard).sum() / p.shape[1],
        64,
    )
    assert np.isfinite(backend.grad(backend.reinforce.policy_loss, logp, standard, ones)).all()

    for script in (backend.vpg_advantage, backend.ppo):
        adv = backend.call(script.gae, reward, value, next_value, terminated, done, p.gamma, p.gae_lambda)
        decay = p.gamma * p.gae_lambda * (1 - end)
        exact = recursion(r + p.gamma * (1 - term) * w - v, decay)
        within(adv, exact, recursion(np.abs(r) + p.gamma * np.abs(w) + np.abs(v), decay), steps)
        running, carry = backend.call(script.running_returns, reward, done, np.zeros(p.shape[1]), p.gamma)
        assert np.isfinite(running).all() and np.isfinite(carry).all()
        adv = backend.call(script.standardize, adv)
        assert np.isfinite(adv).all() and np.abs(adv).max() <= math.sqrt(adv.size) * 1.001

    a, ratio = adv.astype(float), np.exp(logp.astype(float) - logp_old)
    f = backend.vpg_advantage.policy_loss
    within(backend.call(f, logp, adv), -(logp * a).mean(), np.abs(logp * a).mean(), 64)
    assert np.isfinite(backend.grad(f, logp, adv)).all()
    # the exponent's own rounding: |logp| u in each of them
    units = 64 + 2 * (np.abs(logp).max() + np.abs(logp_old).max())
    f = backend.ppo.policy_loss
    exact = -np.minimum(ratio * a, ratio.clip(1 - p.clip_coef, 1 + p.clip_coef) * a)
    within(backend.call(f, logp, logp_old, adv, p.clip_coef), exact.mean(), (ratio * np.abs(a) + 2).mean(), units)
    assert np.isfinite(backend.grad(f, logp, logp_old, adv, p.clip_coef)).all()
    f = backend.ppo.approx_kl
    x = logp.astype(float) - logp_old
    within(
        backend.call(f, logp, logp_old), (np.expm1(x) - x).mean(), (np.abs(np.expm1(x)) + np.abs(x) + 1).mean(), units
    )
    assert np.isfinite(backend.grad(f, logp, logp_old)).all()
    plain, size = 0.5 * (v - r) ** 2, 0.5 * (np.abs(v) + np.abs(r)) ** 2
    f = backend.vpg_advantage.value_loss
    within(backend.call(f, value, reward), plain.mean(), size.mean(), 64)
    assert np.isfinite(backend.grad(f, value, reward)).all()
    for clip in (None, p.clip_coef):
        f = backend.ppo.value_loss
        clipped = plain if clip is None else 0.5 * (w + (v - w).clip(-clip, clip) - r) ** 2
        size = (np.abs(v) + np.abs(r) + np.abs(w)) ** 2
        within(backend.call(f, value, next_value, reward, clip), np.maximum(plain, clipped).mean(), size.mean(), 64)
        assert np.isfinite(backend.grad(f, value, next_value, reward, clip)).all()


FIXED = settings(deadline=None, derandomize=True, database=None, max_examples=200)


@FIXED
@given(program=programs)
def test_programs(backend, program):  # noqa: F811
    run(backend, program)


@pytest.mark.slow
@settings(FIXED, max_examples=10_000)
@given(program=programs)
def test_ten_thousand_programs(backend, program):  # noqa: F811
    run(backend, program)
