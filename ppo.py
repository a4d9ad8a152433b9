# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium>=1.1,<1.4",
#     "numpy>=1.26,<3",
#     "tensorboard>=2.18,<3",
#     "torch>=2.9,<2.14",
#     "tqdm>=4.66,<5",
#     "tyro>=0.9,<2",
# ]
# ///
"""Proximal policy optimisation (PPO) with the clipped surrogate objective, in PyTorch.

The policy gradient of vpg_advantage.py is valid only for the policy that played the batch, so a batch is good for
about one step. PPO takes many, on a surrogate that gains nothing from moving the probability ratio r_t further than
eps from 1:

    maximise  E_t[ min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) ],   r_t = pi(a_t|s_t) / pi_old(a_t|s_t)    [2, eq. 7]

with a squared-error value loss and an entropy bonus added [2, eq. 9], and A_t the generalised advantage (GAE)

    delta_t = R_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)                                     [1, sec. 3; 2, eq. 12]
    A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1}                                         [1, eq. 16; 2, eq. 11]

A time limit is no failure: the rest of an episode that it truncates is worth V(s'_t), s'_t being the observation at
the cut. Only `terminated` means that nothing follows; `done`, terminated or truncated, stops the sum.

[1] Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage Estimation, arXiv:1506.02438
[2] Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347

Shapes: time comes first. T = num_steps, N = num_envs, M = minibatch_size; D and A are the sizes of an observation
and a Box action. Booleans are floats, 0 or 1; the rewards and dones of step t follow its action.
A resumed run has the weights, optimiser, statistics and random state of the saved one; its episodes start afresh.

Run:   python ppo.py --env-id CartPole-v1
Diff:  diff vpg_advantage.py ppo.py (what clipping adds)
       diff ppo.py ppo_jax.py (the same in JAX)
"""

import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.util import find_spec
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, get_args
from zipfile import ZipFile

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ===================================================== Arguments ======================================================


def bounded(default, interval: str):
    """A flag whose value, or each of whose values, must lie in `interval`, written as in mathematics: "(0, 1]"."""
    return field(default=default, metadata={"interval": interval})


@dataclass(frozen=True)
class Args:
    """Train an agent by PPO; the log, the arguments and the checkpoint go to a new folder under runs/."""

    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    env_id: str = "CartPole-v1"  # any Gymnasium id; module:Id imports the module first
    seed: int = bounded(1, "[0, 4294967295]")  # fixes every random number
    total_timesteps: int = bounded(200_000, "[1, inf)")  # environment steps, all environments together
    cuda: bool = False  # use the GPU; with few environments the CPU is faster
    compile: bool = False  # torch.compile loss and gradient, on a GPU the policy too: slow to start, then faster
    async_envs: bool = False  # a process per environment: for slow ones, with about a core for each
    capture_video: bool = False  # record the evaluation to <run folder>/videos
    save_every: int = bounded(50, "[0, inf)")  # iterations between checkpoints; 0: only at the end
    resume: str | None = None  # checkpoint or run folder to continue; flags are not restored
    eval_only: bool = False  # evaluate the checkpoint of --resume and train no further
    eval_episodes: int = bounded(10, "[0, inf)")  # episodes of the evaluation at the end
    eval_sample: bool = False  # evaluate with sampled actions, not the most likely ones
    return_window: int = bounded(100, "[1, inf)")  # number of episodes in the mean return
    target_return: float | None = bounded(None, "(-inf, inf)")  # stop when a full window's mean return reaches this
    learning_rate: float = bounded(2e-3, "(0, inf)")  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    num_envs: int = bounded(8, "[1, inf)")  # parallel environments (N)
    num_steps: int = bounded(128, "[1, inf)")  # steps of each environment in a batch (T)
    max_episode_steps: int | None = bounded(None, "[1, inf)")  # time limit, in place of the environment's own
    gamma: float = bounded(0.98, "[0, 1]")  # discount factor
    gae_lambda: float = bounded(0.9, "[0, 1]")  # bias-variance trade-off of GAE, 0: TD error, 1: return - value
    num_minibatches: int = bounded(4, "[1, inf)")  # minibatches per epoch, must divide the batch
    update_epochs: int = bounded(6, "[1, inf)")  # passes over each batch
    norm_adv: bool = True  # standardise the advantages of each minibatch
    norm_obs: bool = False  # standardise observations by their running mean and variance, clip to [-10, 10]
    norm_reward: bool = False  # divide rewards by the running deviation of discounted returns, clip to [-10, 10]
    clip_coef: float = bounded(0.2, "(0, inf)")  # eps: no gain from a probability ratio further than this from 1
    clip_vloss: bool = False  # also clip the value's change, to --clip-coef
    target_kl: float | None = bounded(None, "(0, inf)")  # end the update after an epoch whose mean KL is above this
    ent_coef: float = bounded(0.0, "[0, inf)")  # weight of the entropy bonus
    vf_coef: float = bounded(0.5, "[0, inf)")  # weight of the value loss
    max_grad_norm: float = bounded(0.5, "(0, inf)")  # longer gradients are scaled down to this norm
    hidden_sizes: tuple[int, ...] = bounded((64, 64), "[1, inf)")  # widths of the hidden layers
    activation: Literal["tanh", "relu"] = "tanh"  # of the hidden layers

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def last_step(self) -> int:
        return self.total_timesteps // self.batch_size * self.batch_size


def plain(args: Args) -> Args:
    """The same flags in Python's own types: a caller may have given NumPy's numbers, or a Path to resume from."""
    flags = json.loads(json.dumps(asdict(args), default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x)))
    return Args(**{name: tuple(x) if isinstance(x, list) else x for name, x in flags.items()})


def check_args(args: Args) -> None:
    """Raise ValueError, naming the flag, for values that cannot work."""
    for f in fields(args):
        flag, value, interval = f"--{f.name.replace('_', '-')}", getattr(args, f.name), f.metadata.get("interval")
        values = value if isinstance(value, tuple) else (value,)
        kinds = get_args(f.type) or (f.type,)  # such as (int,), (float, NoneType), or the values of a Literal
        if not all(x in kinds or type(x) in kinds or (type(x) is int and float in kinds) for x in values):
            raise ValueError(f"{flag} {value!r}: must be {f.type}")
        if interval is None or value is None:
            continue
        low, high = map(float, interval[1:-1].split(","))
        for x in values:
            if not (low < x < high or (x == low and interval[0] == "[") or (x == high and interval[-1] == "]")):
                raise ValueError(f"{flag} {x}: must lie in {interval}")
    if args.batch_size % args.num_minibatches:
        raise ValueError(f"--num-minibatches {args.num_minibatches}: must divide the batch of {args.batch_size} steps")
    if args.num_envs % processes()[1] or args.minibatch_size % processes()[1]:
        raise ValueError(f"--num-envs {args.num_envs}: it and the minibatch must divide evenly among the processes")
    if args.total_timesteps < args.batch_size:
        raise ValueError(f"--total-timesteps {args.total_timesteps}: less than one batch of {args.batch_size} steps")
    if len(os.fsencode(args.exp_name)) > 100:  # a file system takes 255 for the whole name
        raise ValueError(f"--exp-name {args.exp_name}: longer than 100 bytes")
    if args.eval_only and args.resume is None:
        raise ValueError("--eval-only: needs --resume PATH, the checkpoint to evaluate")
    if args.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError("--compile: needs a C++ compiler, g++ or what the variable CXX names")
    if args.capture_video and find_spec("moviepy") is None:
        raise ValueError("--capture-video: needs moviepy: pip install moviepy")


# ==================================================== Environment =====================================================


def action_frame(space: gym.Space) -> tuple[gym.Space, Callable]:
    """The space that the policy acts in and the map from it to `space`: Discrete from 0, or an unbounded Box, of which
    [-1, 1] is mapped to the bounds and all else is clipped to them. Raises ValueError for other spaces."""
    if isinstance(space, gym.spaces.Discrete):
        return gym.spaces.Discrete(space.n), lambda action: action + space.start
    if not isinstance(space, gym.spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise ValueError(f"actions {space} are not supported, only Discrete and float Box")
    # A dimension without two bounds is mapped to itself; clipping to an infinite bound does nothing.
    both = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = np.where(both, space.low, -1), np.where(both, space.high, 1)
    middle, half = high / 2 + low / 2, high / 2 - low / 2
    frame = gym.spaces.Box(-np.inf, np.inf, (math.prod(space.shape),))

    def to_env(action):
        return (middle + half * action.reshape(space.shape)).clip(space.low, space.high).astype(space.dtype)

    return frame, to_env


class Named(gym.Wrapper):
    """Adds to an exception the environment, its step and the line at fault. Copies the observation, which a reset may
    overwrite, and drops `info`, which need not stack into one array for all environments."""

    def __init__(self, env: gym.Env, index: int | str):
        super().__init__(env)
        self.index, self.steps, self.shape = index, 0, env.observation_space.shape

    def ask(self, method: Callable, *args, **kwargs) -> tuple:
        try:
            obs, *outcome, _ = method(*args, **kwargs)
            if len(outcome) not in (0, 3):
                raise ValueError("reset must return obs, info, and step obs, reward, terminated, truncated, info")
            if np.shape(obs) != self.shape:
                raise ValueError(f"observation of shape {np.shape(obs)}, not {self.shape}")
            return np.array(obs), *map(float, outcome[:1]), *map(bool, outcome[1:]), {}
        except Exception as error:  # third-party code may raise anything
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
            where = f"environment {self.index}, its step {self.steps}"
            raise gym.error.Error(f"{where}: {what} ({Path(file).name}:{line})") from error

    def reset(self, *, seed: int | None = None, **kwargs):
        if seed is not None:  # for environments that draw from the global generators, not from one of their own
            random.seed(seed)
            np.random.seed(seed)
        return self.ask(self.env.reset, seed=seed, **kwargs)

    def step(self, action):
        self.steps += 1
        return self.ask(self.env.step, action)


def make_env(args: Args, index: int | str = 0, render_mode: str | None = None) -> gym.Env:
    """One environment with vector observations and the actions of `action_frame`. Raises ValueError for an id that
    cannot be made and for spaces that do not suit an MLP."""
    if args.async_envs and multiprocessing.current_process().daemon and os.name == "posix":
        os.setpgrp()  # Ctrl-C goes to the whole group of processes, SIGTERM may: let the main one decide
    try:
        rendering = {} if render_mode is None else {"render_mode": render_mode}  # not every environment takes one
        env = gym.make(args.env_id, args.max_episode_steps, disable_env_checker=True, **rendering)
        if args.capture_video and "rgb_array" not in env.metadata.get("render_modes", ()):
            raise ValueError("cannot be rendered for --capture-video")
        if render_mode is not None:  # what cannot be rendered is to fail now, not after hours of training
            env.reset()
            env.render()
        space = env.observation_space
        if isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) > 1:
            raise ValueError(f"image observations {space} need a convolutional network")
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            env = gym.wrappers.FlattenObservation(env)
        if not isinstance(env.observation_space, gym.spaces.Box):
            raise ValueError(f"observations {space} have no fixed size")
        space, to_env = action_frame(env.action_space)
        env = gym.wrappers.RecordEpisodeStatistics(Named(env, index))
        return gym.wrappers.TransformAction(env, to_env, space)
    except Exception as error:  # third-party code may raise anything: the id is at fault
        raise ValueError(f"--env-id {args.env_id}: {' '.join(str(error).split())}") from error


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """N environments, each reset within the step that ends its episode: no step is spent on a reset."""
    for render_mode in (None, "rgb_array") if args.capture_video else ():  # as the evaluation will
        make_env(args, render_mode=render_mode).close()
    (rank, size), same_step = processes(), gym.vector.AutoresetMode.SAME_STEP
    own = np.array_split(range(args.num_envs), size)[rank]
    vector_env = gym.vector.AsyncVectorEnv if args.async_envs else gym.vector.SyncVectorEnv
    if args.async_envs:
        gym.logger.min_level = gym.logger.ERROR + 1  # it prints exceptions of workers, which come back anyway
    return vector_env([partial(make_env, args, i) for i in own], autoreset_mode=same_step, copy=False)


def env_seeds(seed: int, step: int, count: int, stream: int = 0) -> list[int]:
    """Independent seeds for `count` environments reset at `step`, so that a resumed run needs no saved generators.
    Stream 0 is for training, 1 for evaluation, 2 for the rest."""
    return np.random.SeedSequence(seed, spawn_key=(stream, step)).generate_state(count).tolist()


# ====================================================== Networks ======================================================


def mlp(sizes: tuple[int, ...], activation: str, gain: float) -> nn.Sequential:
    """Linear layers with orthogonal weights, gain sqrt 2, in the last layer `gain`, and zero biases."""
    layers = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.Tanh() if activation == "tanh" else nn.ReLU()]
        nn.init.orthogonal_(layers[-2].weight, math.sqrt(2))
        nn.init.zeros_(layers[-2].bias)
    nn.init.orthogonal_(layers[-2].weight, gain)
    return nn.Sequential(*layers[:-1])


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen, merged a batch at a time (Chan et al. 1979)."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The rows of x, [..., size], in standard deviations from the mean."""
        return (x - self.mean) / (self.var + 1e-8).sqrt()

    def update(self, x: Tensor) -> None:
        """x: [..., size]."""
        x = x.flatten(0, -2)
        delta, total = x.mean(0) - self.mean, self.count + len(x)
        squares = self.var * self.count + x.var(0, correction=0) * len(x) + delta**2 * self.count * len(x) / total
        self.mean += delta * len(x) / total
        self.var.copy_(squares / total)
        self.count.copy_(total)


class Agent(nn.Module):
    """Policy and value network, and the statistics that scale their inputs and targets.

    The policy is a softmax over Discrete actions, or a Gaussian over Box actions whose log standard deviations are
    parameters that do not depend on the state.
    """

    def __init__(self, envs: gym.vector.VectorEnv, args: Args):
        super().__init__()
        space = envs.single_action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        self.norm_obs = args.norm_obs
        obs_size = envs.single_observation_space.shape[0]
        action_size = int(space.n) if self.discrete else space.shape[0]
        self.actor = mlp((obs_size, *args.hidden_sizes, action_size), args.activation, gain=0.01)
        self.critic = mlp((obs_size, *args.hidden_sizes, 1), args.activation, gain=1.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(action_size))
        self.obs_stats = RunningMeanStd(obs_size)
        self.return_stats = RunningMeanStd(1)

    def normalize(self, obs: Tensor) -> Tensor:
        return self.obs_stats(obs).clamp(-10, 10) if self.norm_obs else obs

    def value(self, obs: Tensor) -> Tensor:
        """V(s): [..., D] -> [...]."""
        return self.critic(self.normalize(obs)).squeeze(-1)

    def act(self, obs: Tensor, greedy: bool = False) -> Tensor:
        """A sampled action, or the most likely one: [..., D] -> [...] (Discrete) or [..., A] (Box)."""
        out = self.actor(self.normalize(obs))
        if greedy:
            return out.argmax(-1) if self.discrete else out
        if self.discrete:  # Gumbel-max: the argmax of logits plus Gumbel noise, -log(exponential), samples the softmax
            return (out - torch.empty_like(out).exponential_().log()).argmax(-1)
        return out + self.log_std.exp() * torch.randn_like(out)

    def log_prob(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(a|s) and the entropy of pi(.|s) in nats, both [...], summed over a Box action's dimensions."""
        out = self.actor(self.normalize(obs))
        if self.discrete:
            logp = out.log_softmax(-1)
            return logp.gather(-1, action[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)
        z = (action - out) / self.log_std.exp()
        logp = (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return logp, entropy.expand(logp.shape)


# ======================================================== Data ========================================================


class Batch(NamedTuple):
    """What one rollout saw: NumPy arrays where they are collected, tensors on the device in the update."""

    obs: np.ndarray  # [T, N, D]
    action: np.ndarray  # [T, N] or [T, N, A], as sampled: the environment clips it
    reward: np.ndarray  # [T, N]
    next_obs: np.ndarray  # [T, N, D] the true successor: at an episode's end its last observation, not the reset's
    terminated: np.ndarray  # [T, N] the task itself ended
    truncated: np.ndarray  # [T, N] a time limit cut the episode
    step: np.ndarray  # [T] environment steps of the run so far, including this row's
    episode_return: np.ndarray  # [T, N] undiscounted return of the episode that ended here, if one did
    episode_length: np.ndarray  # [T, N] and its number of steps

    @property
    def done(self) -> np.ndarray:  # [T, N]
        return 1 - (1 - self.terminated) * (1 - self.truncated)  # terminated or truncated


class Minibatch(NamedTuple):
    """What the loss needs of some steps, in random order."""

    obs: Tensor  # [M, D]
    action: Tensor  # [M] or [M, A]
    adv: Tensor  # [M]
    ret: Tensor  # [M]
    logp_old: Tensor  # [M]
    value_old: Tensor  # [M]


@dataclass
class State:
    """All that changes during training."""

    agent: Agent
    act: Callable  # agent.act, compiled or not
    backward: Callable  # the function of this name, compiled or not
    optimizer: torch.optim.Optimizer
    device: torch.device
    recent_returns: deque  # of the last --return-window episodes
    obs: np.ndarray  # [N, D] current observations
    running_return: Tensor  # [N] the discounted sum of `running_returns` so far, for --norm-reward
    step: int = 0  # environment steps
    iteration: int = 0  # rollouts and updates


class Result(NamedTuple):
    """What `train` returns."""

    agent: Agent
    episode_returns: np.ndarray  # [episodes] undiscounted training returns, in the order in which they finished
    episode_steps: np.ndarray  # [episodes] the environment step at which each finished
    eval_returns: np.ndarray  # [eval_episodes]
    run_dir: Path


# ======================================================== Math ========================================================


def gae(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimates: all [T, N] -> [T, N]. `next_value` is V of the true successor."""
    # delta_t = R_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)    (Schulman et al. 2016, sec. 3)
    delta = reward + gamma * (1 - terminated) * next_value - value
    decay = gamma * gae_lambda * (1 - done)
    adv, following = [], torch.zeros_like(delta[0])  # a list: indexing tensors takes as long as the arithmetic
    for delta_t, decay_t in zip(reversed(delta.unbind()), reversed(decay.unbind()), strict=True):
        # A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}    (Schulman et al. 2016, eq. 16, as a recursion)
        following = delta_t + decay_t * following
        adv.append(following)
    return torch.stack(adv[::-1])


def running_returns(reward: Tensor, done: Tensor, carry: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Sum of each episode's rewards up to each step, older ones discounted, [T, N], and the next `carry`, [N]."""
    ret = []
    for reward_t, done_t in zip(reward.unbind(), done.unbind(), strict=True):
        # C_t = R_t + gamma (1 - done_{t-1}) C_{t-1}: the last reward of an episode counts in it, not in the next one
        ret.append(reward_t + gamma * carry)
        carry = (1 - done_t) * ret[-1]
    return torch.stack(ret), carry


def standardize(x: Tensor) -> Tensor:
    """Zero mean and unit population standard deviation: the sample's is NaN for a single number."""
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)


def policy_loss(logp: Tensor, logp_old: Tensor, adv: Tensor, clip_coef: float) -> Tensor:
    """The clipped surrogate, negated: [...] -> scalar. The min undoes the clip where the ratio has moved the
    wrong way, so that the gradient can bring it back."""
    ratio = (logp - logp_old).exp()
    # E_t[ min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) ]    (Schulman et al. 2017, eq. 7)
    return -torch.min(ratio * adv, ratio.clamp(1 - clip_coef, 1 + clip_coef) * adv).mean()


def value_loss(value: Tensor, value_old: Tensor, ret: Tensor, clip_coef: float | None) -> Tensor:
    """Half the mean squared error: [...] -> scalar. With `clip_coef`, as in the authors' code but not their paper,
    each step counts the larger error, of the value or of the value clipped to within `clip_coef` of the old one."""
    # (V(s_t) - V_t^targ)^2    (Schulman et al. 2016, eq. 28; 2017, eq. 9)
    error = (value - ret) ** 2
    if clip_coef is not None:
        clipped = value_old + (value - value_old).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (clipped - ret) ** 2)
    return 0.5 * error.mean()


def approx_kl(logp: Tensor, logp_old: Tensor) -> Tensor:
    """KL(pi_old || pi) from samples of pi_old: [...] -> scalar (Schulman 2020, joschu.net/blog/kl-approx.html, k3)."""
    log_ratio = logp - logp_old
    # E[(r - 1) - log r]; r - 1 by expm1, lest rounding make the mean negative for r close to 1
    return (log_ratio.expm1() - log_ratio).mean()


# ====================================================== Rollout =======================================================


def check_finite(batch: Batch) -> None:
    """Raise FloatingPointError for a batch whose observations or rewards are not all finite."""
    for name in ("obs", "reward", "next_obs"):
        finite = np.isfinite(getattr(batch, name))
        if not finite.all():
            t, n, *_ = np.argwhere(~finite)[0]
            raise FloatingPointError(f"{name} of environment {n} not finite by step {batch.step[t]}")


@torch.inference_mode()
def rollout(state: State, envs: gym.vector.VectorEnv, args: Args) -> tuple[State, Batch]:
    """Play T steps in every environment. Only actions are computed here; all else that the update needs is computed
    afterwards in one pass over the batch, with the same weights."""
    obs = np.empty((args.num_steps, *state.obs.shape), np.float32)
    next_obs = np.empty_like(obs)
    action = np.empty((args.num_steps, *envs.action_space.shape), envs.action_space.dtype)
    scalars = np.zeros((5, args.num_steps, len(state.obs)), np.float32)
    reward, terminated, truncated, episode_return, episode_length = scalars
    current = state.obs
    for t in range(args.num_steps):
        obs[t] = current
        action[t] = state.act(torch.from_numpy(obs[t]).to(state.device)).cpu().numpy()
        current, reward[t], terminated[t], truncated[t], info = envs.step(action[t])
        next_obs[t] = current
        if "final_obs" in info:  # where an episode ended, `current` is a reset observation already
            ended = info["_final_obs"]
            next_obs[t, ended] = np.stack(info["final_obs"][ended])
            episode_return[t] = info["final_info"]["episode"]["r"]
            episode_length[t] = info["final_info"]["episode"]["l"]
    state.obs = current
    step = state.step + args.num_envs * np.arange(1, args.num_steps + 1)
    return state, Batch(obs, action, reward, next_obs, terminated, truncated, step, episode_return, episode_length)


# ======================================================= Update =======================================================


def loss_fn(agent: Agent, mb: Minibatch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a minibatch (Schulman et al. 2017, eq. 9, negated), and what to log."""
    logp, entropy = agent.log_prob(mb.obs, mb.action)
    value = agent.value(mb.obs)
    pg_loss = policy_loss(logp, mb.logp_old, mb.adv, args.clip_coef)
    v_loss = value_loss(value, mb.value_old, mb.ret, args.clip_coef if args.clip_vloss else None)
    entropy = entropy.mean()
    loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy
    metrics = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy}
    with torch.no_grad():
        metrics["approx_kl"] = approx_kl(logp, mb.logp_old)
        metrics["clipfrac"] = ((logp - mb.logp_old).expm1().abs() > args.clip_coef).float().mean()
    return loss, metrics


def learning_rate(step: int, args: Args) -> float:
    """Constant, or from --learning-rate down to 0 at the last step."""
    return args.learning_rate * ((args.last_step - step) / args.last_step if args.anneal_lr else 1)


def backward(agent: Agent, mb: Minibatch, args: Args) -> dict[str, Tensor]:
    """Backpropagate the loss and clip the gradients' norm to --max-grad-norm. Returns what to log."""
    params = list(agent.parameters())
    loss, metrics = loss_fn(agent, mb, args)
    loss.backward()
    metrics = {name: x.detach() for name, x in metrics.items()}
    average([p.grad for p in params] + list(metrics.values()))
    foreach = not args.compile  # PyTorch 2.11 cannot compile it for a GPU
    metrics["grad_norm"] = nn.utils.clip_grad_norm_(params, args.max_grad_norm, foreach=foreach)
    return metrics


def update(state: State, batch: Batch, args: Args) -> tuple[State, dict[str, float]]:
    """Several epochs of minibatch gradient descent on one batch. Also returns the means of what to log."""
    agent, optimizer, (rank, size) = state.agent, state.optimizer, processes()
    batch = Batch(*(torch.from_numpy(x).to(state.device) for x in batch))
    with torch.no_grad():
        reward = batch.reward
        if args.norm_reward:
            running, state.running_return = running_returns(reward, batch.done, state.running_return, args.gamma)
            agent.return_stats.update(running[..., None])
            reward = (reward / (agent.return_stats.var + 1e-8).sqrt()).clamp(-10, 10)
        value, next_value = agent.value(batch.obs), agent.value(batch.next_obs)
        logp, _ = agent.log_prob(batch.obs, batch.action)
        adv = gae(reward, value, next_value, batch.terminated, batch.done, args.gamma, args.gae_lambda)
        ret = adv + value  # V_t^targ: the lambda-return, for lambda = 1 the rewards to come and then V, where cut
    data = Minibatch(*(x.flatten(0, 1) for x in (batch.obs, batch.action, adv, ret, logp, value)))

    optimizer.param_groups[0]["lr"] = learning_rate(state.step, args)
    history = []
    for _ in range(args.update_epochs):
        order = gather(torch.randperm(args.batch_size))[0].to(state.device)  # rank 0's, for all
        for rows in order.split(args.minibatch_size):
            mb = Minibatch(*(x[rows] for x in data))
            if args.norm_adv and args.minibatch_size > 1:  # a single one would become 0
                mb = mb._replace(adv=standardize(mb.adv))
            mb = Minibatch(*(x[rank::size] for x in mb)) if size > 1 else mb
            optimizer.zero_grad()
            metrics = state.backward(agent, mb, args)
            optimizer.step()
            history.append({name: x.clone() for name, x in metrics.items()})  # CUDA graphs reuse their outputs
        if args.target_kl is not None:
            kl = torch.stack([m["approx_kl"] for m in history[-args.num_minibatches :]]).mean()
            if kl > args.target_kl:
                break
    if args.norm_obs:  # only now: the policy that learned had to be the one that played
        agent.obs_stats.update(batch.obs)
    metrics = {name: torch.stack([m[name] for m in history]).mean().item() for name in history[0]}
    metrics["explained_variance"] = 1 - ((ret - value).var(correction=0) / (ret.var(correction=0) + 1e-8)).item()
    state.step, state.iteration = int(batch.step[-1]), state.iteration + 1
    return state, metrics


# ============================================= Checkpoint and evaluation ==============================================


def identity(args: Args) -> dict:
    """What a checkpoint must share with the run that loads it."""
    names = ("env_id", "hidden_sizes", "activation", "norm_obs")
    return {"format": 1, "script": "ppo.py"} | {name: getattr(args, name) for name in names}


def save(state: State, args: Args, run_dir: Path) -> None:
    """Write checkpoint.pt, whole or not at all: under another name first, then renamed. Raises FloatingPointError for
    weights or statistics that are not finite."""
    bad = [name for name, x in state.agent.state_dict().items() if not x.isfinite().all()]
    if bad:
        raise FloatingPointError(f"iteration {state.iteration}: {', '.join(bad)} not finite")
    checkpoint = {
        "identity": identity(args),
        "args": asdict(args),
        "agent": state.agent.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if state.device.type == "cuda" else None,
        "recent_returns": list(state.recent_returns),
        "step": state.step,
        "iteration": state.iteration,
    }
    buffer = BytesIO()  # on a full disk torch.save may raise RuntimeError
    torch.save(checkpoint, buffer)
    unfinished = run_dir / "partial.pt"
    try:
        with unfinished.open("wb") as file:
            file.write(buffer.getvalue())
            os.fsync(file.fileno())  # else a power cut could leave the new name and no content
    except OSError:
        unfinished.unlink(missing_ok=True)  # on a full disk the log needs the room
        raise
    unfinished.replace(run_dir / "checkpoint.pt")


def load(state: State, args: Args) -> Path:
    """Fill `state` from the checkpoint of --resume and return its run folder. Raises ValueError if it does not fit."""
    path = Path(args.resume)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"--resume {path}: does not exist")
    try:
        with ZipFile(path) as file, warnings.catch_warnings(action="ignore"):
            if file.testzip() or any(part.compress_type for part in file.infolist()):  # torch.load looks at no checksum
                raise ValueError("damaged, or packed as torch.save does not")
            # weights_only admits tensors and plain Python values: no file can run code
            saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = dict(saved["identity"])
    except Exception as error:  # torch.load raises a dozen kinds
        raise ValueError(f"--resume {path}: not a readable checkpoint ({type(error).__name__})") from error
    for name, ours in identity(args).items():
        if theirs.get(name) != ours:
            raise ValueError(f"--resume {path}: its {name} is {theirs.get(name)}, this run's is {ours}")
    try:
        state.agent.load_state_dict(saved["agent"])
        for p, moments in zip(state.agent.parameters(), saved["optimizer"]["state"].values(), strict=False):
            if not p.shape == moments["exp_avg"].shape == moments["exp_avg_sq"].shape:  # load_state_dict would not mind
                raise ValueError
        state.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] is not None and state.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"])
        state.recent_returns.extend(map(float, saved["recent_returns"]))
        state.step, state.iteration = int(saved["step"]), int(saved["iteration"])
    except Exception as error:
        raise ValueError(f"--resume {path}: does not fit this run ({type(error).__name__})") from error
    return path.parent


def make_run_dir(args: Args) -> Path:
    """A new folder runs/{env_id}__{exp_name}__{seed}__{time}."""
    name = re.sub(r"[^\w.+=-]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    for i in itertools.count(1):
        with suppress(FileExistsError):
            run_dir = Path("runs", name if i == 1 else f"{name}-{i}")
            run_dir.mkdir(parents=True)
            return run_dir


@torch.inference_mode()
def evaluate(state: State, args: Args, run_dir: Path) -> np.ndarray:
    """Undiscounted returns of `eval_episodes` whole episodes, from seeds that training never uses."""
    env = make_env(args, "of the evaluation", "rgb_array" if args.capture_video else None)
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(run_dir / "videos"), episode_trigger=lambda _: True)
    returns = np.zeros(args.eval_episodes)
    for i, seed in enumerate(env_seeds(args.seed, 0, args.eval_episodes, stream=1)):
        obs, _ = env.reset(seed=seed)
        for _ in range(100_000):  # an episode without a time limit could go on for ever
            obs = torch.from_numpy(np.asarray(obs, np.float32)).to(state.device)
            action = state.agent.act(obs, greedy=not args.eval_sample).cpu().numpy()
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[i] += reward
            if terminated or truncated:
                break
    env.close()
    return returns


# ====================================================== Training ======================================================


class StopSignal:
    """Remembers a Ctrl-C or SIGTERM, so that the iteration can end and be saved. A second one stops at once."""

    number = 0

    def __enter__(self):
        self.previous = {}
        with suppress(ValueError):  # only the main thread may set handlers
            self.previous = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __call__(self, number, frame):
        self.number = number
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def compiled(function: Callable, args: Args) -> Callable:
    """`function`, under --compile fused, on a GPU as a CUDA graph, with the random numbers of the original."""
    if not args.compile:
        return function
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):  # not in PyTorch 2.9: .backward() in the same graph
        torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(function, options={"fallback_random": True, "triton.cudagraphs": args.cuda})


def solved(recent_returns: deque, args: Args) -> bool:
    """Whether a full window of returns averages --target-return or more."""
    full = len(recent_returns) == args.return_window
    return args.target_return is not None and full and sum(recent_returns) / args.return_window >= args.target_return


def learn(state: State, envs: gym.vector.VectorEnv, args: Args, run_dir: Path) -> list[tuple[float, int]]:
    """Train up to the last step, logging and saving on the way. Returns (return, step) of each finished episode."""
    episodes = []
    start, first_step = time.perf_counter(), state.step
    with (
        StopSignal() as stop,
        # with the default queue, 10 events, training would wait for the disk
        SummaryWriter(str(run_dir), purge_step=state.step + 1 if state.step else None, max_queue=1000) as writer,
        tqdm(total=args.last_step, initial=state.step, unit=" steps", mininterval=0.5) as bar,
    ):
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=4))
        writer.add_text("arguments", json.dumps(asdict(args)), state.step)
        while state.step < args.last_step and not solved(state.recent_returns, args) and not any(gather(stop.number)):
            lr = learning_rate(state.step, args)
            state, batch = rollout(state, envs, args)
            parts = zip(*gather(batch), strict=True)  # from here on every process has the same batch
            batch = Batch(*(np.concatenate(xs, 1) if xs[0].ndim > 1 else xs[0] for xs in parts))
            check_finite(batch)
            state, metrics = update(state, batch, args)
            bad = [name for name, value in metrics.items() if not np.isfinite(value).all()]
            if bad:
                raise FloatingPointError(f"iteration {state.iteration}: {', '.join(bad)} not finite")

            for t, n in np.argwhere(batch.done):
                writer.add_scalar("charts/episodic_return", batch.episode_return[t, n], batch.step[t])
                writer.add_scalar("charts/episodic_length", batch.episode_length[t, n], batch.step[t])
                state.recent_returns.append(float(batch.episode_return[t, n]))
                episodes.append((state.recent_returns[-1], int(batch.step[t])))
            for name, value in metrics.items():
                writer.add_scalar(f"losses/{name}", value, state.step)
            writer.add_scalar("charts/learning_rate", lr, state.step)
            writer.add_scalar("charts/SPS", (state.step - first_step) / (time.perf_counter() - start), state.step)
            mean_return = sum(state.recent_returns) / (len(state.recent_returns) or math.nan)
            bar.set_postfix_str(f"return {mean_return:.1f}", refresh=False)
            bar.update(min(state.step, args.last_step) - bar.n)

            if args.save_every and state.iteration % args.save_every == 0:
                save(state, args, run_dir)
                writer.flush()
        save(state, args, run_dir)
    if stopped := max(gather(stop.number)):
        print(f"stopped at step {state.step}, go on with these flags and --resume {run_dir}", file=sys.stderr)
        raise SystemExit(128 + stopped)
    return episodes


def processes() -> tuple[int, int]:
    """Rank of this process and number of processes: 0 and 1 without torchrun."""
    launched = dist.is_torchelastic_launched()
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)


def gather(part: Any) -> list:
    """All processes' `part`, by rank, in every process: [size]."""
    parts = [part] * processes()[1]
    if len(parts) > 1:
        try:
            dist.all_gather_object(parts, part)
        except RuntimeError as error:
            raise OSError("another process has ended") from error  # and tells why
    return parts


def average(tensors: list[Tensor]) -> None:
    """Replace each by its mean over the processes, in one all-reduce."""
    if processes()[1] > 1:
        flat = nn.utils.parameters_to_vector(tensors)
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:
            raise OSError("another process has ended") from error
        nn.utils.vector_to_parameters(flat / processes()[1], tensors)


def pick_device(args: Args) -> torch.device:
    """The GPU or the CPU. Under torchrun each process has its own and joins the group."""
    found = torch.cuda.is_available()
    if args.cuda and not found:
        print("warning: --cuda: no GPU found, running on the CPU", file=sys.stderr)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # more gain nothing on networks this small, and lose a hundredfold on a busy machine
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.cuda and found else torch.device("cpu")
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--cuda: {torch.cuda.device_count()} GPUs, but process {device.index} needs its own")
        torch.cuda.set_device(device)  # the one whose random state is saved, too
    if processes()[1] > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


# what may end training, with one line that names the last checkpoint
FAILURES = (FloatingPointError, gym.error.Error, OSError, EOFError, MemoryError, torch.OutOfMemoryError)


def train(args: Args) -> Result:
    """Train one agent, or with --eval-only evaluate it.

    Raises ValueError for wrong input, before anything is written, and RuntimeError for one that comes later;
    gymnasium.error.Error for an exception of an environment; FloatingPointError for an observation, reward, loss,
    gradient or weight that is not finite; SystemExit, when all is saved, after Ctrl-C (130) or SIGTERM (143).
    """
    args = plain(args)
    check_args(args)
    device, (rank, size) = pick_device(args), processes()
    out, err = (StringIO(), StringIO()) if rank else (sys.stdout, sys.stderr)  # rank 0 alone speaks, and keeps files
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        TemporaryDirectory() as scratch,
        closing(make_envs(args)) as envs,
        torch.random.fork_rng(devices=[]),
        ExitStack() as after,
    ):
        # put back at the end: the caller may be drawing the next settings from these generators
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        torch.manual_seed(args.seed)
        agent = Agent(envs, args).to(device)
        state = State(
            agent=agent,
            act=compiled(agent.act, args) if device.type == "cuda" else agent.act,  # on a CPU it would be slower
            backward=compiled(backward, args),
            optimizer=torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True),
            device=device,
            recent_returns=deque(maxlen=args.return_window),
            obs=np.zeros(envs.observation_space.shape),
            running_return=torch.zeros(args.num_envs, device=device),
        )
        run_dir = None if args.resume is None else load(state, args)
        if rank:
            run_dir = Path(scratch)
            torch.manual_seed(env_seeds(args.seed, state.step, size, stream=2)[rank])  # other actions than rank 0
        training = not args.eval_only
        if training and (state.step >= args.last_step or solved(state.recent_returns, args)):
            print(f"nothing to train: {run_dir} is finished at step {state.step}, --eval-only evaluates it")
            training, args = False, replace(args, eval_episodes=0)
        if training:
            seeds = np.array_split(env_seeds(args.seed, state.step, args.num_envs), size)[rank]
            state.obs, _ = envs.reset(seed=seeds.tolist())
            run_dir = run_dir or make_run_dir(args)  # not before: environments that cannot start leave nothing behind

        episodes, eval_returns = [], np.zeros(0)
        try:
            if training:
                episodes = learn(state, envs, args, run_dir)
            if args.eval_episodes and not rank:
                eval_returns = evaluate(state, args, run_dir)
                if not np.isfinite(eval_returns).all():
                    raise FloatingPointError("a return of the evaluation is not finite")
        except ValueError as error:  # the input was checked before
            raise RuntimeError("an error in the script, not in what it was given") from error
        except FAILURES as error:
            if args.async_envs and isinstance(error, EOFError | ConnectionError):  # killed: close() would wait for it
                for process in envs.processes:
                    process.terminate()
                envs.closed, error = True, OSError("the process of an environment has ended")
            if rank:
                raise  # its folder is not kept
            path = run_dir / "checkpoint.pt"
            saved = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was saved"
            kind = MemoryError if isinstance(error, MemoryError) else type(error)  # NumPy's takes no message
            raise kind(f"{str(error) or kind.__name__}; {saved}") from error
        if len(eval_returns):
            print(f"evaluation: {eval_returns.mean():.2f} ± {eval_returns.std():.2f} over {len(eval_returns)} episodes")
        print(run_dir)
    episode_returns, episode_steps = np.array(episodes).reshape(-1, 2).T
    return Result(agent, episode_returns, episode_steps.astype(int), eval_returns, run_dir)


def main() -> None:
    """Run from the command line: an error becomes one line, with exit status 2 for wrong input, else 1."""
    try:
        train(tyro.cli(Args))
    except (ValueError, *FAILURES) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
