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
"""REINFORCE, the Monte Carlo policy gradient, in JAX.

A stochastic policy pi(a|s) is improved by playing whole episodes and making each action more likely in proportion to
the return that followed it. By the log-derivative trick the gradient of the expected return J needs no model of the
environment [1; 2, sec. 13.3]:

    grad J = E[ sum_t G_t grad log pi(a_t|s_t) ],   G_t = R_t + gamma (1 - done_t) G_{t+1}

and the mean over N episodes is an unbiased estimate of it. Each environment plays exactly one episode per update: the
N episodes that finish first would mostly be short ones. Two liberties, which everyone takes: a time limit counts as
the end of the episode, and the factor gamma^t of the discounted sum [2, box in sec. 13.3] is left out. A third, unless
--no-norm-return: returns are standardised in each update, which acts as a baseline and scales the step.

No exploration has to be designed, actions may be continuous and the policy changes smoothly. The price is variance:
G_t depends on everything that happened after t. vpg_advantage_jax.py subtracts a learned baseline to lower it.

[1] Williams 1992, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning
[2] Sutton and Barto 2018, Reinforcement Learning: An Introduction, 2nd edition

Shapes: time comes first. T = the time limit of an episode, as shapes are fixed; N = num_envs; D and A are the sizes
of an observation and a Box action. Booleans are floats, 0 or 1; the rewards and dones of step t follow its action.
An environment that gymnax knows is stepped inside the compiled program, rollout and update being one function; other
environments are stepped on the host. A resumed run is the uninterrupted one: every iteration starts new episodes.

Run:   python reinforce_jax.py --env-id CartPole-v1
Diff:  diff reinforce_jax.py vpg_advantage_jax.py (what a baseline adds)
       diff reinforce.py reinforce_jax.py (the same in PyTorch)
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
from contextlib import ExitStack, closing, redirect_stderr, redirect_stdout, suppress
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
    """Train an agent by REINFORCE; the log, the arguments and the checkpoint go to a new folder under runs/."""

    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    env_id: str = "CartPole-v1"  # any gymnax or Gymnasium id; module:Id imports the module first
    env_backend: Literal["auto", "gymnax", "gymnasium"] = "auto"  # auto: gymnax where it has the environment
    seed: int = bounded(1, "[0, 4294967295]")  # fixes every random number
    num_seeds: int = bounded(1, "[1, inf)")  # independent agents in one program, from seed, seed + 1, ...; gymnax only
    total_timesteps: int = bounded(300_000, "[1, 2000000000]")  # environment steps, all environments together
    cuda: bool = False  # use the GPU; with few environments the CPU is faster
    async_envs: bool = False  # a process per environment: for slow ones, with about a core for each
    capture_video: bool = False  # record the evaluation to <run folder>/videos
    save_every: int = bounded(50, "[0, inf)")  # iterations between checkpoints; 0: only at the end
    resume: str | None = None  # checkpoint or run folder to continue; flags are not restored
    eval_only: bool = False  # evaluate the checkpoint of --resume and train no further
    eval_episodes: int = bounded(10, "[0, inf)")  # episodes of the evaluation at the end
    eval_sample: bool = False  # evaluate with sampled actions, not the most likely ones
    return_window: int = bounded(100, "[1, inf)")  # number of episodes in the mean return
    target_return: float | None = bounded(None, "(-inf, inf)")  # stop when a full window's mean return reaches this
    learning_rate: float = bounded(3e-3, "(0, inf)")  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    num_envs: int = bounded(8, "[1, inf)")  # parallel environments, one episode of each per update (N)
    max_episode_steps: int | None = bounded(None, "[1, 100000000]")  # time limit, in place of the environment's own
    gamma: float = bounded(0.99, "[0, 1]")  # discount factor
    temperature: float = bounded(1.0, "(0, inf)")  # of the softmax over Discrete actions, higher explores more
    norm_return: bool = True  # standardise the returns of each update
    ent_coef: float = bounded(0.0, "[0, inf)")  # weight of the entropy bonus
    max_grad_norm: float = bounded(0.5, "(0, inf)")  # longer gradients are scaled down to this norm
    hidden_sizes: tuple[int, ...] = bounded((64, 64), "[1, inf)")  # widths of the hidden layers
    activation: Literal["tanh", "relu"] = "tanh"  # of the hidden layers

    @property
    def last_step(self) -> int:
        return self.total_timesteps


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
    if args.seed + args.num_seeds > 2**32:
        raise ValueError(f"--num-seeds {args.num_seeds}: with --seed {args.seed} the last would be above 4294967295")
    if len(os.fsencode(args.exp_name)) > 100:  # a file system takes 255 for the whole name
        raise ValueError(f"--exp-name {args.exp_name}: longer than 100 bytes")
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
        self.time_limit = env.spec.max_episode_steps

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
        if env.spec.max_episode_steps is None:
            raise ValueError("has no time limit, give one by --max-episode-steps")
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
        self.time_limit = int(self.params.max_steps_in_episode)
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
    if args.num_seeds > 1:
        raise ValueError(f"--num-seeds {args.num_seeds}: needs gymnax, --env-id {args.env_id} runs in gymnasium")
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


class Agent(nn.Module):
    """Policy network.

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
        if not self.discrete:
            self.log_std = self.param("log_std", nn.initializers.zeros, (self.action_size,))

    def __call__(self, obs: Array) -> None:
        """Touches every part, for `init`."""
        self.act(obs, None, greedy=True)

    def act(self, obs: Array, key: Array | None, greedy: bool = False) -> Array:
        """A sampled action, or the most likely one: [..., D] -> [...] (Discrete) or [..., A] (Box)."""
        out = self.actor(obs) / self.args.temperature
        if greedy:
            return out.argmax(-1) if self.discrete else out
        if self.discrete:
            return jax.random.categorical(key, out)
        return out + jnp.exp(self.log_std) * jax.random.normal(key, out.shape)

    def log_prob(self, obs: Array, action: Array) -> tuple[Array, Array]:
        """log pi(a|s) and the entropy of pi(.|s) in nats, both [...], summed over a Box action's dimensions."""
        out = self.actor(obs) / self.args.temperature
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
    if not discrete and args.temperature != 1:
        raise ValueError(f"--temperature {args.temperature}: only Discrete actions have a softmax")
    return Agent(envs.single_observation_space.shape[0], int(space.n) if discrete else space.shape[0], discrete, args)


# ======================================================== Data ========================================================


class Batch(NamedTuple):
    """What one rollout saw: NumPy arrays where the host collects them, else JAX arrays."""

    obs: Array  # [T, N, D]
    action: Array  # [T, N] or [T, N, A], as sampled: the environment clips it
    reward: Array  # [T, N]
    done: Array  # [T, N] the episode ended here
    mask: Array  # [T, N] 1 up to that step, inclusive, 0 after it
    step: Array  # [T] environment steps of the run so far, including this row's
    episode_return: Array  # [T, N] undiscounted return of the episode that ended here, if one did
    episode_length: Array  # [T, N] and its number of steps


class State(NamedTuple):
    """All that changes during training. In `train` and `learn` every array has one more axis in front, of num_seeds."""

    variables: dict  # "params" of the agent
    opt_state: optax.OptState
    key: Array  # PRNG key of the training, split at every use
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


def discounted_returns(reward: Array, done: Array, gamma: float) -> Array:
    """Return from each step to the end of its episode: all [T, N] -> [T, N]."""

    def step_back(following, now):
        reward_t, done_t = now
        # G_t = R_t + gamma (1 - done_t) G_{t+1}    (Sutton and Barto 2018, eq. 3.9, whose R_{t+1} is our R_t)
        ret = reward_t + gamma * (1 - done_t) * following
        return ret, ret

    # unrolled, as a GPU starts kernels anew for every turn of a loop
    return jax.lax.scan(step_back, jnp.zeros_like(reward[0]), (reward, done), reverse=True, unroll=8)[1]


def standardize(x: Array, mask: Array) -> Array:
    """Zero mean and unit population standard deviation where `mask` is 1: the sample's is NaN for a single number."""
    mean = (x * mask).sum() / mask.sum()
    std = jnp.sqrt(((x - mean) ** 2 * mask).sum() / mask.sum())
    return (x - mean) / (std + 1e-8)


def policy_loss(logp: Array, ret: Array, mask: Array) -> Array:
    """The policy-gradient loss: all [T, N] -> scalar. Only its gradient means anything."""
    # 1/N sum_n sum_t G_t log pi(a_t|s_t)    (Sutton and Barto 2018, eq. 13.8; a mean over steps would be biased)
    return -(logp * ret * mask).sum() / mask.shape[-1]


# ====================================================== Rollout =======================================================


def check_finite(batch: Batch) -> None:
    """Raise FloatingPointError for batches, [S, T, N, ...], whose observations or rewards are not all finite."""
    for name in ("obs", "reward"):
        finite = np.isfinite(getattr(batch, name))
        if not finite.all():
            s, t, n, *_ = np.argwhere(~finite)[0]
            raise FloatingPointError(f"{name} of environment {n} not finite by step {batch.step[s, t]}")


def rollout(state: State, agent: Agent, envs: GymnaxEnvs, args: Args) -> tuple[State, Batch]:
    """Play one whole episode in every environment. Those that are done play on, masked, until the last one is."""
    key, reset_key, rollout_key = jax.random.split(state.key, 3)

    def play(env, obs, alive, key):
        act_key, env_key = jax.random.split(key)
        action = agent.apply(state.variables, obs, act_key, method="act")
        env, next_obs, reward, terminated, truncated, info = envs.step(env_key, env, action)
        done = alive * jnp.maximum(terminated, truncated)
        episode = info["returned_episode_returns"], info["returned_episode_lengths"]
        steps = alive.sum().astype(jnp.int32)
        return env, next_obs, alive - done, Batch(obs, action, reward, done, alive, steps, *episode)

    def play_row(carry):
        t, batch, (env, obs, alive) = carry
        env, obs, alive, row = play(env, obs, alive, jax.random.fold_in(rollout_key, t))
        return t + 1, jax.tree.map(lambda rows, x: rows.at[t].set(x), batch, row), (env, obs, alive)

    def going(carry):
        alive = carry[2][2].any()
        return alive if args.num_seeds == 1 else jax.lax.pmax(alive, "seeds")  # one answer for all: no branch per seed

    start = (*envs.reset(reset_key), jnp.ones(args.num_envs))
    row = jax.eval_shape(play, *start, rollout_key)[-1]
    buffer = jax.tree.map(lambda x: jnp.zeros((envs.time_limit, *x.shape), x.dtype), row)
    _, batch, _ = jax.lax.while_loop(going, play_row, (0, buffer, start))
    return state._replace(key=key), batch._replace(step=state.step + batch.step.cumsum())


def rollout_on_host(state: State, act: Callable, envs: gym.vector.VectorEnv, args: Args) -> tuple[State, Batch]:
    """The same with Gymnasium: a loop in Python around the compiled `act`, with NumPy alone outside it."""
    key, rollout_key = jax.random.split(state.key)
    current, _ = envs.reset(seed=env_seeds(args.seed, int(state.step), args.num_envs))
    num_steps = envs.get_attr("time_limit")[0]
    obs = np.zeros((num_steps, *current.shape), np.float32)
    action = np.zeros((num_steps, *envs.action_space.shape), envs.action_space.dtype)
    scalars = np.zeros((5, num_steps, args.num_envs), np.float32)
    reward, done, mask, episode_return, episode_length = scalars
    alive = np.ones(args.num_envs)
    for t, act_key in enumerate(np.asarray(jax.random.split(rollout_key, num_steps))):
        obs[t] = current
        action[t] = act(state.variables, obs[t], act_key)
        current, reward[t], terminated, truncated, info = envs.step(action[t])
        done[t], mask[t] = alive * (terminated | truncated), alive
        if "final_obs" in info:
            episode_return[t] = info["final_info"]["episode"]["r"]
            episode_length[t] = info["final_info"]["episode"]["l"]
        alive = alive - done[t]
        if not alive.any():
            break
    step = int(state.step) + mask.sum(1).cumsum().astype(np.int32)
    return state._replace(key=key), Batch(obs, action, reward, done, mask, step, episode_return, episode_length)


# ======================================================= Update =======================================================


def loss_fn(params: dict, batch: Batch, ret: Array, agent: Agent, args: Args) -> tuple[Array, dict[str, Array]]:
    """Loss of a batch, and what to log."""
    logp, entropy = agent.apply({"params": params}, batch.obs, batch.action, method="log_prob")
    pg_loss = policy_loss(logp, ret, batch.mask)
    loss = pg_loss - args.ent_coef * (entropy * batch.mask).sum() / args.num_envs
    metrics = {"policy_loss": pg_loss, "entropy": (entropy * batch.mask).sum() / batch.mask.sum()}
    return loss, metrics


def learning_rate(step: int, args: Args) -> float:
    """Constant, or from --learning-rate down to 0 at the last step."""
    return args.learning_rate * ((args.last_step - step) / args.last_step if args.anneal_lr else 1)


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam on clipped gradients, without the learning rate: `update` multiplies by it, as it changes with the step."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=1e-5))


def update(state: State, batch: Batch, agent: Agent, args: Args) -> tuple[State, dict[str, Array]]:
    """One gradient step on one batch. Also returns what to log."""
    params = state.variables["params"]
    ret = discounted_returns(batch.reward, batch.done, args.gamma)
    ret = standardize(ret, batch.mask) if args.norm_return else ret

    lr = learning_rate(state.step, args)
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params, batch, ret, agent, args)
    metrics["grad_norm"] = optax.tree.norm(grads)
    direction, opt_state = make_optimizer(args).update(grads, state.opt_state)
    params = jax.tree.map(lambda p, d: p - lr * d, params, direction)
    state = state._replace(variables={"params": params}, opt_state=opt_state)
    return state._replace(step=batch.step[-1], iteration=state.iteration + 1), metrics


# ============================================= Checkpoint and evaluation ==============================================


def identity(args: Args) -> dict:
    """What a checkpoint must share with the run that loads it."""
    names = ("env_id", "num_seeds", "hidden_sizes", "activation", "temperature")
    names += ("seed",) if args.num_seeds > 1 else ()  # by which the agents are told apart
    backend = "gymnax" if uses_gymnax(args) else "gymnasium"
    ours = {"format": 1, "script": "reinforce_jax.py", "env_backend": backend}
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


def init_state(seed: Array, agent: Agent, args: Args) -> State:
    """The state of one agent before its first step."""
    key, params_key = jax.random.split(jax.random.PRNGKey(seed))
    obs = jnp.zeros((args.num_envs, agent.obs_size))
    # one agent at a time: a batch of QR decompositions, for orthogonal weights, can deadlock XLA's threads
    variables = jax.custom_batching.sequential_vmap(agent.init)(params_key, obs)
    opt_state = make_optimizer(args).init(variables["params"])
    zero = jnp.zeros((), jnp.int32)
    state = State(variables, opt_state, key, zero, zero)
    return jax.tree.map(lambda x: x.astype(x.dtype), state)  # no weak types: they would compile every program twice


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
        function = jax.vmap(function, axis_name="seeds")
        # the devices never wait for each other: nothing is repartitioned, no collectives between them
        return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return lambda *trees: jax.tree.map(lambda x: x[None], function(*first(trees)))


def make_train_step(
    agent: Agent, envs: Envs, args: Args, devices: list[jax.Device]
) -> Callable[[State], tuple[State, Batch, dict[str, Array]]]:
    """A rollout and its update, with what to log: one compiled function where gymnax has the environment."""

    def train_step(old):
        state, batch = rollout(old, agent, envs, args)
        state, metrics = update(state, batch, agent, args)
        if args.num_seeds > 1:  # agents reach the last step in different iterations, and then stay as they are
            active = old.step < args.last_step
            state = jax.tree.map(partial(jnp.where, active), state, old)
            batch = batch._replace(done=batch.done * active, step=jnp.where(active, batch.step, old.step))
        largest = jnp.abs(batch.obs).max(-1)  # finite if all are
        return state, batch._replace(obs=largest, action=None, mask=None), metrics

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
    step = first_step = int(fetch(state.step).min())
    start, stopped = time.perf_counter(), 0
    with (
        StopSignal() as stop,
        closing(open_log(args, run_dir, step)) as writer,
        tqdm(total=args.last_step, initial=step, unit=" steps", mininterval=0.5) as bar,
    ):
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=4))
        while step < args.last_step and not solved(recent_returns, args) and not stopped:
            lr = learning_rate(step, args)
            state, batch, metrics = train_step(state)
            batch, metrics, iteration = fetch((batch, metrics, state.iteration))
            step, iteration = int(batch.step[:, -1].min()), int(iteration.max())
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

            if args.save_every and iteration % args.save_every == 0:
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
    return max(n for n in range(1, num_devices + 1) if args.num_seeds % n == 0)


def pick_devices(args: Args) -> list[jax.Device]:
    """The GPUs, or the CPU's cores as one device each, as many as can share the work evenly. JAX starts its
    backends once, at the first array: the first call in a process decides which devices there are."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes 75 % of GPU memory
    # where the system tells, only the cores that this process may use
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts, platform = even_share(args, cores), "cuda" if args.cuda else "cpu"
    # XLA scatters the work of all devices over all threads: one more helps only for 2^22 more products a layer
    rows = args.num_seeds * args.num_envs * 32  # as if episodes had 32 steps: two threads pay from 64 of them
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
        raise ValueError(f"--num-seeds {args.num_seeds}: must divide evenly among the {len(devices)} devices")
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
        ExitStack() as after,
    ):
        # put back at the end: the caller may be drawing the next settings from these generators
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        agent = make_agent(envs, args)
        seeds = np.arange(args.seed, args.seed + args.num_seeds, dtype=np.uint32)
        init = partial(init_state, agent=agent, args=args)
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
                envs.reset(seed=env_seeds(args.seed, step, args.num_envs, stream=2))
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
