# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium>=1.1,<1.4", "numpy>=1.26,<3", "tensorboard>=2.18,<3",
#     "torch>=2.9,<2.14", "tqdm", "tyro>=0.9,<2",
# ]
# ///
"""Vanilla policy gradient (VPG) with a learned baseline and generalised advantages, in PyTorch.

REINFORCE weights grad log pi of each action by the return that followed. Subtracting a baseline, what the state was
worth anyway, leaves the gradient unbiased and lowers its variance; a value network V learns it. With lambda < 1, V also
stands in for rewards further ahead, which lowers the variance again, at some bias:

    grad J ~ E_t[ A_t grad log pi(a_t|s_t) ]    [1, eq. 1; 2, eq. 1]

with a squared-error value loss and an entropy bonus. A_t is the generalised advantage [1], see `gae`. A time limit is
no end: what it cuts off is worth V(s'_t). Only `terminated` means that nothing follows; `done` ends the sum in `gae`.

[1] Schulman et al. 2016, Generalized Advantage Estimation, arXiv:1506.02438
[2] Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347

Shapes: T = num_steps, N = num_envs; D and A are the sizes of an observation and a Box action.

Run: python vpg_advantage.py --env-id CartPole-v1. Diff: reinforce.py, ppo.py (what a baseline, what clipping adds).
"""

import importlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    """Train an agent; log, flags and checkpoint go to a new folder under runs/."""

    exp_name: str = Path(__file__).stem  # for the name of the run folder
    env_id: str = "CartPole-v1"  # any Gymnasium id; module:Id imports the module first
    seed: int = 1  # fixes every random number
    total_timesteps: int = 200_000  # environment steps in all
    cuda: bool = False  # use the GPU; with few environments it is slower
    compile: bool = False  # compile the loss: slow to start, then faster
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
    num_envs: int = 8  # parallel environments (N)
    num_steps: int = 64  # steps of each environment in a batch (T)
    max_episode_steps: int | None = None  # time limit, in place of the environment's own
    gamma: float = 0.98  # discount factor
    gae_lambda: float = 0.99  # 0: the TD error; 1: return - value
    num_minibatches: int = 1  # minibatches per epoch
    update_epochs: int = 1  # passes over each batch
    norm_adv: bool = False  # standardise the advantages of each minibatch
    norm_obs: bool = False  # standardise observations
    norm_reward: bool = True  # divide rewards by the deviation of discounted returns
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
        if self.resume and not Path(self.resume, "checkpoint.pt").exists():
            raise ValueError(f"--resume {self.resume}: no checkpoint.pt in this folder")
        module, _, name = self.env_id.rpartition(":")
        try:
            importlib.import_module(module or "gymnasium")  # may register environments
            gym.spec(name)
        except (ImportError, gym.error.Error) as error:
            raise ValueError(f"--env-id {self.env_id}: {error}") from error


# ==== Environment ====
def make_env(args: Args, video_dir=None):
    """Observations are flat, [D]. Discrete actions count from 0; Box actions are scaled from [-1, 1] and clipped."""
    env = gym.make(args.env_id, args.max_episode_steps, **({"render_mode": "rgb_array"} if video_dir else {}))
    if video_dir:
        env.reset()
        env.render()  # if it cannot be filmed, fail before training
        env = gym.wrappers.RecordVideo(env, video_dir, episode_trigger=lambda _: True)
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.FlattenObservation(env))
    space = env.action_space
    if isinstance(space, gym.spaces.Discrete):
        return gym.wrappers.TransformAction(env, lambda action: action + space.start, space)
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"--env-id {args.env_id}: actions {space}, not Discrete or a Box of one axis")
    both = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = np.where(both, -1, space.low), np.where(both, 1, space.high)
    return gym.wrappers.ClipAction(gym.wrappers.RescaleAction(env, low, high))


# ==== Networks ====
def mlp(sizes, activation, gain):
    """Linear layers, zero biases, orthogonal weights of gain sqrt 2, in the last layer `gain`."""
    layers = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(n_in, n_out), nn.Tanh() if activation == "tanh" else nn.ReLU()]
        nn.init.orthogonal_(layers[-2].weight, math.sqrt(2))
        nn.init.zeros_(layers[-2].bias)
    nn.init.orthogonal_(layers[-2].weight, gain)
    return nn.Sequential(*layers[:-1])


class RunningMeanStd(nn.Module):
    """Mean and variance of the rows seen, merged a batch at a time (Chan et al. 1979)."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    def normalize(self, x):
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clip(-10, 10)

    def update(self, x):
        delta, w = x.mean(0) - self.mean, len(x) / (self.count + len(x))  # w: the share of the new rows
        self.mean += w * delta
        self.var.copy_((1 - w) * self.var + w * x.var(0, correction=0) + w * (1 - w) * delta**2)
        self.count += len(x)


class Agent(nn.Module):
    """Policy, a softmax or a diagonal Gaussian of state-independent deviations (0.6 at first), and value network."""

    def __init__(self, envs, args: Args):
        super().__init__()
        space, obs_size = envs.single_action_space, envs.single_observation_space.shape[0]
        self.discrete = isinstance(space, gym.spaces.Discrete)
        action_size = int(space.n) if self.discrete else space.shape[0]
        self.actor = mlp((obs_size, *args.hidden_sizes, action_size), args.activation, gain=0.01)
        self.critic = mlp((obs_size, *args.hidden_sizes, 1), args.activation, gain=1.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.full((action_size,), -0.5))
        self.norm_obs = args.norm_obs
        self.obs_stats = RunningMeanStd(obs_size)
        self.return_stats = RunningMeanStd(1)
        self.running_return = 0.0  # the carry of `running_returns`

    def normalize(self, obs):
        return self.obs_stats.normalize(obs) if self.norm_obs else obs

    def value(self, obs):
        """V(s): [..., D] -> [...]."""
        return self.critic(self.normalize(obs)).squeeze(-1)

    def act(self, obs, greedy=False):
        """A sampled action, or the most likely one: [..., D] -> [...] (Discrete) or [..., A] (Box)."""
        out = self.actor(self.normalize(obs))
        if self.discrete:  # Gumbel-max: logits plus Gumbel noise, -log(exponential), are largest at a softmax sample
            return (out if greedy else out - torch.empty_like(out).exponential_().log()).argmax(-1)
        return out if greedy else out + self.log_std.exp() * torch.randn_like(out)

    def log_prob(self, obs, action):
        """log pi(a|s) and the entropy of pi(.|s), in nats: [..., D], [...] or [..., A] -> [...], [...]."""
        out = self.actor(self.normalize(obs))
        if self.discrete:
            logp = out.log_softmax(-1)
            return logp.gather(-1, action[..., None].long()).squeeze(-1), -(logp.exp() * logp).sum(-1)
        z = (action - out) / self.log_std.exp()
        logp = (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        return logp, (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(logp.shape)


# ==== Data ====
class Batch(NamedTuple):
    """What one rollout saw."""

    obs: np.ndarray  # [T, N, D]
    action: np.ndarray  # [T, N] or [T, N, A], as sampled: the environment clips it
    reward: np.ndarray  # [T, N]
    next_obs: np.ndarray  # [T, N, D] the true successor: at an episode's end its last observation, not the reset's
    terminated: np.ndarray  # [T, N] the task itself ended
    done: np.ndarray  # [T, N] terminated, or truncated by a time limit
    episode: np.ndarray  # [T, N, 2] undiscounted return and length of the episode that ended here, if one did


# ==== Math ====
def gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimates: all [T, N] -> [T, N]. `next_value` is V of the true successor."""
    # delta_t = R_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)    [1, sec. 3]
    delta = reward + gamma * (1 - terminated) * next_value - value
    decay = gamma * gae_lambda * (1 - done)
    adv = [torch.zeros_like(delta[0])]  # a list: indexing a tensor takes as long as the arithmetic
    for delta_t, decay_t in zip(reversed(delta.unbind()), reversed(decay.unbind())):
        # A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}    [1, eq. 16, as a recursion]
        adv.append(delta_t + decay_t * adv[-1])
    return torch.stack(adv[1:][::-1])


def running_returns(reward, done, carry, gamma):
    """Sum of each episode's rewards up to each step, older ones discounted, [T, N], and the next `carry`, [N]."""
    ret = []
    for reward_t, done_t in zip(reward.unbind(), done.unbind()):
        # C_t = R_t + gamma (1 - done_{t-1}) C_{t-1}: the last reward of an episode counts in it, not in the next one
        ret.append(reward_t + gamma * carry)
        carry = (1 - done_t) * ret[-1]
    return torch.stack(ret), carry


def policy_loss(logp, adv):
    """The policy-gradient loss: [...] -> scalar. Only its gradient means anything."""
    # E_t[ A_t log pi(a_t|s_t) ]    [2, eq. 2]
    return -(logp * adv).mean()


def value_loss(value, ret):
    """Half the mean squared error: [...] -> scalar."""
    # (V(s_t) - V_t^targ)^2    [2, eq. 9]
    error = (value - ret) ** 2
    return 0.5 * error.mean()


# ==== Rollout ====
@torch.inference_mode()
def rollout(agent: Agent, envs, obs, args: Args):
    """Play T steps in every environment from `obs`, [N, D]. Returns the batch and the `obs` to go on from. Values and
    probabilities are computed later, in one pass."""
    device, rows = next(agent.parameters()).device, []
    for _ in range(args.num_steps):
        action = agent.act(torch.as_tensor(obs.astype(np.float32), device=device)).cpu().numpy()
        new_obs, reward, terminated, truncated, info = envs.step(action)
        next_obs, episode = new_obs.copy(), np.zeros((args.num_envs, 2))
        if "final_obs" in info:  # where an episode ended, `new_obs` is already the first observation of the next one
            next_obs[info["_final_obs"]] = np.stack(info["final_obs"][info["_final_obs"]])
            episode = np.stack([info["final_info"]["episode"][key] for key in ("r", "l")], -1)
        rows.append(Batch(obs, action, reward, next_obs, terminated, terminated | truncated, episode))
        obs = new_obs
    return Batch(*(np.stack(column).astype(np.float32) for column in zip(*rows))), obs


# ==== Update ====
def loss_fn(agent: Agent, minibatch, args: Args):
    """Loss of a minibatch, and what to log."""
    obs, action, adv, ret = minibatch
    logp, entropy = agent.log_prob(obs, action)
    if args.norm_adv:
        adv = (adv - adv.mean()) / (adv.std(correction=0) + 1e-8)
    pg_loss = policy_loss(logp, adv)
    v_loss = value_loss(agent.value(obs), ret)
    loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy.mean()
    metrics = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy.mean()}
    return loss, {name: x.detach() for name, x in metrics.items()}


def update(agent: Agent, optimizer, loss_fn, batch: Batch, args: Args):
    """Epochs of minibatch gradient descent on a batch. Returns means of what to log."""
    device = next(agent.parameters()).device
    obs, action, reward, next_obs, terminated, done, _ = (torch.as_tensor(x, device=device) for x in batch)
    with torch.no_grad():
        if args.norm_reward:
            running, agent.running_return = running_returns(reward, done, agent.running_return, args.gamma)
            agent.return_stats.update(running.reshape(-1, 1))
            reward = (reward / (agent.return_stats.var + 1e-8).sqrt()).clip(-10, 10)
        value, next_value = agent.value(obs), agent.value(next_obs)
        adv = gae(reward, value, next_value, terminated, done, args.gamma, args.gae_lambda)
        ret = adv + value  # V_t^targ, the lambda-return
    data = [x.flatten(0, 1) for x in (obs, action, adv, ret)]
    history = []
    for _ in range(args.update_epochs):
        explained = 1 - (ret - value).var(correction=0) / (ret.var(correction=0) + 1e-8)
        order = torch.randperm(args.batch_size, device=device)
        for minibatch in zip(*(x[order].chunk(args.num_minibatches) for x in data)):
            loss, metrics = loss_fn(agent, minibatch, args)
            optimizer.zero_grad()
            loss.backward()
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            history.append(metrics | {"explained_variance": explained})
    if args.norm_obs:  # only now: the loss must see what the policy saw
        agent.obs_stats.update(obs.flatten(0, 1))
    return {name: torch.stack([x[name] for x in history]).mean().item() for name in history[0]}


# ==== Training ====
@torch.inference_mode()
def evaluate(agent: Agent, env, args: Args):
    """Undiscounted returns of episodes from seeds that training never uses."""
    device, returns = next(agent.parameters()).device, np.zeros(args.eval_episodes)
    for i, seed in enumerate(np.random.SeedSequence([args.seed, 2**32]).generate_state(args.eval_episodes).tolist()):
        obs, _ = env.reset(seed=seed)
        for _ in range(10_000):  # an episode without a time limit could go on for ever
            action = agent.act(torch.as_tensor(obs.astype(np.float32), device=device), greedy=not args.eval_sample)
            obs, reward, terminated, truncated, _ = env.step(action.cpu().numpy())
            returns[i] += reward
            if terminated or truncated:
                break
    env.close()
    return returns


class Result(NamedTuple):
    """What `train` returns."""

    agent: Agent
    episode_returns: np.ndarray  # [episodes] undiscounted, in the order in which they finished
    episode_steps: np.ndarray  # [episodes] the environment step at which each did
    eval_returns: np.ndarray  # [eval_episodes]
    run_dir: Path


def finished(step, returns, args: Args):
    """Whether all steps are done, or a full window of returns averages --target-return."""
    full = args.target_return is not None and len(returns) >= args.return_window
    solved = full and np.mean(returns[-args.return_window :]) >= args.target_return
    return step + args.batch_size > args.total_timesteps or solved


def train(args: Args) -> Result:
    """Train and evaluate. Raises ValueError for unsuitable spaces, FloatingPointError for losses not finite."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.cuda and device.type == "cpu":
        print("warning: --cuda: no GPU found, training on the CPU")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # small networks gain nothing from more
    torch.manual_seed(args.seed)
    make_vector = gym.vector.AsyncVectorEnv if args.async_envs else gym.vector.SyncVectorEnv
    envs = make_vector([lambda: make_env(args)] * args.num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
    loss = torch.compile(loss_fn) if args.compile else loss_fn
    step, returns, steps = 0, [], []  # returns of episodes, steps at their ends
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.3f}".replace("/", "-").replace(":", "-")
    run_dir = Path(args.resume or f"runs/{name}")
    if args.resume:
        saved = torch.load(run_dir / "checkpoint.pt", map_location=device, weights_only=True)  # runs no code
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        step, returns, steps = saved["step"], saved["returns"], saved["steps"]
    torch_seed, *env_seeds = np.random.SeedSequence([args.seed, step]).generate_state(1 + args.num_envs).tolist()
    torch.manual_seed(torch_seed)
    obs, _ = envs.reset(seed=env_seeds)
    eval_env = make_env(args, run_dir / "videos" if args.capture_video else None)
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    if not finished(step, returns, args):
        (run_dir / "args.json").write_text(json.dumps(vars(args) | {"resume": None}, indent=4))
    bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps")
    iteration, first_step, start_time = 0, step, time.perf_counter()
    while not finished(step, returns, args):
        lr = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = lr
        batch, obs = rollout(agent, envs, obs, args)
        metrics = update(agent, optimizer, loss, batch, args)
        iteration += 1
        if not math.isfinite(sum(metrics.values())):
            raise FloatingPointError(f"iteration {iteration}: {metrics}; last checkpoint in {run_dir}")

        for t, n in np.argwhere(batch.done):
            episode_return, episode_length = batch.episode[t, n].tolist()
            returns.append(episode_return)
            steps.append(step + int(t + 1) * args.num_envs)
            writer.add_scalar("charts/episodic_return", episode_return, steps[-1])
            writer.add_scalar("charts/episodic_length", episode_length, steps[-1])
        step += args.batch_size
        writer.add_scalar("charts/learning_rate", lr, step)
        writer.add_scalar("charts/SPS", (step - first_step) / (time.perf_counter() - start_time), step)
        for name, x in metrics.items():
            writer.add_scalar(f"losses/{name}", x, step)
        bar.set_postfix_str(f"return {np.mean(returns[-args.return_window :] or [math.nan]):.1f}", refresh=False)
        bar.update(args.batch_size)
        if finished(step, returns, args) or (args.save_every and iteration % args.save_every == 0):
            saved = {"step": step, "returns": returns, "steps": steps}
            saved |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved, run_dir / "checkpoint.tmp")
            (run_dir / "checkpoint.tmp").replace(run_dir / "checkpoint.pt")  # whole or not at all
    bar.close()
    envs.close()
    eval_returns = evaluate(agent, eval_env, args)
    if args.eval_episodes:
        print(f"evaluation: {eval_returns.mean():.2f} ± {eval_returns.std():.2f} over {args.eval_episodes} episodes")
        writer.add_scalar("eval/episodic_return", eval_returns.mean(), step)
    writer.close()
    print(run_dir)
    return Result(agent, np.array(returns), np.array(steps, int), eval_returns, run_dir)


def saved_args(run_dir) -> Args:
    """The flags that resume a run: train(saved_args(run_dir))."""
    flags = json.loads(Path(run_dir, "args.json").read_text())
    return Args(**flags | {"hidden_sizes": tuple(flags["hidden_sizes"]), "resume": run_dir})


if __name__ == "__main__":
    args = tyro.cli(Args)
    train(tyro.cli(Args, default=saved_args(args.resume)) if args.resume else args)
