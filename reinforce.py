# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium>=1.1,<1.4", "numpy>=1.26,<3", "tensorboard>=2.18,<3",
#     "torch>=2.9,<2.14", "tqdm", "tyro>=0.9,<2",
# ]
# ///
"""REINFORCE, the Monte Carlo policy gradient, in PyTorch.

A stochastic policy pi(a|s) is improved by playing whole episodes and making each action more likely in proportion to
the return that followed it. By the log-derivative trick the gradient of the expected return J needs no model of the
environment [1; 2, sec. 13.3]:

    grad J = E[ sum_t G_t grad log pi(a_t|s_t) ],   G_t = R_t + gamma (1 - done_t) G_{t+1}

and the mean over N episodes is an unbiased estimate of it. Each environment plays exactly one episode per update: the
N episodes that finish first would mostly be short ones. Two liberties, which everyone takes: a time limit counts as
the end of the episode, and the factor gamma^t of the discounted sum [2, box in sec. 13.3] is left out. A third, unless
--no-norm-return: returns are standardised in each update, which acts as a baseline and scales the step.

No exploration has to be designed, actions may be continuous and the policy changes smoothly. The price is variance:
G_t depends on everything that happened after t. vpg_advantage.py subtracts a learned baseline to lower it.

[1] Williams 1992, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning
[2] Sutton and Barto 2018, Reinforcement Learning: An Introduction, 2nd edition

Shapes: T = steps of the longest episode, N = num_envs; D and A are the sizes of an observation and a Box action.

Run: python reinforce.py --env-id CartPole-v1. Diff: vpg_advantage.py (a baseline), reinforce_jax.py (the same in JAX).
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
    total_timesteps: int = 300_000  # environment steps in all
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
            positive = name in ("num_envs", "total_timesteps", "return_window", "max_episode_steps")
            low, high = int(positive), 1 if name == "gamma" else math.inf
            if isinstance(value, int | float) and name != "target_return" and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must lie in [{low}, {high}]")
        if self.resume and not Path(self.resume, "checkpoint.pt").exists():
            raise ValueError(f"--resume {self.resume}: no checkpoint.pt in this folder")
        module, _, name = self.env_id.rpartition(":")
        try:
            importlib.import_module(module or "gymnasium")  # may register environments
            time_limit = self.max_episode_steps or gym.spec(name).max_episode_steps
        except (ImportError, gym.error.Error) as error:
            raise ValueError(f"--env-id {self.env_id}: {error}") from error
        if not time_limit:
            raise ValueError(f"--max-episode-steps None: {self.env_id} has no time limit, and needs one")


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


class Agent(nn.Module):
    """Policy, a softmax or a diagonal Gaussian of state-independent deviations (0.6 at first)."""

    def __init__(self, envs, args: Args):
        super().__init__()
        space, obs_size = envs.single_action_space, envs.single_observation_space.shape[0]
        self.discrete = isinstance(space, gym.spaces.Discrete)
        action_size = int(space.n) if self.discrete else space.shape[0]
        self.actor = mlp((obs_size, *args.hidden_sizes, action_size), args.activation, gain=0.01)
        self.log_std = None if self.discrete else nn.Parameter(torch.full((action_size,), -0.5))
        self.temperature = args.temperature if self.discrete else 1.0

    def act(self, obs, greedy=False):
        """A sampled action, or the most likely one: [..., D] -> [...] (Discrete) or [..., A] (Box)."""
        out = self.actor(obs) / self.temperature
        if self.discrete:  # Gumbel-max: logits plus Gumbel noise, -log(exponential), are largest at a softmax sample
            return (out if greedy else out - torch.empty_like(out).exponential_().log()).argmax(-1)
        return out if greedy else out + self.log_std.exp() * torch.randn_like(out)

    def log_prob(self, obs, action):
        """log pi(a|s) and the entropy of pi(.|s), in nats: [..., D], [...] or [..., A] -> [...], [...]."""
        out = self.actor(obs) / self.temperature
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
    done: np.ndarray  # [T, N] the episode ended here
    mask: np.ndarray  # [T, N] 1 up to that step, inclusive, 0 after it
    episode: np.ndarray  # [T, N, 2] undiscounted return and length of the episode that ended here, if one did


# ==== Math ====
def discounted_returns(reward, done, gamma):
    """Return from each step to the end of its episode: all [T, N] -> [T, N]."""
    ret = [torch.zeros_like(reward[0])]  # a list: indexing a tensor takes as long as the arithmetic
    for reward_t, done_t in zip(reversed(reward.unbind()), reversed(done.unbind())):
        # G_t = R_t + gamma (1 - done_t) G_{t+1}    [2, eq. 3.9, whose R_{t+1} is our R_t]
        ret.append(reward_t + gamma * (1 - done_t) * ret[-1])
    return torch.stack(ret[1:][::-1])


def policy_loss(logp, ret, mask):
    """The policy-gradient loss: all [T, N] -> scalar. Only its gradient means anything."""
    # 1/N sum_n sum_t G_t log pi(a_t|s_t)    [2, eq. 13.8; a mean over steps would be biased]
    return -(logp * ret * mask).sum() / mask.shape[-1]


# ==== Rollout ====
@torch.inference_mode()
def rollout(agent: Agent, envs, env_seeds, args: Args) -> Batch:
    """Play one whole episode in every environment. Those that are done play on, masked, until the last one is."""
    device, rows = next(agent.parameters()).device, []
    obs, _ = envs.reset(seed=env_seeds)
    mask = np.ones(args.num_envs, bool)
    while mask.any():
        action = agent.act(torch.as_tensor(obs.astype(np.float32), device=device)).cpu().numpy()
        new_obs, reward, terminated, truncated, info = envs.step(action)
        done, episode = mask & (terminated | truncated), np.zeros((args.num_envs, 2))
        if "final_obs" in info:
            episode = np.stack([info["final_info"]["episode"][key] for key in ("r", "l")], -1)
        rows.append(Batch(obs, action, reward, done, mask, episode))
        obs, mask = new_obs, mask & ~done
    return Batch(*(np.stack(column).astype(np.float32) for column in zip(*rows)))


# ==== Update ====
def loss_fn(agent: Agent, minibatch, args: Args):
    """Loss of a batch, and what to log."""
    obs, action, ret, mask = minibatch
    logp, entropy = agent.log_prob(obs, action)
    pg_loss = policy_loss(logp, ret, mask)
    loss = pg_loss - args.ent_coef * (entropy * mask).sum() / args.num_envs
    metrics = {"policy_loss": pg_loss, "entropy": (entropy * mask).sum() / mask.sum()}
    return loss, {name: x.detach() for name, x in metrics.items()}


def update(agent: Agent, optimizer, loss_fn, batch: Batch, args: Args):
    """One step of gradient descent on one batch. Returns what to log."""
    device = next(agent.parameters()).device
    obs, action, reward, done, mask, _ = (torch.as_tensor(x, device=device) for x in batch)
    ret = discounted_returns(reward, done, args.gamma)
    if args.norm_return:
        played = ret[mask > 0]
        ret = (ret - played.mean()) / (played.std(correction=0) + 1e-8)
    loss, metrics = loss_fn(agent, (obs, action, ret, mask), args)
    optimizer.zero_grad()
    loss.backward()
    metrics["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    return {name: x.item() for name, x in metrics.items()}


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
    return step >= args.total_timesteps or solved


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
    eval_env = make_env(args, run_dir / "videos" if args.capture_video else None)
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    if not finished(step, returns, args):
        (run_dir / "args.json").write_text(json.dumps(vars(args) | {"resume": None}, indent=4))
    bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps")
    iteration, first_step, start_time = 0, step, time.perf_counter()
    while not finished(step, returns, args):
        lr = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = lr
        # seeds that the step decides: a resumed run is the uninterrupted one
        torch_seed, *env_seeds = np.random.SeedSequence([args.seed, step]).generate_state(1 + args.num_envs).tolist()
        torch.manual_seed(torch_seed)
        batch = rollout(agent, envs, env_seeds, args)
        metrics = update(agent, optimizer, loss, batch, args)
        iteration += 1
        if not math.isfinite(sum(metrics.values())):
            raise FloatingPointError(f"iteration {iteration}: {metrics}; last checkpoint in {run_dir}")

        for t, n in np.argwhere(batch.done):
            episode_return, episode_length = batch.episode[t, n].tolist()
            returns.append(episode_return)
            steps.append(step + int(batch.mask[: t + 1].sum()))
            writer.add_scalar("charts/episodic_return", episode_return, steps[-1])
            writer.add_scalar("charts/episodic_length", episode_length, steps[-1])
        step += int(batch.mask.sum())
        writer.add_scalar("charts/learning_rate", lr, step)
        writer.add_scalar("charts/SPS", (step - first_step) / (time.perf_counter() - start_time), step)
        for name, x in metrics.items():
            writer.add_scalar(f"losses/{name}", x, step)
        bar.set_postfix_str(f"return {np.mean(returns[-args.return_window :] or [math.nan]):.1f}", refresh=False)
        bar.update(int(batch.mask.sum()))
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
