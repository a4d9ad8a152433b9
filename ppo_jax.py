# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "flax>=0.11,<0.13",
#     "gymnasium>=1.1,<1.4",
#     "gymnax>=1.0,<1.1",
#     "jax>=0.8,<0.11",
#     "numpy>=1.26,<3",
#     "optax>=0.2.6,<0.3",
#     "six>=1.16",
#     "tensorboard>=2.18,<3",
#     "tqdm>=4.66,<5",
#     "tyro>=0.9,<2",
# ]
# ///
"""Proximal policy optimisation (PPO) with the clipped surrogate objective, in JAX.

The policy gradient of vpg_advantage_jax.py is valid only for the policy that played the batch, so a batch is good for
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
An environment that gymnax knows is stepped inside the compiled program, rollout and update being one function; a
resumed run is then bit for bit the uninterrupted one. Other environments are stepped on the host, and a resumed run
has the weights, optimiser, statistics and random state of the saved one; its episodes start afresh.

Run:   python ppo_jax.py --env-id CartPole-v1
Diff:  diff vpg_advantage_jax.py ppo_jax.py (what clipping adds)
       diff ppo.py ppo_jax.py (the same in PyTorch)
"""

import difflib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import traceback
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, get_args

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn
from flax import serialization
from jax import Array
from jax.experimental.multihost_utils import process_allgather
from jax.flatten_util import ravel_pytree
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm

# ===================================================== Arguments ======================================================


def bounded(default, interval: str):
    """A flag whose value, or each of whose values, must lie in `interval`, written as in mathematics: "(0, 1]"."""
    return field(default=default, metadata={"interval": interval})


@dataclass(frozen=True)
class Args:
    """Train an agent by PPO; the log, the arguments and the checkpoint go to a new folder under runs/."""

    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    env_id: str = "CartPole-v1"  # any gymnax or Gymnasium id; module:Id imports the module first
    env_backend: Literal["auto", "gymnax", "gymnasium"] = "auto"  # auto: gymnax where it has the environment
    seed: int = bounded(1, "[0, 4294967295]")  # fixes every random number
    num_seeds: int = bounded(1, "[1, inf)")  # independent agents in one program, from seed, seed + 1, ...; gymnax only
    total_timesteps: int = bounded(200_000, "[1, 2000000000]")  # environment steps, all environments together
    cuda: bool = False  # use the GPU; with few environments the CPU is faster
    shard_envs: bool = False  # spread one agent's work over all devices; pays from 64 environments or so
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
    max_episode_steps: int | None = bounded(None, "[1, 100000000]")  # time limit, in place of the environment's own
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
    if args.total_timesteps < args.batch_size:
        raise ValueError(f"--total-timesteps {args.total_timesteps}: less than one batch of {args.batch_size} steps")
    if args.seed + args.num_seeds > 2**32:
        raise ValueError(f"--num-seeds {args.num_seeds}: with --seed {args.seed} the last would be above 4294967295")
    if len(os.fsencode(args.exp_name)) > 100:  # a file system takes 255 for the whole name
        raise ValueError(f"--exp-name {args.exp_name}: longer than 100 bytes")
    if args.shard_envs and args.num_seeds > 1:
        raise ValueError(f"--num-seeds {args.num_seeds}: these spread over devices anyway, without --shard-envs")
    hosts = [os.environ.get(f"JAX_{name}", "") for name in ("NUM_PROCESSES", "PROCESS_ID")]
    if "JAX_COORDINATOR_ADDRESS" in os.environ and not all(map(str.isdecimal, hosts)):
        raise ValueError("JAX_COORDINATOR_ADDRESS: needs JAX_NUM_PROCESSES and JAX_PROCESS_ID, two numbers")
    if args.eval_only and args.resume is None:
        raise ValueError("--eval-only: needs --resume PATH, the checkpoint to evaluate")
    if args.capture_video and args.num_seeds > 1:
        raise ValueError("--capture-video: records one agent, without --num-seeds")
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


class GymnaxEnvs:
    """N copies of a gymnax environment, as pure functions to be compiled. Observations, actions and resets are
    as in `make_envs`."""

    def __init__(self, args: Args, num_envs: int):
        import gymnax  # here, as it takes seconds
        from gymnax.environments.spaces import gymnax_space_to_gym_space
        from gymnax.wrappers import LogWrapper

        env, self.params = gymnax.make(args.env_id.rpartition(":")[2])
        if args.max_episode_steps is not None:
            kind = type(self.params.max_steps_in_episode)  # of some environments a float
            self.params = self.params.replace(max_steps_in_episode=kind(args.max_episode_steps))
        self.env, self.num_envs = LogWrapper(env), num_envs
        space = gymnax_space_to_gym_space(env.observation_space(self.params))
        if not isinstance(space, gym.spaces.Discrete | gym.spaces.Box):
            raise ValueError(f"observations {space} are not supported, only Discrete and Box")
        discrete = isinstance(space, gym.spaces.Discrete)
        self.flatten = jax.vmap(partial(jax.nn.one_hot, num_classes=space.n) if discrete else jnp.ravel)
        self.single_observation_space = gym.spaces.flatten_space(space)
        self.single_action_space, self.to_env = action_frame(gymnax_space_to_gym_space(env.action_space(self.params)))

    def reset(self, key: Array) -> tuple[Any, Array]:
        """-> states, obs [N, D]."""
        obs, states = jax.vmap(self.env.reset, (0, None))(jax.random.split(key, self.num_envs), self.params)
        return states, self.flatten(obs).astype(jnp.float32)

    def step(self, key: Array, states: Any, action: Array) -> tuple:
        """-> states, obs [N, D], reward [N], terminated [N], truncated [N], info."""
        keys, action = jax.random.split(key, self.num_envs), jax.vmap(self.to_env)(action)
        step = jax.vmap(self.env.step, (0, 0, 0, None))
        obs, states, reward, terminated, truncated, info = step(keys, states, action, self.params)
        obs, info["final_observation"] = self.flatten(obs), self.flatten(info["final_observation"])
        return states, *(x.astype(jnp.float32) for x in (obs, reward, terminated, truncated)), info

    def close(self) -> None:
        """There is nothing to close."""


Envs = GymnaxEnvs | gym.vector.VectorEnv


def uses_gymnax(args: Args) -> bool:
    """Whether gymnax runs the environment. It takes seconds to import, so it is asked only where that can matter."""
    module, _, name = args.env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)  # may register with gymnax
        except Exception:  # third-party code may raise anything
            return False  # Gymnasium will say what is wrong
    if args.env_backend == "gymnasium":
        return False
    # Both registries have these; gymnax knows another Gymnasium id only if a user registered it there.
    shared = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0")
    if args.env_backend == "auto" and name in gym.registry and name not in shared and "gymnax" not in sys.modules:
        return False
    import gymnax

    near = difflib.get_close_matches(name, gymnax.registered_envs, n=1, cutoff=0.8)
    if near and name not in gymnax.registered_envs and name not in gym.registry:
        raise ValueError(f"--env-id {args.env_id}: unknown, did you mean `{near[0]}` of gymnax?")
    return args.env_backend == "gymnax" or name in gymnax.registered_envs


def make_envs(args: Args) -> Envs:
    """N environments, each reset within the step that ends its episode: no step is spent on a reset."""
    for render_mode in (None, "rgb_array") if args.capture_video else ():  # as the evaluation will
        make_env(args, render_mode=render_mode).close()
    if uses_gymnax(args):
        if args.async_envs:
            raise ValueError("--async-envs: not for gymnax environments, unless with --env-backend gymnasium")
        try:
            return GymnaxEnvs(args, args.num_envs)
        except Exception as error:
            raise ValueError(f"--env-id {args.env_id}: {' '.join(str(error).split())}") from error
    if args.num_seeds > 1 or args.shard_envs:
        flag = "--shard-envs" if args.shard_envs else f"--num-seeds {args.num_seeds}"
        raise ValueError(f"{flag}: needs gymnax, --env-id {args.env_id} runs in gymnasium")
    env_fns, same_step = [partial(make_env, args, i) for i in range(args.num_envs)], gym.vector.AutoresetMode.SAME_STEP
    if args.async_envs:  # spawned: forking is unsafe with JAX's threads
        gym.logger.min_level = gym.logger.ERROR + 1  # it prints exceptions of workers, which come back anyway
        return gym.vector.AsyncVectorEnv(env_fns, autoreset_mode=same_step, copy=False, context="spawn")
    return gym.vector.SyncVectorEnv(env_fns, autoreset_mode=same_step, copy=False)


def env_seeds(seed: int, step: int, count: int, stream: int = 0) -> list[int]:
    """Independent seeds for `count` environments reset at `step`, so that a resumed run needs no saved generators.
    Stream 0 is for training, 1 for evaluation, 2 for the rest."""
    return np.random.SeedSequence(seed, spawn_key=(stream, step)).generate_state(count).tolist()


# ====================================================== Networks ======================================================


def mlp(sizes: tuple[int, ...], activation: str, gain: float) -> nn.Sequential:
    """Linear layers with orthogonal weights, gain sqrt 2, in the last layer `gain`, and zero biases."""
    layers = []
    for n_out in sizes[:-1]:
        layers += [nn.Dense(n_out, kernel_init=nn.initializers.orthogonal(math.sqrt(2)))]
        layers += [nn.tanh if activation == "tanh" else nn.relu]
    return nn.Sequential([*layers, nn.Dense(sizes[-1], kernel_init=nn.initializers.orthogonal(gain))])


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen, merged a batch at a time (Chan et al. 1979)."""

    size: int

    def setup(self):
        self.mean = self.variable("stats", "mean", jnp.zeros, self.size)
        self.var = self.variable("stats", "var", jnp.ones, self.size)
        self.count = self.variable("stats", "count", jnp.zeros, ())

    def __call__(self, x: Array) -> Array:
        """The rows of x, [..., size], in standard deviations from the mean."""
        return (x - self.mean.value) / jnp.sqrt(self.var.value + 1e-8)

    def update(self, x: Array) -> None:
        """x: [..., size]."""
        x = x.reshape(-1, self.size)
        delta, total = x.mean(0) - self.mean.value, self.count.value + len(x)
        squares = self.var.value * self.count.value + x.var(0) * len(x)
        squares += delta**2 * self.count.value * len(x) / total
        self.mean.value += delta * len(x) / total
        self.var.value = squares / total
        self.count.value = total


class Agent(nn.Module):
    """Policy and value network, and the statistics that scale their inputs and targets.

    The policy is a softmax over Discrete actions, or a Gaussian over Box actions whose log standard deviations are
    parameters that do not depend on the state.
    """

    obs_size: int
    action_size: int
    discrete: bool
    args: Args

    def setup(self):
        sizes, activation = self.args.hidden_sizes, self.args.activation
        self.actor = mlp((*sizes, self.action_size), activation, gain=0.01)
        self.critic = mlp((*sizes, 1), activation, gain=1.0)
        if not self.discrete:
            self.log_std = self.param("log_std", nn.initializers.zeros, (self.action_size,))
        self.obs_stats = RunningMeanStd(self.obs_size)
        self.return_stats = RunningMeanStd(1)

    def __call__(self, obs: Array) -> None:
        """Touches every part, for `init`."""
        self.value(obs), self.act(obs, None, greedy=True), self.obs_stats(obs), self.return_stats(obs[..., :1])

    def normalize(self, obs: Array) -> Array:
        return self.obs_stats(obs).clip(-10, 10) if self.args.norm_obs else obs

    def value(self, obs: Array) -> Array:
        """V(s): [..., D] -> [...]."""
        return self.critic(self.normalize(obs)).squeeze(-1)

    def act(self, obs: Array, key: Array | None, greedy: bool = False) -> Array:
        """A sampled action, or the most likely one: [..., D] -> [...] (Discrete) or [..., A] (Box)."""
        out = self.actor(self.normalize(obs))
        if greedy:
            return out.argmax(-1) if self.discrete else out
        if self.discrete:
            return jax.random.categorical(key, out)
        return out + jnp.exp(self.log_std) * jax.random.normal(key, out.shape)

    def log_prob(self, obs: Array, action: Array) -> tuple[Array, Array]:
        """log pi(a|s) and the entropy of pi(.|s) in nats, both [...], summed over a Box action's dimensions."""
        out = self.actor(self.normalize(obs))
        if self.discrete:
            logp = jax.nn.log_softmax(out)
            taken = jnp.take_along_axis(logp, action[..., None], -1).squeeze(-1)
            return taken, -(jnp.exp(logp) * logp).sum(-1)
        z = (action - out) / jnp.exp(self.log_std)
        logp = (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return logp, jnp.broadcast_to(entropy, logp.shape)


def make_agent(envs: Envs, args: Args) -> Agent:
    """The networks for these spaces."""
    space = envs.single_action_space
    discrete = isinstance(space, gym.spaces.Discrete)
    return Agent(envs.single_observation_space.shape[0], int(space.n) if discrete else space.shape[0], discrete, args)


# ======================================================== Data ========================================================


class Batch(NamedTuple):
    """What one rollout saw: NumPy arrays where the host collects them, else JAX arrays."""

    obs: Array  # [T, N, D]
    action: Array  # [T, N] or [T, N, A], as sampled: the environment clips it
    reward: Array  # [T, N]
    next_obs: Array  # [T, N, D] the true successor: at an episode's end its last observation, not the reset's
    terminated: Array  # [T, N] the task itself ended
    truncated: Array  # [T, N] a time limit cut the episode
    step: Array  # [T] environment steps of the run so far, including this row's
    episode_return: Array  # [T, N] undiscounted return of the episode that ended here, if one did
    episode_length: Array  # [T, N] and its number of steps

    @property
    def done(self) -> Array:  # [T, N]
        return 1 - (1 - self.terminated) * (1 - self.truncated)  # terminated or truncated


class Minibatch(NamedTuple):
    """What the loss needs of some steps, in random order."""

    obs: Array  # [M, D]
    action: Array  # [M] or [M, A]
    adv: Array  # [M]
    ret: Array  # [M]
    logp_old: Array  # [M]
    value_old: Array  # [M]


class State(NamedTuple):
    """All that changes during training. In `train` and `learn` every array has one more axis in front, of num_seeds."""

    variables: dict  # "params" and "stats" of the agent
    opt_state: optax.OptState
    key: Array  # PRNG key of the training, split at every use
    env: Any  # states of the gymnax environments, None on the host
    obs: Array  # [N, D] current observations
    running_return: Array  # [N] the discounted sum of `running_returns` so far, for --norm-reward
    step: Array  # environment steps
    iteration: Array  # rollouts and updates


class Result(NamedTuple):
    """What `train` returns; with --num-seeds S, episode_returns and episode_steps are lists of S arrays."""

    agent: dict  # the variables, for Agent.apply
    episode_returns: np.ndarray | list  # [episodes] undiscounted training returns, in the order in which they finished
    episode_steps: np.ndarray | list  # [episodes] the environment step at which each finished
    eval_returns: np.ndarray  # [eval_episodes] or [S, eval_episodes]
    run_dir: Path


# ======================================================== Math ========================================================


def gae(
    reward: Array, value: Array, next_value: Array, terminated: Array, done: Array, gamma: float, gae_lambda: float
) -> Array:
    """Generalised advantage estimates: all [T, N] -> [T, N]. `next_value` is V of the true successor."""
    # delta_t = R_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)    (Schulman et al. 2016, sec. 3)
    delta = reward + gamma * (1 - terminated) * next_value - value
    decay = gamma * gae_lambda * (1 - done)

    def step_back(following, now):
        delta_t, decay_t = now
        # A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}    (Schulman et al. 2016, eq. 16, as a recursion)
        adv = delta_t + decay_t * following
        return adv, adv

    # unrolled, as a GPU starts kernels anew for every turn of a loop
    return jax.lax.scan(step_back, jnp.zeros_like(delta[0]), (delta, decay), reverse=True, unroll=8)[1]


def running_returns(reward: Array, done: Array, carry: Array, gamma: float) -> tuple[Array, Array]:
    """Sum of each episode's rewards up to each step, older ones discounted, [T, N], and the next `carry`, [N]."""

    def forward(carry, now):
        reward_t, done_t = now
        # C_t = R_t + gamma (1 - done_{t-1}) C_{t-1}: the last reward of an episode counts in it, not in the next one
        ret = reward_t + gamma * carry
        return (1 - done_t) * ret, ret

    carry, ret = jax.lax.scan(forward, carry, (reward, done), unroll=8)
    return ret, carry


def standardize(x: Array) -> Array:
    """Zero mean and unit population standard deviation: the sample's is NaN for a single number."""
    return (x - x.mean()) / (x.std() + 1e-8)


def policy_loss(logp: Array, logp_old: Array, adv: Array, clip_coef: float) -> Array:
    """The clipped surrogate, negated: [...] -> scalar. The min undoes the clip where the ratio has moved the
    wrong way, so that the gradient can bring it back."""
    ratio = jnp.exp(logp - logp_old)
    # E_t[ min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) ]    (Schulman et al. 2017, eq. 7)
    return -jnp.minimum(ratio * adv, ratio.clip(1 - clip_coef, 1 + clip_coef) * adv).mean()


def value_loss(value: Array, value_old: Array, ret: Array, clip_coef: float | None) -> Array:
    """Half the mean squared error: [...] -> scalar. With `clip_coef`, as in the authors' code but not their paper,
    each step counts the larger error, of the value or of the value clipped to within `clip_coef` of the old one."""
    # (V(s_t) - V_t^targ)^2    (Schulman et al. 2016, eq. 28; 2017, eq. 9)
    error = (value - ret) ** 2
    if clip_coef is not None:
        clipped = value_old + (value - value_old).clip(-clip_coef, clip_coef)
        error = jnp.maximum(error, (clipped - ret) ** 2)
    return 0.5 * error.mean()


def approx_kl(logp: Array, logp_old: Array) -> Array:
    """KL(pi_old || pi) from samples of pi_old: [...] -> scalar (Schulman 2020, joschu.net/blog/kl-approx.html, k3)."""
    log_ratio = logp - logp_old
    # E[(r - 1) - log r]; r - 1 by expm1, lest rounding make the mean negative for r close to 1
    return (jnp.expm1(log_ratio) - log_ratio).mean()


# ====================================================== Rollout =======================================================


def check_finite(batch: Batch) -> None:
    """Raise FloatingPointError for batches, [S, T, N, ...], whose observations or rewards are not all finite."""
    for name in ("obs", "reward", "next_obs"):
        finite = np.isfinite(getattr(batch, name))
        if not finite.all():
            s, t, n, *_ = np.argwhere(~finite)[0]
            raise FloatingPointError(f"{name} of environment {n} not finite by step {batch.step[s, t]}")


def rollout(state: State, agent: Agent, envs: GymnaxEnvs, args: Args) -> tuple[State, Batch]:
    """Play T steps in every environment. Only actions are computed here; all else that the update needs is computed
    afterwards in one pass over the batch, with the same weights."""
    key, rollout_key = jax.random.split(state.key)

    def play(carry, key):
        env, obs, step = carry
        act_key, env_key = jax.random.split(key)
        action = agent.apply(state.variables, obs, act_key, method="act")
        env, next_obs, reward, terminated, truncated, info = envs.step(env_key, env, action)
        step += args.num_envs
        episode = info["returned_episode_returns"], info["returned_episode_lengths"]
        row = Batch(obs, action, reward, info["final_observation"], terminated, truncated, step, *episode)
        return (env, next_obs, step), row

    carry = (state.env, state.obs, state.step)
    (env, obs, _), batch = jax.lax.scan(play, carry, jax.random.split(rollout_key, args.num_steps))
    return state._replace(key=key, env=env, obs=obs), batch


def rollout_on_host(state: State, act: Callable, envs: gym.vector.VectorEnv, args: Args) -> tuple[State, Batch]:
    """The same with Gymnasium: a loop in Python around the compiled `act`, with NumPy alone outside it."""
    key, rollout_key = jax.random.split(state.key)
    obs = np.empty((args.num_steps, *state.obs.shape), np.float32)
    next_obs = np.empty_like(obs)
    action = np.empty((args.num_steps, *envs.action_space.shape), envs.action_space.dtype)
    scalars = np.zeros((5, args.num_steps, args.num_envs), np.float32)
    reward, terminated, truncated, episode_return, episode_length = scalars
    current = np.asarray(state.obs)
    for t, act_key in enumerate(np.asarray(jax.random.split(rollout_key, args.num_steps))):
        obs[t] = current
        action[t] = act(state.variables, obs[t], act_key)
        current, reward[t], terminated[t], truncated[t], info = envs.step(action[t])
        next_obs[t] = current
        if "final_obs" in info:  # where an episode ended, `current` is a reset observation already
            ended = info["_final_obs"]
            next_obs[t, ended] = np.stack(info["final_obs"][ended])
            episode_return[t] = info["final_info"]["episode"]["r"]
            episode_length[t] = info["final_info"]["episode"]["l"]
    step = int(state.step) + args.num_envs * np.arange(1, args.num_steps + 1, dtype=np.int32)
    batch = Batch(obs, action, reward, next_obs, terminated, truncated, step, episode_return, episode_length)
    return state._replace(key=key, obs=np.array(current, np.float32)), batch


# ======================================================= Update =======================================================


def loss_fn(params: dict, stats: dict, mb: Minibatch, agent: Agent, args: Args) -> tuple[Array, dict[str, Array]]:
    """Loss of a minibatch (Schulman et al. 2017, eq. 9, negated), and what to log."""
    variables = {"params": params, "stats": stats}
    logp, entropy = agent.apply(variables, mb.obs, mb.action, method="log_prob")
    value = agent.apply(variables, mb.obs, method="value")
    pg_loss = policy_loss(logp, mb.logp_old, mb.adv, args.clip_coef)
    v_loss = value_loss(value, mb.value_old, mb.ret, args.clip_coef if args.clip_vloss else None)
    entropy = entropy.mean()
    loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy
    metrics = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy}
    metrics["approx_kl"] = approx_kl(logp, mb.logp_old)
    metrics["clipfrac"] = (jnp.abs(jnp.expm1(logp - mb.logp_old)) > args.clip_coef).mean()
    return loss, metrics


def learning_rate(step: int, args: Args) -> float:
    """Constant, or from --learning-rate down to 0 at the last step."""
    return args.learning_rate * ((args.last_step - step) / args.last_step if args.anneal_lr else 1)


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam on clipped gradients, without the learning rate: `update` multiplies by it, as it changes with the step."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=1e-5))


def shuffles(key: Array, count: int, size: int) -> Array:
    """`count` permutations of range(size): [count, size].

    Sorting words with random high bits and the index in the low ones is many times faster on a CPU than
    jax.random.permutation, which sorts pairs. Equal high bits, one pair in 2^(32 - bits), keep their order.
    """
    bits = (size - 1).bit_length()
    words = jax.random.bits(key, (count, size)) >> bits << bits | jnp.arange(size, dtype=jnp.uint32)
    return (jnp.sort(words) & (2**bits - 1)).astype(jnp.int32)


def update_stats(agent: Agent, variables: dict, name: str, x: Array) -> dict:
    """The variables after the running statistics `name` have seen x."""
    _, new = agent.apply(variables, x, method=lambda agent, x: getattr(agent, name).update(x), mutable="stats")
    return variables | new


def update(state: State, batch: Batch, agent: Agent, args: Args) -> tuple[State, dict[str, Array]]:
    """Several epochs of minibatch gradient descent on one batch. Also returns the means of what to log."""
    variables, reward, running_return = state.variables, batch.reward, state.running_return
    if args.norm_reward:
        running, running_return = running_returns(reward, batch.done, running_return, args.gamma)
        variables = update_stats(agent, variables, "return_stats", running[..., None])
        var = variables["stats"]["return_stats"]["var"]
        reward = (reward / jnp.sqrt(var + 1e-8)).clip(-10, 10)
    obs, action, next_obs = (x.reshape(-1, *x.shape[2:]) for x in (batch.obs, batch.action, batch.next_obs))
    value_of = partial(agent.apply, variables, method="value")
    value, next_value = (in_shares(value_of, x).reshape(reward.shape) for x in (obs, next_obs))
    logp = in_shares(lambda played: agent.apply(variables, *played, method="log_prob")[0], (obs, action))
    adv = gae(reward, value, next_value, batch.terminated, batch.done, args.gamma, args.gae_lambda)
    ret = adv + value  # V_t^targ: the lambda-return, for lambda = 1 the rewards to come and then V, where cut
    data = spread(Minibatch(obs, action, *(x.reshape(-1) for x in (adv, ret, logp, value))))

    lr = learning_rate(state.step, args)
    key, shuffle_key = jax.random.split(state.key)
    rows = shuffles(shuffle_key, args.update_epochs, args.batch_size).reshape(-1, args.minibatch_size)

    def descend(carry, i_rows):
        params, opt_state, kl, active = carry
        i, rows = i_rows
        mb = Minibatch(*(x[rows] for x in data))
        if args.norm_adv and args.minibatch_size > 1:  # a single one would become 0
            mb = mb._replace(adv=standardize(mb.adv))
        gradient = partial(jax.grad(loss_fn, has_aux=True), params, variables["stats"], agent=agent, args=args)
        grads, metrics = in_shares(gradient, mb, mean=True)
        metrics["grad_norm"] = optax.tree.norm(grads)
        old = params, opt_state
        direction, opt_state = make_optimizer(args).update(grads, opt_state)
        params = jax.tree.map(lambda p, d: p - lr * d, params, direction)
        if args.target_kl is not None:  # steps after the last epoch are computed, for fixed shapes, and discarded
            params, opt_state = jax.tree.map(partial(jnp.where, active), (params, opt_state), old)
        kl += metrics["approx_kl"] / args.num_minibatches
        epoch_ends = (i + 1) % args.num_minibatches == 0
        still_active = active & ~(epoch_ends & (kl > (args.target_kl or math.inf)))
        return (params, opt_state, jnp.where(epoch_ends, 0, kl), still_active), (active, metrics)

    carry = (variables["params"], state.opt_state, jnp.zeros(()), jnp.array(True))
    (params, opt_state, *_), (active, metrics) = jax.lax.scan(descend, carry, (jnp.arange(len(rows)), rows))
    variables = variables | {"params": params}
    if args.norm_obs:  # only now: the policy that learned had to be the one that played
        variables = update_stats(agent, variables, "obs_stats", batch.obs)
    metrics = jax.tree.map(lambda x: x.mean(where=active), metrics)
    metrics["explained_variance"] = 1 - (ret - value).var() / (ret.var() + 1e-8)
    state = state._replace(variables=variables, opt_state=opt_state, key=key, running_return=running_return)
    return state._replace(step=batch.step[-1], iteration=state.iteration + 1), metrics


# ============================================= Checkpoint and evaluation ==============================================


def identity(args: Args) -> dict:
    """What a checkpoint must share with the run that loads it."""
    names = ("env_id", "num_envs", "num_seeds", "hidden_sizes", "activation", "norm_obs")
    names += ("seed",) if args.num_seeds > 1 else ()  # by which the agents are told apart
    backend = "gymnax" if uses_gymnax(args) else "gymnasium"
    ours = {"format": 1, "script": "ppo_jax.py", "env_backend": backend}
    ours |= {name: getattr(args, name) for name in names}
    return json.loads(json.dumps(ours))  # with lists for tuples, as in the file


def save(state: State, recent_returns: list[deque], args: Args, run_dir: Path) -> None:
    """Write checkpoint.msgpack, whole or not at all: under another name first, then renamed. Raises FloatingPointError
    for weights or statistics that are not finite."""
    state = fetch(state)
    weights = jax.tree.leaves_with_path(state.variables)
    bad = [jax.tree_util.keystr(path, simple=True, separator=".") for path, x in weights if not np.isfinite(x).all()]
    if bad:
        raise FloatingPointError(f"iteration {state.iteration.min()}: {', '.join(bad)} not finite")
    meta = {"identity": identity(args), "args": asdict(args), "recent_returns": list(map(list, recent_returns))}
    checkpoint = {"meta": json.dumps(meta), "state": serialization.to_bytes(state)}
    checkpoint["crc32"] = zlib.crc32(checkpoint["meta"].encode() + checkpoint["state"])
    unfinished = run_dir / "partial.msgpack"
    try:
        with unfinished.open("wb") as file:
            file.write(serialization.msgpack_serialize(checkpoint))
            os.fsync(file.fileno())  # else a power cut could leave the new name and no content
    except OSError:
        unfinished.unlink(missing_ok=True)  # on a full disk the log needs the room
        raise
    unfinished.replace(run_dir / "checkpoint.msgpack")


def load(state: State, recent_returns: list[deque], args: Args) -> tuple[State, Path]:
    """State and run folder of the checkpoint of --resume. Raises ValueError if it does not fit."""
    path = Path(args.resume)
    path = path / "checkpoint.msgpack" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"--resume {path}: does not exist")
    try:
        saved = serialization.msgpack_restore(path.read_bytes())  # arrays and plain values: no code can run
        if saved["crc32"] != zlib.crc32(saved["meta"].encode() + saved["state"]):
            raise ValueError("damaged")
        meta, saved_state = json.loads(saved["meta"]), serialization.msgpack_restore(saved["state"])
        theirs = dict(meta["identity"])
    except Exception as error:
        raise ValueError(f"--resume {path}: not a readable checkpoint ({type(error).__name__})") from error
    for name, ours in identity(args).items():
        if theirs.get(name) != ours:
            raise ValueError(f"--resume {path}: its {name} is {theirs.get(name)}, this run's is {ours}")
    try:
        loaded = serialization.from_state_dict(state, saved_state)
        # from_state_dict matches names alone
        expected, found = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, loaded))
        if expected != found:
            raise ValueError
        for returns, saved_returns in zip(recent_returns, meta["recent_returns"], strict=True):
            returns.extend(map(float, saved_returns))
        return jax.device_put(loaded, jax.tree.map(lambda x: x.sharding, state)), path.parent
    except Exception as error:
        raise ValueError(f"--resume {path}: does not fit this run ({type(error).__name__})") from error


def make_run_dir(args: Args) -> Path:
    """A new folder runs/{env_id}__{exp_name}__{seed}__{time}."""
    name = re.sub(r"[^\w.+=-]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    for i in itertools.count(1):
        with suppress(FileExistsError):
            run_dir = Path("runs", name if i == 1 else f"{name}-{i}")
            run_dir.mkdir(parents=True)
            return run_dir


def evaluate(variables: dict, key: Array, agent: Agent, envs: GymnaxEnvs, args: Args) -> Array:
    """Undiscounted returns of one whole episode in each environment."""

    def play(carry):
        env, obs, key, going, returns, step = carry
        key, act_key, env_key = jax.random.split(key, 3)
        action = agent.apply(variables, obs, act_key, not args.eval_sample, method="act")
        env, obs, reward, terminated, truncated, _ = envs.step(env_key, env, action)
        return env, obs, key, going * (1 - terminated) * (1 - truncated), returns + going * reward, step + 1

    def goes_on(carry):
        *_, going, _, step = carry
        return going.any() & (step < 100_000)  # an episode without a time limit could go on for ever

    key, env_key = jax.random.split(key)
    carry = (*envs.reset(env_key), key, jnp.ones(envs.num_envs), jnp.zeros(envs.num_envs), 0)
    *_, returns, _ = jax.lax.while_loop(goes_on, play, carry)
    return returns


def evaluate_on_host(variables: dict, key: Array, agent: Agent, args: Args, run_dir: Path) -> np.ndarray:
    """The same with Gymnasium, `eval_episodes` one after the other, from seeds that training never uses."""
    env = make_env(args, "of the evaluation", "rgb_array" if args.capture_video else None)
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(run_dir / "videos"), episode_trigger=lambda _: True)

    @jax.jit
    def act(obs, t):
        return agent.apply(variables, obs, jax.random.fold_in(key, t), not args.eval_sample, method="act")

    steps = itertools.count()
    returns = np.zeros(args.eval_episodes)
    for i, seed in enumerate(env_seeds(args.seed, 0, args.eval_episodes, stream=1)):
        obs, _ = env.reset(seed=seed)
        for _ in range(100_000):  # an episode without a time limit could go on for ever
            action = np.asarray(act(np.asarray(obs, np.float32), next(steps)))
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


def init_state(seed: Array, agent: Agent, envs: Envs, args: Args) -> State:
    """The state of one agent before its first step."""
    key, params_key, env_key = jax.random.split(jax.random.PRNGKey(seed), 3)
    env, obs = None, jnp.zeros((args.num_envs, agent.obs_size))
    if isinstance(envs, GymnaxEnvs):
        env, obs = envs.reset(env_key)
    # one agent at a time: a batch of QR decompositions, for orthogonal weights, can deadlock XLA's threads
    variables = jax.custom_batching.sequential_vmap(agent.init)(params_key, obs)
    opt_state = make_optimizer(args).init(variables["params"])
    zero = jnp.zeros((), jnp.int32)
    state = State(variables, opt_state, key, env, obs, jnp.zeros(args.num_envs), zero, zero)
    state = jax.tree.map(lambda x: x.astype(x.dtype), state)  # no weak types: they would compile every program twice
    return spread_envs(state)


def fetch(tree: Any) -> Any:
    """The arrays in NumPy, whole on each host where there are several."""
    return process_allgather(tree, tiled=True) if jax.process_count() > 1 else jax.device_get(tree)


def first(tree: Any) -> Any:
    """The arrays of the first agent, without the axis of agents."""
    return jax.tree.map(lambda x: x[0], tree)


def over_seeds(function: Callable, args: Args, devices: list[jax.Device]) -> Callable:
    """Turn `function` of one agent's arrays into one of arrays with a leading axis of agents, split over the devices.
    A single agent is computed without that axis, which is faster."""
    if args.num_seeds > 1:
        spec, mesh = jax.sharding.PartitionSpec("agents"), jax.sharding.Mesh(devices, "agents")
        function = jax.vmap(function)
        # the devices never wait for each other: nothing is repartitioned, no collectives between them
        return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return lambda *trees: jax.tree.map(lambda x: x[None], function(*first(trees)))


def in_parts(function: Callable, data: Any, mean: bool) -> Any:
    """`function(data)`, but on a CPU many rows are split into equal parts that are taken one after the other, and their
    outcomes are merged as in `in_shares`. Twice as fast: the activations of a few hundred rows fit into the cache."""
    size = len(jax.tree.leaves(data)[0])
    rows = max((n for n in range(256, 513) if size % n == 0), default=size)
    if size <= 4096 or rows == size or jax.default_backend() != "cpu":
        return function(data)
    parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), data)
    return jax.tree.map(lambda x: x.mean(0) if mean else x.ravel(), jax.lax.map(function, parts))


def spread(tree: Any, specs: Any = None) -> Any:
    """`tree`, under --shard-envs replicated on the devices or split as `specs` say. The compiler adds the
    communication."""
    sharded = "envs" in jax.sharding.get_abstract_mesh().shape
    return jax.lax.with_sharding_constraint(tree, specs or jax.sharding.PartitionSpec()) if sharded else tree


def in_shares(function: Callable, data: Any, mean: bool = False) -> Any:
    """`function(data)`. Under --shard-envs each device calls it with an equal share of the rows. Their outcomes, a
    number per row, are concatenated or, with `mean`, trees of arrays that are averaged."""
    if "envs" not in jax.sharding.get_abstract_mesh().shape:
        return in_parts(function, data, mean)
    unravel = None  # from one array back to the outcome: known when `on_each` has been traced

    def on_each(share):
        nonlocal unravel
        flat, unravel = ravel_pytree(in_parts(function, share, mean))  # one array: each costs a round of messages
        return flat[None] if mean else flat

    cut = jax.sharding.PartitionSpec("envs")
    # [rows], or with `mean` [devices, size of an outcome]
    flat = jax.shard_map(on_each, in_specs=cut, out_specs=cut, check_vma=False)(spread(data))
    return unravel(flat.mean(0)) if mean else flat


def spread_envs(state: State) -> State:
    """The state, under --shard-envs its environments split evenly over the devices, the rest replicated."""
    whole, cut = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("envs")
    return spread(state, State(whole, whole, whole, cut, cut, cut, whole, whole))


def make_train_step(
    agent: Agent, envs: Envs, args: Args, devices: list[jax.Device]
) -> Callable[[State], tuple[State, Batch, dict[str, Array]]]:
    """A rollout and its update, with what to log: one compiled function where gymnax has the environment."""

    def train_step(state):
        state, batch = rollout(state, agent, envs, args)
        state, metrics = update(state, batch, agent, args)
        obs, next_obs = (jnp.abs(x).max(-1) for x in (batch.obs, batch.next_obs))  # finite if all are
        batch = batch._replace(obs=obs, action=None, next_obs=next_obs)
        return spread_envs(state), batch, metrics

    if isinstance(envs, GymnaxEnvs):
        return jax.jit(over_seeds(train_step, args, devices), donate_argnums=0)
    act = jax.jit(partial(agent.apply, method="act"))
    jitted_first = jax.jit(first)
    jitted_update = jax.jit(lambda *played: jax.tree.map(lambda x: x[None], update(*played, agent, args)))

    def train_step_on_host(state):
        state, batch = rollout_on_host(jitted_first(state), act, envs, args)
        state, metrics = jitted_update(state, batch)
        return state, jax.tree.map(lambda x: x[None], batch), metrics

    return train_step_on_host


def open_log(args: Args, run_dir: Path, step: int) -> EventFileWriter:
    """A log for TensorBoard. Resuming at `step` voids what was logged after it."""
    writer = EventFileWriter(str(run_dir), max_queue_size=1000)  # by default 10: training would wait for the disk
    if step:
        writer.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
    text = text_pb("arguments/text_summary", json.dumps(asdict(args)))  # as SummaryWriter.add_text names it
    writer.add_event(Event(wall_time=time.time(), step=step, summary=text))
    return writer


def log(writer: EventFileWriter, scalars: list[tuple[str, float]], step: int) -> None:
    """Write tags and values as one event: one event each would cost as much as learning."""
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars]
    writer.add_event(Event(wall_time=time.time(), step=int(step), summary=Summary(value=values)))


def solved(recent_returns: list[deque], args: Args) -> bool:
    """Whether each agent's full window of returns averages --target-return or more."""
    full = all(len(returns) == args.return_window for returns in recent_returns)
    means = (sum(returns) / args.return_window for returns in recent_returns)
    return args.target_return is not None and full and min(means) >= args.target_return


def learn(
    state: State, recent_returns: list[deque], train_step: Callable, args: Args, run_dir: Path
) -> tuple[State, list[list[tuple[float, int]]]]:
    """Train up to the last step, logging and saving on the way. Returns (return, step) of each finished episode."""
    episodes = [[] for _ in recent_returns]
    step, iteration = (int(fetch(x).min()) for x in (state.step, state.iteration))
    first_step, ahead = step, None
    start, stopped = time.perf_counter(), 0
    with (
        StopSignal() as stop,
        closing(open_log(args, run_dir, step)) as writer,
        tqdm(total=args.last_step, initial=step, unit=" steps", mininterval=0.5) as bar,
    ):
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=4))
        while step < args.last_step and not solved(recent_returns, args) and (ahead or not stopped):
            lr = learning_rate(step, args)
            state, *outcome = ahead or train_step(state)
            step, iteration = step + args.batch_size, iteration + 1
            to_save = args.save_every and iteration % args.save_every == 0
            # The next compiled iteration runs while Python logs this one, unless this one is saved or may be the last.
            wait = state.env is None or to_save or stopped or args.target_return is not None or step >= args.last_step
            ahead = None if wait else train_step(state)
            batch, metrics = fetch(outcome)
            check_finite(batch)
            bad = [name for name, value in metrics.items() if not np.isfinite(value).all()]
            if bad:
                raise FloatingPointError(f"iteration {iteration}: {', '.join(bad)} not finite")

            done = batch.done > 0
            ended = np.nonzero(done)
            returns, steps = batch.episode_return[ended].tolist(), batch.step[ended[:2]].tolist()
            for s, episode_return, at in zip(ended[0], returns, steps, strict=True):
                recent_returns[s].append(episode_return)
                episodes[s].append((episode_return, at))
            for t in np.unique(ended[1]) if args.num_seeds == 1 else ():
                scalars = [("charts/episodic_return", x) for x in batch.episode_return[0, t, done[0, t]]]
                scalars += [("charts/episodic_length", x) for x in batch.episode_length[0, t, done[0, t]]]
                log(writer, scalars, batch.step[0, t])
            scalars = [(f"losses/{name}", value.mean()) for name, value in metrics.items()]
            sps = args.num_seeds * (step - first_step) / (time.perf_counter() - start)
            scalars += [("charts/learning_rate", lr), ("charts/SPS", sps)]
            mean_returns = np.array([sum(returns) / (len(returns) or math.nan) for returns in recent_returns])
            shown = f"return {mean_returns.mean():.1f}"
            if args.num_seeds > 1 and all(recent_returns):
                interval = 1.96 * mean_returns.std(ddof=1) / math.sqrt(args.num_seeds)
                shown += f" ± {interval:.1f} over {args.num_seeds} seeds"
                scalars += [("charts/episodic_return", mean_returns.mean()), ("charts/episodic_return_95", interval)]
            log(writer, scalars, step)
            bar.set_postfix_str(shown, refresh=False)
            bar.update(min(step, args.last_step) - bar.n)

            if to_save:
                save(state, recent_returns, args, run_dir)
                writer.flush()
            stopped = int(fetch(np.array([stop.number])).max())
        if args.num_seeds > 1 and not stopped:
            for s, mean_return in enumerate(mean_returns):
                log(writer, [("charts/final_return_of_seed", mean_return)], args.seed + s)
        save(state, recent_returns, args, run_dir)
    if stopped := int(fetch(np.array([stop.number])).max()):  # by a signal that came since, too
        print(f"stopped at step {step}, go on with these flags and --resume {run_dir}", file=sys.stderr)
        raise SystemExit(128 + stopped)
    return state, episodes


def even_share(args: Args, num_devices: int) -> int:
    """The largest number of devices, `num_devices` at most, that divides what they share."""
    shared = math.gcd(args.num_envs, args.minibatch_size) if args.shard_envs else args.num_seeds
    return max(n for n in range(1, num_devices + 1) if shared % n == 0)


def pick_devices(args: Args) -> list[jax.Device]:
    """The GPUs, or the CPU's cores as one device each, as many as can share the work evenly. JAX starts its
    backends once, at the first array: the first call in a process decides which devices there are."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes 75 % of GPU memory
    # where the system tells, only the cores that this process may use
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts, platform = even_share(args, cores), "cuda" if args.cuda else "cpu"
    # XLA scatters the work of all devices over all threads: one more helps only for 2^22 more products a layer
    rows = args.num_seeds * (args.minibatch_size if args.minibatch_size <= 4096 else 512)  # more are taken `in_parts`
    threads = min(cores, rows * max(args.hidden_sizes, default=1) ** 2 // 2**22) if parts == 1 else parts
    given = os.environ.get("NPROC")
    os.environ["NPROC"] = given or str(cores if args.cuda else max(1, threads))  # for a GPU it compiles on them
    if "JAX_COORDINATOR_ADDRESS" in os.environ and not jax.distributed.is_initialized():  # several hosts
        number, rank = (int(os.environ[f"JAX_{name}"]) for name in ("NUM_PROCESSES", "PROCESS_ID"))
        jax.distributed.initialize(num_processes=number, process_id=rank)
    if args.cuda and not jax.config.jax_default_matmul_precision:
        jax.config.update("jax_default_matmul_precision", "float32")  # by default TF32: log-probabilities 1e-4 off
    if not args.cuda:
        jax.config.update("jax_platforms", "cpu")
        with suppress(RuntimeError):  # started already
            jax.config.update("jax_num_cpu_devices", parts)
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        print("warning: --cuda: no GPU found, or JAX started without one; using the CPU", file=sys.stderr)
        devices = jax.devices("cpu")
    if given is None:
        del os.environ["NPROC"]  # processes started from this one choose for themselves
    share = even_share(args, len(devices))
    if share < len(devices) and jax.process_count() > 1:
        flag = f"--num-envs {args.num_envs}" if args.shard_envs else f"--num-seeds {args.num_seeds}"
        raise ValueError(f"{flag}: must divide evenly among the {len(devices)} devices")
    return devices[:share]


# what may end training, with one line that names the last checkpoint
FAILURES = (FloatingPointError, gym.error.Error, OSError, EOFError, MemoryError, jax.errors.JaxRuntimeError)


def train(args: Args) -> Result:
    """Train one agent, or --num-seeds of them, or with --eval-only evaluate.

    Raises ValueError for wrong input, before anything is written, and RuntimeError for one that comes later;
    gymnasium.error.Error for an exception of an environment; FloatingPointError for an observation, reward, loss,
    gradient or weight that is not finite; SystemExit, when all is saved, after Ctrl-C (130) or SIGTERM (143).
    """
    args = plain(args)
    check_args(args)
    devices = pick_devices(args)
    rank = jax.process_index()
    here = next(device for device in devices if device.process_index == rank)
    out, err = (StringIO(), StringIO()) if rank else (sys.stdout, sys.stderr)  # host 0 alone speaks, and keeps files
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        TemporaryDirectory() as scratch,
        jax.default_device(here),
        closing(make_envs(args)) as envs,
        jax.set_mesh(jax.sharding.Mesh(devices, "envs")) if args.shard_envs else nullcontext(),
        ExitStack() as after,
    ):
        # put back at the end: the caller may be drawing the next settings from these generators
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        agent = make_agent(envs, args)
        seeds = np.arange(args.seed, args.seed + args.num_seeds, dtype=np.uint32)
        init = partial(init_state, agent=agent, envs=envs, args=args)
        state = jax.jit(over_seeds(init, args, devices))(seeds)
        recent_returns = [deque(maxlen=args.return_window) for _ in seeds]
        state, run_dir = (state, None) if args.resume is None else load(state, recent_returns, args)
        step, episodes = int(fetch(state.step).min()), [[] for _ in seeds]
        run_dir = Path(scratch) if rank else run_dir
        training = not args.eval_only
        if training and (step >= args.last_step or solved(recent_returns, args)):
            print(f"nothing to train: {run_dir} is finished at step {step}, --eval-only evaluates it")
            training, args = False, replace(args, eval_episodes=0)
        if training:
            if not isinstance(envs, GymnaxEnvs):
                obs, _ = envs.reset(seed=env_seeds(args.seed, step, args.num_envs))  # new episodes, resumed or not
                obs = jnp.asarray(obs, jnp.float32)[None]
                state = state._replace(obs=obs, running_return=jnp.zeros_like(state.running_return))
            run_dir = run_dir or make_run_dir(args)  # not before: environments that cannot start leave nothing behind
            train_step = make_train_step(agent, envs, args, devices)

        eval_returns = np.zeros((args.num_seeds, 0))
        try:
            if training:
                state, episodes = learn(state, recent_returns, train_step, args, run_dir)
            if args.eval_episodes:
                keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.PRNGKey(s), 2**31))(seeds)  # no training key
                if isinstance(envs, GymnaxEnvs) and not args.capture_video:
                    play = partial(evaluate, agent=agent, envs=GymnaxEnvs(args, args.eval_episodes), args=args)
                    eval_returns = fetch(jax.jit(over_seeds(play, args, devices))(state.variables, np.asarray(keys)))
                else:
                    eval_returns = evaluate_on_host(first(state.variables), keys[0], agent, args, run_dir)[None]
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
            path = run_dir / "checkpoint.msgpack"
            saved = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was saved"
            kind = MemoryError if isinstance(error, MemoryError) else type(error)  # NumPy's takes no message
            raise kind(f"{str(error) or kind.__name__}; {saved}") from error
        for seed, returns in zip(seeds, eval_returns, strict=True) if args.eval_episodes else ():
            who = f"seed {seed}: " if args.num_seeds > 1 else ""
            print(f"{who}evaluation: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
        print(run_dir)
    variables = state.variables
    returns = [np.array([x for x, _ in of_seed]) for of_seed in episodes]
    steps = [np.array([step for _, step in of_seed], dtype=int) for of_seed in episodes]
    if args.num_seeds == 1:
        variables, returns, steps, eval_returns = first(variables), returns[0], steps[0], eval_returns[0]
    return Result(variables, returns, steps, eval_returns, run_dir)


def main() -> None:
    """Run from the command line: an error becomes one line, with exit status 2 for wrong input, else 1."""
    try:
        train(tyro.cli(Args))
    except (ValueError, *FAILURES) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2 if isinstance(error, ValueError) else 1
        if jax.distributed.is_initialized():
            os._exit(status)  # else the exit would wait, for minutes, for hosts that wait for this one
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
