"""The programs of others that speed.py measures, as comparisons.toml calls them, and two limits of what a processor can
do. Like `ours` there, each returns its marks: (time, environment steps done) at the ends of updates."""

import importlib
import math
import runpy
import shlex
import sys
import time
import types

import gymnasium as gym
import numpy as np

SB3 = {  # settings of stable-baselines3: CleanRL's for PPO, ours for A2C, rl-zoo's for PPO on CartPole-v1
    "cleanrl": {"n_steps": 128, "batch_size": 128, "n_epochs": 4, "learning_rate": 2.5e-4, "ent_coef": 0.01},
    "a2c": {"n_steps": 64},
    "zoo": {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8}
    | {"learning_rate": lambda left: left * 0.001, "clip_range": lambda left: left * 0.2},
}
PUREJAXRL = {"NUM_STEPS": 128, "UPDATE_EPOCHS": 4, "ANNEAL_LR": True, "GAMMA": 0.99, "GAE_LAMBDA": 0.95}
PUREJAXRL |= {"CLIP_EPS": 0.2, "ENT_COEF": 0.01, "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5, "DEBUG": False}
PUREJAXRL_OF = {  # the rest of its settings
    "CartPole-v1": {"NUM_MINIBATCHES": 4, "LR": 2.5e-4, "ACTIVATION": "tanh"},
    "Breakout-MinAtar": {"NUM_MINIBATCHES": 8, "LR": 5e-3, "ACTIVATION": "relu"},
}


def cleanrl(script: str, flags: str, seed: int) -> list:
    """A script of CleanRL, which logs its speed after each update, or of LeanRL, which logs after every tenth."""
    from torch.utils import tensorboard

    marks, transform = [], gym.wrappers.TransformObservation

    def log(values, step):
        marks.append((time.time(), step))

    class Recorder(tensorboard.SummaryWriter):
        def add_scalar(self, tag, value, step):
            super().add_scalar(tag, value, step)
            if tag == "charts/SPS":
                log(value, step)

    tensorboard.SummaryWriter = Recorder
    sys.modules["wandb"] = types.SimpleNamespace(init=lambda **_: None, log=log)
    # they were written for Gymnasium before 1.0, where this did not ask for a space
    gym.wrappers.TransformObservation = lambda env, function: transform(env, function, env.observation_space)
    sys.argv = [script, *shlex.split(flags), "--seed", str(seed)]
    runpy.run_path(script, run_name="__main__")
    return marks


def sb3(model: str, settings: str, steps: int, seed: int, num_envs: int = 4, target: float = math.inf) -> list:
    """A model of stable-baselines3, or of sbx, which has its interface, until 100 episodes average the target."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    marks, (library, name) = [], model.split(".")

    class Recorder(BaseCallback):
        def _on_rollout_start(self):
            marks.append((time.time(), self.num_timesteps))

        def _on_step(self):
            episodes = [episode["r"] for episode in self.model.ep_info_buffer]
            return len(episodes) < 100 or np.mean(episodes) < target

    envs = make_vec_env("CartPole-v1", num_envs, seed=seed)
    agent = getattr(importlib.import_module(library), name)("MlpPolicy", envs, seed=seed, device="cpu", **SB3[settings])
    agent.learn(steps, callback=Recorder())
    return [*marks[1:], (time.time(), agent.num_timesteps)]


def purejaxrl(path: str, steps: int, num_envs: int, seed: int, num_seeds: int = 1, env_id: str = "CartPole-v1") -> list:
    """PureJaxRL's ppo.py: one program from the first to the last step, compiled first. What it asks of its wrappers is
    served by gymnax's own, for its copies stop at an older gymnax."""
    import gymnax.wrappers
    import jax

    class LogWrapper(gymnax.wrappers.LogWrapper):
        def step(self, *args):
            obs, state, reward, terminated, truncated, info = super().step(*args)
            names = ("returned_episode_returns", "returned_episode_lengths", "returned_episode")
            return obs, state, reward, terminated | truncated, {name: info[name] for name in names}

    flatten = gymnax.wrappers.FlattenObservationWrapper
    sys.modules["wrappers"] = types.SimpleNamespace(LogWrapper=LogWrapper, FlattenObservationWrapper=flatten)
    if jax.default_backend() == "cpu":  # a batch of QR decompositions can deadlock it; ours are one by one, too
        jax.numpy.linalg.qr = jax.custom_batching.sequential_vmap(jax.numpy.linalg.qr)
    make_train = runpy.run_path(f"{path}/purejaxrl/ppo.py")["make_train"]
    settings = PUREJAXRL | PUREJAXRL_OF[env_id] | {"ENV_NAME": env_id, "NUM_ENVS": num_envs, "TOTAL_TIMESTEPS": steps}
    train = make_train(settings)
    keys = jax.random.split(jax.random.PRNGKey(seed), num_seeds)
    train, keys = (jax.jit(jax.vmap(train)), keys) if num_seeds > 1 else (jax.jit(train), keys[0])
    program = train.lower(keys).compile()
    start = time.time()
    jax.block_until_ready(program(keys))
    return [(start, 0), (time.time(), steps * num_seeds)]


def stepping(env_id: str, num_envs: int, steps: int, seed: int) -> list:
    """A limit where Gymnasium steps the environments: these alone, bare of our wrappers, with random actions."""
    envs = gym.make_vec(env_id, num_envs, vectorization_mode="sync")
    envs.reset(seed=seed)
    actions, start = [envs.action_space.sample() for _ in range(128)], time.time()
    for step in range(steps // num_envs):
        envs.step(actions[step % 128])
    return [(start, 0), (time.time(), steps)]


def products(num_envs: int, steps: int, seed: int) -> list:
    """A limit of the update with the flags {cartpole}: the matrix products of both networks, forward and backward."""
    rng, rows, layers = np.random.default_rng(seed), num_envs * 128 // 4, []
    for n, m in ((4, 64), (64, 64), (64, 2), (4, 64), (64, 64), (64, 1)):
        layers.append([rng.random(shape, np.float32) for shape in ((rows, n), (n, m), (rows, m))])
    start = time.time()
    for _ in range(4 * steps // rows):  # each row in four epochs
        for x, weights, gradient in layers:
            x @ weights, x.T @ gradient
            if x.shape[1] > 4:  # observations need no gradient
                gradient @ weights.T
    return [(start, 0), (time.time(), steps)]
