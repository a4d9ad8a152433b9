# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "flax>=0.11,<0.13", "gymnasium>=1.1,<1.4", "gymnax>=1.0.1,<1.1", "jax>=0.8,<0.11", "numpy>=1.26,<3",
#     "optax>=0.2.6,<0.3", "six", "tensorboardX>=2.6,<3", "tqdm", "tyro>=0.9,<2",
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

Functions are of one agent, of which vmap makes S = num_seeds, unless they say that arrays have an axis S in front.
Shapes: T = time limit of an episode, N = num_envs; D and A are the sizes of an observation and a Box action.

Run: python reinforce_jax.py --env-id CartPole-v1. Diff: vpg_advantage_jax.py (a baseline), reinforce.py (in PyTorch).
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
from typing import Literal, NamedTuple

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
    total_timesteps: int = 300_000  # environment steps in all
    cuda: bool = False  # use the GPU; with few environments it is slower
    async_envs: bool = False  # a process for each environment
    capture_video: bool = False  # record the evaluation to <run folder>/videos
    save_every: int = 50  # iterations between checkpoints; 0: only at the end
    resume: Path | None = None  # run folder to continue, or if finished evaluate
    eval_episodes: int = 10  # episodes of the final evaluation
    eval_sample: bool = False  # sample the actions of the evaluation
    return_window: int = 100  # episodes in the mean return
    target_return: float | None = None  # stop when the mean of a full window reaches this
    learning_rate: float = 3e-3  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    num_envs: int = 8  # parallel environments, each plays an episode per update (N)
    max_episode_steps: int | None = None  # time limit, in place of the environment's own
    gamma: float = 0.99  # discount factor
    temperature: float = 1.0  # of the softmax over Discrete actions, higher explores more
    norm_return: bool = True  # standardise the returns of each update
    ent_coef: float = 0.0  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # of the gradient; longer ones are scaled down
    hidden_sizes: tuple[int, ...] = (64, 64)  # widths of the hidden layers
    activation: Literal["tanh", "relu"] = "tanh"  # of the hidden layers

    def __post_init__(self):
        """Raise ValueError for what cannot work; tyro shows it without a traceback."""
        for name, value in vars(self).items():
            positive = name in ("num_envs", "num_seeds", "total_timesteps", "return_window", "max_episode_steps")
            low, high = int(positive), 1 if name == "gamma" else math.inf
            if isinstance(value, int | float) and name != "target_return" and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must lie in [{low}, {high}]")
        if self.resume and not Path(self.resume, "checkpoint.msgpack").exists():
            raise ValueError(f"--resume {self.resume}: no checkpoint.msgpack in this folder")
        module, _, name = self.env_id.rpartition(":")
        try:
            importlib.import_module(module or "gymnasium")  # may register environments
            if self.env_backend == "jax" or name not in gym.registry:
                time_limit = make_jax_env(self) or gym.spec(name).max_episode_steps
            else:
                time_limit = gym.spec(name).max_episode_steps
        except (ImportError, ValueError, gym.error.Error) as error:
            raise ValueError(f"--env-id {self.env_id}: {error}") from error
        if not (self.max_episode_steps or time_limit):
            raise ValueError(f"--max-episode-steps None: {self.env_id} has no time limit, and needs one")


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


class Agent(nn.Module):
    """Policy, a softmax or a diagonal Gaussian of state-independent deviations (0.6 at first)."""

    space: gym.Space
    args: Args

    def setup(self):
        self.discrete = isinstance(self.space, gym.spaces.Discrete)
        if not self.discrete and not (isinstance(self.space, gym.spaces.Box) and len(self.space.shape) == 1):
            raise ValueError(f"--env-id {self.args.env_id}: actions {self.space}, not Discrete or a Box of one axis")
        action_size = int(self.space.n) if self.discrete else self.space.shape[0]
        self.actor = mlp((*self.args.hidden_sizes, action_size), self.args.activation, gain=0.01)
        self.log_std = None if self.discrete else self.param("log_std", nn.initializers.constant(-0.5), (action_size,))
        self.temperature = self.args.temperature if self.discrete else 1.0

    def act(self, obs, key, greedy=False):
        """A sampled action, or the most likely one: [..., D] -> [...] (Discrete) or [..., A] (Box)."""
        out = self.actor(obs) / self.temperature
        if self.discrete:
            return out.argmax(-1) if greedy else jax.random.categorical(key, out)
        return out if greedy else out + jnp.exp(self.log_std) * jax.random.normal(key, out.shape)

    def log_prob(self, obs, action):
        """log pi(a|s) and the entropy of pi(.|s), in nats: [..., D], [...] or [..., A] -> [...], [...]."""
        out = self.actor(obs) / self.temperature
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
    done: Array  # [T, N] the episode ended here
    mask: Array  # [T, N] 1 up to that step, inclusive, 0 after it


class State(NamedTuple):
    """All that training changes, of one agent; outside of vmap every array has an axis S in front."""

    params: dict
    opt_state: optax.OptState
    key: Array
    step: Array  # environment steps so far


# ==== Math ====
def discounted_returns(reward, done, gamma):
    """Return from each step to the end of its episode: all [T, N] -> [T, N]."""

    def step_back(ret, now):
        reward_t, done_t = now
        # G_t = R_t + gamma (1 - done_t) G_{t+1}    [2, eq. 3.9, whose R_{t+1} is our R_t]
        ret = reward_t + gamma * (1 - done_t) * ret
        return ret, ret

    return jax.lax.scan(step_back, jnp.zeros_like(reward[0]), (reward, done), reverse=True, unroll=8)[1]


def policy_loss(logp, ret, mask):
    """The policy-gradient loss: all [T, N] -> scalar. Only its gradient means anything."""
    # 1/N sum_n sum_t G_t log pi(a_t|s_t)    [2, eq. 13.8; a mean over steps would be biased]
    return -(logp * ret * mask).sum() / mask.shape[-1]


# ==== Rollout ====
def act(state: State, obs, key, agent: Agent, greedy=False):
    """Actions of the agent in `state`, see Agent.act."""
    return agent.bind({"params": state.params}).act(obs, key, greedy)


def rollout(state: State, policy, env, num_envs):
    """Play one whole episode in every environment. Those that are done play on, masked, up to the time limit."""
    key, reset_key, rollout_key = jax.random.split(state.key, 3)

    def play(now, key):
        env_state, obs, mask = now
        act_key, step_key = jax.random.split(key)
        action = policy(state, obs, act_key)
        step_keys, env_action = jax.random.split(step_key, num_envs), to_env(env.action_space, action)
        env_state, next_obs, reward, terminated, truncated = jax.vmap(env.step)(step_keys, env_state, env_action)
        done = mask & (terminated | truncated)
        return (env_state, next_obs, mask & ~done), Batch(obs, action, reward, done, mask)

    start = *jax.vmap(env.reset)(jax.random.split(reset_key, num_envs)), jnp.ones(num_envs, bool)
    _, batch = jax.lax.scan(play, start, jax.random.split(rollout_key, env.max_steps))
    return state._replace(key=key), batch


def rollout_on_host(state: State, policy, env, num_envs):
    """The same by Python, in environments of Gymnasium; `policy` is compiled. Arrays have an axis S in front."""
    num_steps, shape = env.get_attr("spec")[0].max_episode_steps, (len(state.key), num_envs)
    split = jax.vmap(partial(jax.random.split, num=num_steps + num_envs + 1), out_axes=1)
    key, *keys = np.asarray(split(state.key))  # of [S, 2] each
    obs, _ = env.reset(seed=np.stack(keys[num_steps:], 1)[..., 0].ravel().tolist())
    rows, mask = [], np.ones(len(obs), bool)
    for act_key in keys[:num_steps]:
        obs = obs.astype(np.float32)
        action = np.concatenate(np.asarray(policy(state, obs.reshape(*shape, -1), act_key)))
        new_obs, reward, terminated, truncated, _ = env.step(to_env(env.single_action_space, action))
        done = mask & (terminated | truncated)
        rows.append(Batch(obs, action, reward, done, mask))
        obs, mask = new_obs, mask & ~done
        if not mask.any():
            break
    rows += [Batch(*map(np.zeros_like, rows[0]))] * (num_steps - len(rows))  # one shape, so that one program serves
    batch = Batch(*(np.array(np.split(np.stack(column), shape[0], 1), np.float32) for column in zip(*rows)))
    return state._replace(key=key), batch


# ==== Update ====
optimizer = optax.scale_by_adam(eps=1e-5)  # `update` clips the gradients and multiplies by the learning rate


def loss_fn(params, minibatch, agent: Agent, args: Args):
    """Loss of a batch, and what to log."""
    obs, action, ret, mask = minibatch
    agent = agent.bind({"params": params})
    logp, entropy = agent.log_prob(obs, action)
    pg_loss = policy_loss(logp, ret, mask)
    loss = pg_loss - args.ent_coef * (entropy * mask).sum() / args.num_envs
    return loss, {"policy_loss": pg_loss, "entropy": (entropy * mask).sum() / mask.sum()}


def update(state: State, batch: Batch, agent: Agent, args: Args):
    """One step of gradient descent on one batch. Returns also what to log."""
    obs, action, reward, done, mask = batch
    ret = discounted_returns(reward, done, args.gamma)
    if args.norm_return:
        ret = (ret - ret.mean(where=mask > 0)) / (ret.std(where=mask > 0) + 1e-8)
    lr = args.learning_rate * (jnp.maximum(0, 1 - state.step / args.total_timesteps) if args.anneal_lr else 1)
    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, [obs, action, ret, mask], agent, args)
    norm = optax.tree.norm(grads)
    grads = optax.tree.scale(jnp.minimum(1, args.max_grad_norm / norm), grads)
    direction, opt_state = optimizer.update(grads, state.opt_state)
    params, step = optax.tree.add_scale(state.params, -lr, direction), state.step + mask.sum(dtype=jnp.int32)
    return state._replace(params=params, opt_state=opt_state, step=step), metrics | {"grad_norm": norm}


# ==== Training ====
def init_state(key, obs, agent: Agent) -> State:
    """An agent before its first step."""
    key, params_key = jax.random.split(key)
    params = agent.init(params_key, obs, key, method="act")["params"]
    return State(params, optimizer.init(params), key, jnp.int32(0))


def evaluate(state: State, agent: Agent, env, args: Args):
    """Undiscounted returns of one episode in each of --eval-episodes fresh environments: [S, eval_episodes]."""
    policy = partial(act, agent=agent, greedy=not args.eval_sample)
    state = state._replace(key=jax.vmap(partial(jax.random.fold_in, data=2**31))(state.key))  # not those of training
    if isinstance(env, gym.vector.VectorEnv):
        _, batch = rollout_on_host(state, jax.jit(jax.vmap(policy)), env, args.eval_episodes)
        env.close()
    else:
        _, batch = jax.jit(jax.vmap(lambda state: rollout(state, policy, env, args.eval_episodes)))(state)
    return np.asarray((batch.reward * batch.mask).sum(1))


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
    return step >= args.total_timesteps or solved


def train(args: Args) -> Result:
    """Train and evaluate. Raises ValueError for unsuitable spaces, FloatingPointError for losses not finite."""
    env = make_jax_env(args) or make_envs(args, args.num_envs)
    on_host = isinstance(env, gym.vector.VectorEnv)
    devices = jax.devices()[: math.gcd(args.num_seeds, jax.device_count())]
    if args.cuda and devices[0].platform == "cpu":
        print("warning: --cuda: no GPU found, training on the CPU")
    agent = Agent(env.single_action_space if on_host else env.action_space, args)
    keys = jax.vmap(jax.random.PRNGKey)(np.arange(args.seed, args.seed + args.num_seeds))
    obs = jnp.zeros(env.single_observation_space.shape) if on_host else env.reset(keys[0])[1]
    # one by one: a batch of QR decompositions can deadlock a CPU
    state = jax.lax.map(partial(init_state, obs=obs, agent=agent), keys)
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
    step, video_dir = int(state.step.min()), run_dir / "videos" if args.capture_video else None
    eval_env = make_envs(args, args.eval_episodes, video_dir) if on_host or video_dir else env  # gymnax makes no videos
    play, policy, learn = rollout, partial(act, agent=agent), partial(update, agent=agent, args=args)
    if on_host:  # its episodes are not in a checkpoint
        play, policy, learn = rollout_on_host, jax.jit(jax.vmap(policy)), jax.jit(jax.vmap(learn))

    def iterate(state):
        state, batch = play(state, policy, env, args.num_envs)
        state, metrics = learn(state, batch)
        return state, (batch.reward, batch.done, batch.mask, metrics)

    run = iterate if on_host else jax.jit(jax.vmap(iterate))
    writer = SummaryWriter(str(run_dir), purge_step=step + 1)
    if not finished(step, returns, args):
        (run_dir / "args.json").write_text(json.dumps(vars(args) | {"resume": None}, indent=4))
    bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps")
    iteration, now, first_step, start_time = 0, np.asarray(state.step), step, time.perf_counter()
    while not finished(step, returns, args):
        lr = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
        state, outcome = run(state)
        reward, done, mask, metrics = jax.device_get(outcome)
        iteration += 1
        if not all(np.isfinite(x).all() for x in metrics.values()):
            raise FloatingPointError(f"iteration {iteration}: {metrics}; last checkpoint in {run_dir}")

        for i in range(args.num_seeds):
            t, n = np.nonzero(done[i])
            returns[i] = np.concatenate([returns[i], (reward[i] * mask[i]).sum(0)[n]])
            steps[i] = np.concatenate([steps[i], now[i] + mask[i].sum(1).cumsum().astype(int)[t]])
        now = np.asarray(state.step)
        bar.update(int(now.min()) - step)
        step = int(now.min())
        writer.add_scalar("charts/learning_rate", lr, step)
        writer.add_scalar("charts/SPS", args.num_seeds * (step - first_step) / (time.perf_counter() - start_time), step)
        for name, x in metrics.items():
            writer.add_scalar(f"losses/{name}", x.mean(), step)
        mean_return = np.mean([x[-args.return_window :].mean() for x in returns])
        writer.add_scalar("charts/episodic_return", mean_return, step)
        writer.add_scalar("charts/episodic_length", mask.sum(1).mean(), step)
        bar.set_postfix_str(f"return {mean_return:.1f}", refresh=False)
        if finished(step, returns, args) or (args.save_every and iteration % args.save_every == 0):
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
