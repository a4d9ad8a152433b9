"""The programs of others that speed.py measures, as comparisons.toml calls them. Like `ours` there, each trains in this
process and returns its marks: (time, environment steps done) at the ends of updates."""

import builtins
import importlib
import math
import runpy
import shlex
import sys
import time
import types

import gymnasium as gym
import numpy as np
from tqdm import tqdm

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


def cleanrl(script: str, batch_size: int, flags: str) -> list:
    """A script of CleanRL, which prints a line after each update, or of LeanRL, whose progress bar counts updates."""
    marks, show, transform = [], builtins.print, gym.wrappers.TransformObservation

    class Recorder(tqdm):
        def __iter__(self):
            for iteration in super().__iter__():
                yield iteration
                if iteration > 3:  # it warms up until then
                    sys.modules["torch"].cuda.synchronize()
                    marks.append((time.time(), batch_size * iteration))

    def record(*args, **kwargs):
        if args[0] == "SPS:":
            marks.append((time.time(), batch_size * (len(marks) + 1)))

    sys.modules["tqdm"].tqdm, builtins.print = Recorder, record
    sys.modules["wandb"] = types.SimpleNamespace(init=lambda **_: None, log=lambda *_, **__: None)
    # they were written for Gymnasium before 1.0, where this did not ask for a space
    gym.wrappers.TransformObservation = lambda env, function: transform(env, function, env.observation_space)
    sys.argv = [script, *shlex.split(flags)]
    runpy.run_path(script, run_name="__main__")
    builtins.print = show
    return marks


def sb3(model: str, settings: str, steps: int, num_envs: int = 4, target: float = math.inf, seed: int = 0) -> list:
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

    device = {"device": "cpu"} if library == "stable_baselines3" else {}
    envs = make_vec_env("CartPole-v1", num_envs, seed=seed)
    agent = getattr(importlib.import_module(library), name)("MlpPolicy", envs, seed=seed, **SB3[settings], **device)
    agent.learn(steps, callback=Recorder())
    if target < math.inf and agent.num_timesteps >= steps:
        sys.exit(f"the return of {target} was not reached")
    return [*marks[1:], (time.time(), agent.num_timesteps)]


def purejaxrl(path: str, steps: int, num_envs: int, num_seeds: int = 1, env_id: str = "CartPole-v1") -> list:
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
    keys = jax.random.split(jax.random.PRNGKey(30), num_seeds)
    train, keys = (jax.jit(jax.vmap(train)), keys) if num_seeds > 1 else (jax.jit(train), keys[0])
    program = train.lower(keys).compile()
    start = time.time()
    jax.block_until_ready(program(keys))
    return [(start, 0), (time.time(), steps * num_seeds)]
