# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "flax>=0.11,<0.13", "gymnasium>=1.1,<1.4", "gymnax>=1.0.1,<1.1", "jax>=0.8,<0.11", "numpy>=1.26,<3",
#     "optax>=0.2.6,<0.3", "six", "tensorboardX>=2.6,<3", "tqdm", "tyro>=0.9,<2",
# ]
# ///
"""Proximal policy optimisation (PPO) with the clipped surrogate objective, in JAX.

The gradient of vpg_advantage_jax.py holds only for the policy that played the batch, so a batch is good for one step.
PPO takes many, on a surrogate that gains nothing from moving the probability ratio r_t further than eps from 1:

    maximise  E_t[ min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) ],   r_t = pi(a_t|s_t) / pi_old(a_t|s_t)    [2, eq. 7]

with a squared-error value loss and an entropy bonus [2, eq. 9]. A_t is the generalised advantage [1], see `gae`, which
[2] computes once per batch. A time limit is no end: what it cuts off is worth V(s'_t). Only `terminated` means that
nothing follows; `done` ends the sum in `gae`.

[1] Schulman et al. 2016, Generalized Advantage Estimation, arXiv:1506.02438
[2] Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347

Functions are of one agent; vmap makes S = num_seeds of it. T = num_steps, N = num_envs; D and A are the sizes of an
observation and a Box action.

Run: python ppo_jax.py --env-id CartPole-v1. Diff: vpg_advantage_jax.py (what clipping adds), ppo.py (in PyTorch).
"""

import importlib
import json
import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn, serialization
from jax import Array
from tensorboardX import SummaryWriter
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    """Train an agent; log, flags and checkpoint go to a new folder under runs/."""

    exp_name: str = Path(__file__).stem  # for the name of the run folder
    env_id: str = "CartPole-v1"  # any Gymnasium or gymnax id; module:Id imports the module first
    env_backend: Literal["auto", "jax", "gymnasium"] = "auto"  # auto: in the compiled program where possible
    seed: int = 1  # fixes every random number
    num_seeds: int = 1  # independent runs in one program, of seed, seed + 1, ... (S)
    total_timesteps: int = 200_000  # environment steps in all
    cuda: bool = False  # use the GPU; with few environments it is slower
    async_envs: bool = False  # a process for each environment
    capture_video: bool = False  # record the evaluation to <run folder>/videos
    save_every: int = 50  # iterations between checkpoints; 0: only at the end
    resume: Path | None = None  # run folder to continue, or if finished evaluate
    eval_episodes: int = 10  # episodes of the final evaluation
    eval_sample: bool = False  # sample the actions of the evaluation
    return_window: int = 100  # episodes in the mean return
    target_return: float | None = None  # stop when the mean of a full window reaches this
    learning_rate: float = 2e-3  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    num_envs: int = 8  # parallel environments (N)
    num_steps: int = 128  # steps of each environment in a batch (T)
    max_episode_steps: int | None = None  # time limit, in place of the environment's own
    gamma: float = 0.98  # discount factor
    gae_lambda: float = 0.9  # 0: the TD error; 1: return - value
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 6  # passes over each batch
    norm_adv: bool = True  # standardise the advantages of each minibatch
    norm_obs: bool = False  # standardise observations
    norm_reward: bool = False  # divide rewards by the deviation of discounted returns
    clip_coef: float = 0.2  # eps: a ratio further than this from 1 gains nothing
    clip_vloss: bool = False  # clip the change of the value, too
    target_kl: float | None = None  # end the update after an epoch of a larger KL
    recompute_adv: bool = False  # new advantages in each epoch (arXiv:2006.05990)
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # of the gradient; longer ones are scaled down
    hidden_sizes: tuple[int, ...] = (64, 64)  # widths of the hidden layers
    activation: Literal["tanh", "relu"] = "tanh"  # of the hidden layers

    @property
    def batch_size(self):
        return self.num_envs * self.num_steps

    def __post_init__(self):
        """Raise ValueError for what cannot work; tyro shows it without a traceback."""
        for name, value in vars(self).items():
            positive = name.startswith("num_") or name in ("update_epochs", "return_window", "max_episode_steps")
            low, high = int(positive), 1 if name in ("gamma", "gae_lambda") else math.inf
            if isinstance(value, int | float) and name != "target_return" and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must lie in [{low}, {high}]")
        if self.batch_size % self.num_minibatches:
            raise ValueError(f"--num-minibatches {self.num_minibatches}: must divide the batch of {self.batch_size}")
        if self.total_timesteps < self.batch_size:
            raise ValueError(f"--total-timesteps {self.total_timesteps}: less than one batch of {self.batch_size}")
        if self.resume and not Path(self.resume, "checkpoint.msgpack").exists():
            raise ValueError(f"--resume {self.resume}: no checkpoint.msgpack in this folder")
        module, _, name = self.env_id.rpartition(":")
        try:
            importlib.import_module(module or "gymnasium")  # may register environments
            if self.env_backend == "jax" or name not in gym.registry:
                make_jax_env(self) or gym.spec(name)
        except (ImportError, ValueError, gym.error.Error) as error:
            raise ValueError(f"--env-id {self.env_id}: {error}") from error


# ==== Environment ====
def to_env(space, action):
    """Actions for the environment: Discrete ones count from 0, Box ones are scaled from [-1, 1] and clipped."""
    if isinstance(space, gym.spaces.Discrete):
        return action + int(space.start)
    both = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = np.where(both, space.low, -1), np.where(both, space.high, 1)
    return ((high + low) / 2 + (high - low) / 2 * action).clip(space.low, space.high)


def make_env(args: Args, video_dir=None):
    """An environment of Gymnasium; observations are flat, [D]."""
    env = gym.make(args.env_id, args.max_episode_steps, **({"render_mode": "rgb_array"} if video_dir else {}))
    if video_dir:
        env.reset()
        env.render()  # if it cannot be filmed, fail before training
        env = gym.wrappers.RecordVideo(env, video_dir)
    return gym.wrappers.RecordEpisodeStatistics(gym.wrappers.FlattenObservation(env))


def make_envs(args: Args, num_envs, video_dir=None):
    """S x N environments, of which the first is filmed."""
    make_vector = partial(gym.vector.AsyncVectorEnv, context="spawn") if args.async_envs else gym.vector.SyncVectorEnv
    env_fns = [partial(make_env, args, video_dir)] + [partial(make_env, args)] * (args.num_seeds * num_envs - 1)
    return make_vector(env_fns, copy=False, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


class GymnaxEnv:
    """An environment of gymnax. Any class with these members will do: pure, of one environment, without autoreset."""

    def __init__(self, name):
        import gymnax

        self.env, self.params = gymnax.make(name)
        self.action_space = gymnax.environments.spaces.gymnax_space_to_gym_space(self.env.action_space(self.params))
        self.max_steps = int(self.params.max_steps_in_episode)  # --max-episode-steps sets it

    def reset(self, key):  # -> state, obs [D]
        obs, state = self.env.reset_env(key, self.params)
        return state, obs.ravel()

    def step(self, key, state, action):  # -> state, obs [D], reward, terminated, truncated
        obs, state, reward, terminated, _ = self.env.step_env(key, state, action, self.params)
        return state, obs.ravel(), reward, terminated, state.time >= self.max_steps


def make_jax_env(args: Args):
    """The environment in JAX, from make_jax_env(Id) of the module or from gymnax; None if Gymnasium is to step it."""
    with suppress(RuntimeError):  # refused once JAX runs; importing gymnax starts it
        jax.config.update("jax_num_cpu_devices", min(args.num_seeds, os.cpu_count()))  # cores; idle ones cost time
        jax.config.update("jax_platforms", None if args.cuda else "cpu")
    if args.env_backend == "gymnasium":
        return None
    import gymnax

    module, _, name = args.env_id.rpartition(":")
    make = getattr(importlib.import_module(module or "gymnax"), "make_jax_env", GymnaxEnv)
    if make is GymnaxEnv and name not in gymnax.registered_envs and args.env_backend == "auto":
        return None
    env = make(name)
    env.max_steps = args.max_episode_steps or env.max_steps
    return env


# ==== Networks ====
def mlp(sizes, activation, gain):
    """Linear layers, zero biases, orthogonal weights of gain sqrt 2, in the last layer `gain`."""
    layers = []
    for size in sizes[:-1]:
        layers += [nn.Dense(size, kernel_init=nn.initializers.orthogonal(math.sqrt(2))), getattr(nn, activation)]
    return nn.Sequential([*layers, nn.Dense(sizes[-1], kernel_init=nn.initializers.orthogonal(gain))])


class RunningMeanStd(NamedTuple):
    """Mean and variance of the rows seen, merged a batch at a time (Chan et al. 1979)."""

    mean: Array
    var: Array
    count: Array

    def normalize(self, x):
        return ((x - self.mean) / jnp.sqrt(self.var + 1e-8)).clip(-10, 10)

    def update(self, x):
        delta, w = x.mean(0) - self.mean, len(x) / (self.count + len(x))  # w: the share of the new rows
        var = (1 - w) * self.var + w * x.var(0) + w * (1 - w) * delta**2
        return RunningMeanStd(self.mean + w * delta, var, self.count + len(x))


class Agent(nn.Module):
    """Policy, a softmax or a diagonal Gaussian of state-independent deviations (0.6 at first), and value network."""

    space: gym.Space
    args: Args

    def setup(self):
        self.discrete = isinstance(self.space, gym.spaces.Discrete)
        if not self.discrete and not (isinstance(self.space, gym.spaces.Box) and len(self.space.shape) == 1):
            raise ValueError(f"--env-id {self.args.env_id}: actions {self.space}, not Discrete or a Box of one axis")
        action_size = int(self.space.n) if self.discrete else self.space.shape[0]
        self.actor = mlp((*self.args.hidden_sizes, action_size), self.args.activation, gain=0.01)
        self.critic = mlp((*self.args.hidden_sizes, 1), self.args.activation, gain=1.0)
        self.log_std = None if self.discrete else self.param("log_std", nn.initializers.constant(-0.5), (action_size,))

    def value(self, obs):
        """V(s): [..., D] -> [...]."""
        return self.critic(obs).squeeze(-1)

    def act(self, obs, key, greedy=False):
        """A sampled action, or the most likely one: [..., D] -> [...] (Discrete) or [..., A] (Box)."""
        out = self.actor(obs)
        if self.discrete:
            return out.argmax(-1) if greedy else jax.random.categorical(key, out)
        return out if greedy else out + jnp.exp(self.log_std) * jax.random.normal(key, out.shape)

    def log_prob(self, obs, action):
        """log pi(a|s) and the entropy of pi(.|s), in nats: [..., D], [...] or [..., A] -> [...], [...]."""
        out = self.actor(obs)
        if self.discrete:
            logp = jax.nn.log_softmax(out)
            taken = jnp.take_along_axis(logp, action[..., None].astype(int), -1)
            return taken.squeeze(-1), -(jnp.exp(logp) * logp).sum(-1)
        z = (action - out) / jnp.exp(self.log_std)
        logp = (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        return logp, jnp.broadcast_to((self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(), logp.shape)


# ==== Data ====
class Batch(NamedTuple):
    """What one rollout saw."""

    obs: Array  # [T, N, D]
    action: Array  # [T, N] or [T, N, A], as sampled, before `to_env`
    reward: Array  # [T, N]
    next_obs: Array  # [T, N, D] the true successor: at an episode's end its last observation, not the reset's
    terminated: Array  # [T, N] the task itself ended
    done: Array  # [T, N] terminated, or truncated by a time limit
    episode: Array  # [T, N, 2] undiscounted return and length of the episode that ended here, if one did


class State(NamedTuple):
    """All that training changes, of one agent; outside of vmap every array has an axis S in front."""

    params: dict
    opt_state: optax.OptState
    obs_stats: RunningMeanStd
    return_stats: RunningMeanStd
    running_return: Array  # [N] the carry of `running_returns`
    key: Array
    step: Array  # environment steps so far
    env_state: Any  # of the N environments, if they are written in JAX
    obs: Array  # [N, D] current observations
    episode: Array  # [N, 2] undiscounted return and length of the episodes so far


# ==== Math ====
def gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimates: all [T, N] -> [T, N]. `next_value` is V of the true successor."""
    # delta_t = R_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)    [1, sec. 3]
    delta = reward + gamma * (1 - terminated) * next_value - value

    def step_back(adv, now):
        delta_t, done_t = now
        # A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}    [1, eq. 16, as a recursion]
        adv = delta_t + gamma * gae_lambda * (1 - done_t) * adv
        return adv, adv

    return jax.lax.scan(step_back, jnp.zeros_like(delta[0]), (delta, done), reverse=True, unroll=8)[1]


def running_returns(reward, done, carry, gamma):
    """Sum of each episode's rewards up to each step, older ones discounted, [T, N], and the next `carry`, [N]."""

    def step_on(carry, now):
        reward_t, done_t = now
        # C_t = R_t + gamma (1 - done_{t-1}) C_{t-1}: the last reward of an episode counts in it, not in the next one
        ret = reward_t + gamma * carry
        return (1 - done_t) * ret, ret

    carry, ret = jax.lax.scan(step_on, carry, (reward, done), unroll=8)
    return ret, carry


def policy_loss(logp, logp_old, adv, clip_coef):
    """The clipped surrogate, negated: [...] -> scalar. Where the ratio moved the wrong way, the min undoes the clip."""
    ratio = jnp.exp(logp - logp_old)
    # E_t[ min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) ]    [2, eq. 7]
    return -jnp.minimum(ratio * adv, ratio.clip(1 - clip_coef, 1 + clip_coef) * adv).mean()


def value_loss(value, value_old, ret, clip_coef):
    """Half the mean squared error: [...] -> scalar."""
    # (V(s_t) - V_t^targ)^2    [2, eq. 9]
    error = (value - ret) ** 2
    if clip_coef is not None:  # the authors' code, not the paper: the larger error of the value and the clipped value
        clipped = value_old + (value - value_old).clip(-clip_coef, clip_coef)
        error = jnp.maximum(error, (clipped - ret) ** 2)
    return 0.5 * error.mean()


def approx_kl(logp, logp_old):
    """KL(pi_old || pi) from samples of pi_old: [...] -> scalar (Schulman 2020, joschu.net/blog/kl-approx.html, k3)."""
    # E[(r - 1) - log r]; expm1 keeps r - 1 exact for r close to 1
    return (jnp.expm1(logp - logp_old) - (logp - logp_old)).mean()


# ==== Rollout ====
def act(state: State, obs, key, agent: Agent, args: Args, greedy=False):
    """Actions of the agent in `state`, see Agent.act."""
    obs = state.obs_stats.normalize(obs) if args.norm_obs else obs
    return agent.bind({"params": state.params}).act(obs, key, greedy)


def rollout(state: State, policy, env, num_steps):
    """Play T steps in every environment. Values and probabilities are computed later, in one pass."""

    def play(state, _):
        key, act_key, step_key, reset_key = jax.random.split(state.key, 4)
        action = policy(state, state.obs, act_key)
        step_keys, env_action = jax.random.split(step_key, len(action)), to_env(env.action_space, action)
        env_state, next_obs, reward, terminated, truncated = jax.vmap(env.step)(step_keys, state.env_state, env_action)
        done, episode = terminated | truncated, state.episode + jnp.stack([reward, jnp.ones_like(reward)], -1)
        row = Batch(state.obs, action, reward, next_obs, terminated, done, episode)
        # where an episode ended, the next one begins; `reset` runs at every step and should be cheap
        fresh = *jax.vmap(env.reset)(jax.random.split(reset_key, len(done))), jnp.zeros_like(episode)
        env_state, obs, episode = jax.vmap(optax.tree.where)(done, fresh, (env_state, next_obs, episode))
        return state._replace(key=key, env_state=env_state, obs=obs, episode=episode), row

    return jax.lax.scan(play, state, length=num_steps)


def rollout_on_host(state: State, policy, env, num_steps):
    """The same by Python, in environments of Gymnasium; `policy` is compiled. Arrays have an axis S in front."""
    keys = np.asarray(jax.vmap(partial(jax.random.split, num=num_steps + 1), out_axes=1)(state.key))  # [T + 1, S, 2]
    player = state._replace(opt_state=None, obs=None)  # passing arguments takes time
    rows, shape, obs = [], state.obs.shape, np.concatenate(state.obs)  # [S x N, D]
    for act_key in keys[1:]:
        action = np.concatenate(np.asarray(policy(player, obs.reshape(shape), act_key)))
        new_obs, reward, terminated, truncated, info = env.step(to_env(env.single_action_space, action))
        next_obs, episode = new_obs.copy(), np.zeros((len(obs), 2))
        if "final_obs" in info:  # where an episode ended, `new_obs` is already the first observation of the next one
            next_obs[info["_final_obs"]] = np.stack(info["final_obs"][info["_final_obs"]])
            episode = np.stack([info["final_info"]["episode"][key] for key in ("r", "l")], -1)
        rows.append(Batch(obs, action, reward, next_obs, terminated, terminated | truncated, episode))
        obs = new_obs.astype(np.float32)
    batch = Batch(*(np.array(np.split(np.stack(column), shape[0], 1), np.float32) for column in zip(*rows)))
    return state._replace(obs=obs.reshape(shape), key=keys[0]), batch


# ==== Update ====
optimizer = optax.scale_by_adam(eps=1e-5)  # `update` clips the gradients and multiplies by the learning rate


def loss_fn(params, minibatch, agent: Agent, args: Args):
    """Loss of a minibatch, and what to log."""
    obs, action, adv, ret, logp_old, value_old = minibatch
    agent = agent.bind({"params": params})
    logp, entropy = agent.log_prob(obs, action)
    if args.norm_adv:
        adv = (adv - adv.mean()) / (adv.std() + 1e-8)
    pg_loss = policy_loss(logp, logp_old, adv, args.clip_coef)
    v_loss = value_loss(agent.value(obs), value_old, ret, args.clip_coef if args.clip_vloss else None)
    loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy.mean()
    metrics = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy.mean()}
    metrics["approx_kl"] = approx_kl(logp, logp_old)
    metrics["clipfrac"] = (jnp.abs(jnp.expm1(logp - logp_old)) > args.clip_coef).mean()
    return loss, metrics


def shuffle(key, size):
    """A permutation of range(size), by sorting single numbers: on a CPU far faster than jax.random.permutation."""
    numbers = jax.random.bits(key, (size,)) // (2 * size) * size + jnp.arange(size, dtype=jnp.uint32)
    return jnp.sort(numbers) % size


def update(state: State, batch: Batch, agent: Agent, args: Args):
    """Epochs of minibatch gradient descent on a batch. Returns also means of what to log."""
    obs, action, reward, next_obs, terminated, done, _ = batch
    if args.norm_obs:
        obs, next_obs = state.obs_stats.normalize(obs), state.obs_stats.normalize(next_obs)
    if args.norm_reward:
        running, carry = running_returns(reward, done, state.running_return, args.gamma)
        state = state._replace(running_return=carry, return_stats=state.return_stats.update(running.reshape(-1, 1)))
        reward = (reward / jnp.sqrt(state.return_stats.var + 1e-8)).clip(-10, 10)
    logp, _ = agent.bind({"params": state.params}).log_prob(obs, action)
    lr = args.learning_rate * (1 - state.step / args.total_timesteps if args.anneal_lr else 1)

    def descend(learner, minibatch):
        params, opt_state = learner
        grads, metrics = jax.grad(loss_fn, has_aux=True)(params, minibatch, agent, args)
        norm = optax.tree.norm(grads)
        grads = optax.tree.scale(jnp.minimum(1, args.max_grad_norm / norm), grads)
        direction, opt_state = optimizer.update(grads, opt_state)
        return (optax.tree.add_scale(params, -lr, direction), opt_state), metrics | {"grad_norm": norm}

    def epoch(learner, key):
        critic = agent.bind({"params": learner[0] if args.recompute_adv else state.params})
        value, next_value = critic.value(obs), critic.value(next_obs)
        adv = gae(reward, value, next_value, terminated, done, args.gamma, args.gae_lambda)
        ret = adv + value  # V_t^targ, the lambda-return
        data = [x.reshape(-1, *x.shape[2:]) for x in (obs, action, adv, ret, logp, value)]
        rows = shuffle(key, args.batch_size).reshape(args.num_minibatches, -1)
        learner, metrics = jax.lax.scan(descend, learner, [x[rows] for x in data])
        metrics["explained_variance"] = 1 - (ret - value).var() / (ret.var() + 1e-8)
        return learner, (learner, jax.tree.map(jnp.mean, metrics))

    keys = jax.random.split(state.key, args.update_epochs + 1)
    _, (learners, metrics) = jax.lax.scan(epoch, (state.params, state.opt_state), keys[1:])
    last = jnp.append(metrics["approx_kl"][:-1] > (args.target_kl or math.inf), True).argmax()  # the epoch to keep
    params, opt_state = jax.tree.map(lambda x: x[last], learners)
    if args.norm_obs:  # only now: the loss must see what the policy saw
        state = state._replace(obs_stats=state.obs_stats.update(batch.obs.reshape(-1, batch.obs.shape[-1])))
    metrics = jax.tree.map(lambda x: x.mean(where=jnp.arange(len(x)) <= last), metrics)
    return state._replace(params=params, opt_state=opt_state, key=keys[0], step=state.step + args.batch_size), metrics


# ==== Training ====
def start(keys, env, num_envs):
    """New episodes in N environments of each agent, by the agents' keys: env_state and obs, [S, N, ...]."""
    keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 2**31), num_envs))(keys)  # used nowhere else
    if isinstance(env, gym.vector.VectorEnv):
        obs, _ = env.reset(seed=keys[..., 0].ravel().tolist())
        return None, obs.reshape(*keys.shape[:2], -1).astype(np.float32)
    return jax.jit(jax.vmap(jax.vmap(env.reset)))(keys)


def init_state(key, env_state, obs, agent: Agent) -> State:
    """An agent before its first step."""
    key, params_key = jax.random.split(key)
    params = agent.init(params_key, obs, method=lambda agent, obs: (agent.actor(obs), agent.critic(obs)))["params"]
    stats = [RunningMeanStd(jnp.zeros(n), jnp.ones(n), jnp.zeros(())) for n in (obs.shape[1], 1)]
    running_return, episode = jnp.zeros(len(obs)), jnp.zeros((len(obs), 2))
    return State(params, optimizer.init(params), *stats, running_return, key, jnp.int32(0), env_state, obs, episode)


def evaluate(state: State, agent: Agent, env, args: Args):
    """Undiscounted returns of the first episode in each of --eval-episodes fresh environments: [S, eval_episodes]."""
    policy = partial(act, agent=agent, args=args, greedy=not args.eval_sample)
    env_state, obs = start(state.key, env, args.eval_episodes)
    state = state._replace(env_state=env_state, obs=obs, episode=jnp.zeros((*obs.shape[:2], 2)))
    if isinstance(env, gym.vector.VectorEnv):
        time_limit = env.get_attr("spec")[0].max_episode_steps or 10_000
        _, batch = rollout_on_host(state, jax.jit(jax.vmap(policy)), env, time_limit)
        env.close()
    else:
        _, batch = jax.jit(jax.vmap(lambda state: rollout(state, policy, env, env.max_steps)))(state)
    first_episode = np.cumsum(batch.done, 1) - batch.done == 0  # [S, T, eval_episodes]
    return np.asarray((batch.reward * first_episode).sum(1))


class Result(NamedTuple):
    """What `train` returns. With --num-seeds above 1, arrays have an axis S in front, or are lists of S."""

    agent: dict  # the parameters
    episode_returns: np.ndarray  # [episodes] undiscounted, in the order in which they finished
    episode_steps: np.ndarray  # [episodes] the environment step at which each did
    eval_returns: np.ndarray  # [eval_episodes]
    run_dir: Path
    state: State  # always with an axis S


def finished(step, returns, args: Args):
    """Whether all steps are done, or each agent's full window of returns averages --target-return."""
    full = args.target_return is not None and all(len(x) >= args.return_window for x in returns)
    solved = full and min(x[-args.return_window :].mean() for x in returns) >= args.target_return
    return step + args.batch_size > args.total_timesteps or solved


def train(args: Args) -> Result:
    """Train and evaluate. Raises ValueError for unsuitable spaces, FloatingPointError for losses not finite."""
    env = make_jax_env(args) or make_envs(args, args.num_envs)
    on_host = isinstance(env, gym.vector.VectorEnv)
    devices = jax.devices()[: math.gcd(args.num_seeds, jax.device_count())]
    if args.cuda and devices[0].platform == "cpu":
        print("warning: --cuda: no GPU found, training on the CPU")
    agent = Agent(env.single_action_space if on_host else env.action_space, args)
    keys = jax.vmap(jax.random.PRNGKey)(np.arange(args.seed, args.seed + args.num_seeds))
    # one by one: a batch of QR decompositions can deadlock a CPU
    state = jax.lax.map(lambda x: init_state(*x, agent), (keys, *start(keys, env, args.num_envs)))
    leaves, tree = jax.tree.flatten(jax.device_get(state))  # NumPy: weak types would compile every program twice
    returns, steps = [np.zeros(0)] * args.num_seeds, [np.zeros(0, int)] * args.num_seeds
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.3f}".replace("/", "-").replace(":", "-")
    run_dir = Path(args.resume or f"runs/{name}")
    if args.resume:
        saved = serialization.msgpack_restore((run_dir / "checkpoint.msgpack").read_bytes())  # runs no code
        if [x.shape for x in saved["leaves"]] != [x.shape for x in leaves]:
            raise ValueError(f"--resume {run_dir}: other networks or environments")
        leaves, returns, steps = saved["leaves"], saved["returns"], saved["steps"]
    by_seed = jax.NamedSharding(jax.sharding.Mesh(devices, "seeds"), jax.P("seeds"))  # each device has some agents
    state = jax.device_put(jax.tree.unflatten(tree, leaves), by_seed)
    step, video_dir = int(state.step[0]), run_dir / "videos" if args.capture_video else None
    eval_env = make_envs(args, args.eval_episodes, video_dir) if on_host or video_dir else env  # gymnax makes no videos
    play, policy, learn = rollout, partial(act, agent=agent, args=args), partial(update, agent=agent, args=args)
    if on_host:  # its episodes are not in a checkpoint
        play, policy, learn = rollout_on_host, jax.jit(jax.vmap(policy)), jax.jit(jax.vmap(learn))
        state = state._replace(obs=start(state.key, env, args.num_envs)[1], running_return=0 * state.running_return)

    def iterate(state, _=None):
        state, batch = play(state, policy, env, args.num_steps)
        state, metrics = learn(state, batch)
        return state, (batch.done, batch.episode, metrics)

    # iterations per call, which costs 1 ms of Python: a third of a small iteration
    length = 1 if on_host else max(k for k in range(1, 17) if (args.total_timesteps - step) // args.batch_size % k == 0)
    run = iterate if on_host else jax.jit(jax.vmap(partial(jax.lax.scan, iterate, length=length)))
    writer = SummaryWriter(str(run_dir), purge_step=step + 1)
    if not finished(step, returns, args):
        (run_dir / "args.json").write_text(json.dumps(vars(args) | {"resume": None}, indent=4))
    bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps")
    iteration, first_step, start_time = 0, step, time.perf_counter()
    while not finished(step, returns, args):
        lr = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
        state, outcome = run(state)
        done, episode, metrics = jax.device_get(outcome)
        iteration += length
        if not all(np.isfinite(x).all() for x in metrics.values()):
            raise FloatingPointError(f"iteration {iteration}: {metrics}; last checkpoint in {run_dir}")

        for i in range(args.num_seeds):
            ended = np.flatnonzero(done[i])
            returns[i] = np.concatenate([returns[i], episode[i].reshape(-1, 2)[ended, 0]])
            steps[i] = np.concatenate([steps[i], step + (ended // args.num_envs + 1) * args.num_envs])
        step += length * args.batch_size
        writer.add_scalar("charts/learning_rate", lr, step)
        writer.add_scalar("charts/SPS", args.num_seeds * (step - first_step) / (time.perf_counter() - start_time), step)
        for name, x in metrics.items():
            writer.add_scalar(f"losses/{name}", x.mean(), step)
        if done.any():
            mean_return = np.mean([x[-args.return_window :].mean() for x in returns if len(x)])
            writer.add_scalar("charts/episodic_return", mean_return, step)
            writer.add_scalar("charts/episodic_length", episode[done > 0, 1].mean(), step)
            bar.set_postfix_str(f"return {mean_return:.1f}", refresh=False)
        bar.update(length * args.batch_size)
        if finished(step, returns, args) or (args.save_every and iteration % args.save_every < length):
            saved = {"leaves": jax.device_get(jax.tree.leaves(state)), "returns": returns, "steps": steps}
            (run_dir / "checkpoint.tmp").write_bytes(serialization.msgpack_serialize(saved))
            (run_dir / "checkpoint.tmp").replace(run_dir / "checkpoint.msgpack")  # whole or not at all
    bar.close()
    if on_host:
        env.close()
    eval_returns = np.zeros((args.num_seeds, 0))
    if args.eval_episodes:
        eval_returns = evaluate(state, agent, eval_env, args)
        writer.add_scalar("eval/episodic_return", eval_returns.mean(), step)
        for seed, x in enumerate(eval_returns, args.seed):
            print(f"seed {seed}: evaluation: {x.mean():.2f} ± {x.std():.2f} over {args.eval_episodes} episodes")
    writer.close()
    print(run_dir)
    agents = slice(None) if args.num_seeds > 1 else 0
    params = jax.tree.map(lambda x: x[agents], state.params)
    return Result(params, returns[agents], steps[agents], eval_returns[agents], run_dir, state)


def saved_args(run_dir) -> Args:
    """The flags that resume a run: train(saved_args(run_dir))."""
    flags = json.loads(Path(run_dir, "args.json").read_text())
    return Args(**flags | {"hidden_sizes": tuple(flags["hidden_sizes"]), "resume": run_dir})


if __name__ == "__main__":
    args = tyro.cli(Args)
    train(tyro.cli(Args, default=saved_args(args.resume)) if args.resume else args)
