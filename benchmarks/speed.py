"""How fast the scripts are, beside the code that people use today.

    pip install -e '.[bench]'
    python benchmarks/speed.py --cleanrl PATH --purejaxrl PATH      # everything, about an hour on two cores
    python benchmarks/speed.py CleanRL scaling/ppo --cleanrl PATH   # comparisons with this word, and a part
    python benchmarks/speed.py --cuda --leanrl PATH                 # on a GPU

Every measurement is a process of its own, pinned to one core unless the row says two; of a pair the programs take
turns, A B A B. Steps per second are those after the first third of a run, so neither start nor compilation counts;
"start" is the time from the start of the process to the end of its first update. With --cuda, where compilation takes
minutes, each program is one process for all its rows: all take turns of some seconds, and wait in between. CleanRL,
LeanRL and PureJaxRL are read from checkouts that are named on the command line; without them their rows stay as they
were.

Writes results/speed.csv, results/parts.csv, results/scaling.csv, results/defaults.csv, SPEED.md and speed.png beside
this file, and with --readme README.md the tables of comparisons and of default flags between their marks there.
"""

import builtins
import csv
import json
import math
import os
import platform
import re
import resource
import runpy
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from gymnasium.vector import SyncVectorEnv
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

# CleanRL's hyper-parameters, the defaults of its ppo.py, as our flags, stable-baselines3's and PureJaxRL's
CLEANRL = {"num_envs": 4, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "learning_rate": 2.5e-4}
CLEANRL |= {"gamma": 0.99, "gae_lambda": 0.95, "ent_coef": 0.01, "clip_vloss": True, "eval_episodes": 0}
CLEANRL_CONTINUOUS = {"env_id": "HalfCheetah-v5", "num_envs": 1, "num_steps": 2048, "num_minibatches": 32}
CLEANRL_CONTINUOUS |= {"update_epochs": 10, "learning_rate": 3e-4, "gamma": 0.99, "gae_lambda": 0.95}
CLEANRL_CONTINUOUS |= {"clip_vloss": True, "norm_obs": True, "norm_reward": True, "eval_episodes": 0}
CLEANRL_IN_SB3 = {"n_steps": 128, "batch_size": 128, "n_epochs": 4, "learning_rate": 2.5e-4, "ent_coef": 0.01}
PUREJAXRL = {
    "NUM_STEPS": 128,
    "UPDATE_EPOCHS": 4,
    "NUM_MINIBATCHES": 4,
    "LR": 2.5e-4,
    "GAMMA": 0.99,
    "GAE_LAMBDA": 0.95,
}
PUREJAXRL |= {"CLIP_EPS": 0.2, "ENT_COEF": 0.01, "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5, "ACTIVATION": "tanh"}
PUREJAXRL |= {"ENV_NAME": "CartPole-v1", "ANNEAL_LR": True, "DEBUG": False}

# rl-zoo's settings of PPO for CartPole-v1
ZOO = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8, "ent_coef": 0.0}
ZOO |= {"learning_rate": "linear 0.001", "clip_range": "linear 0.2"}


class Marks(list):
    """(time, environment steps done) at the end of each update. Where programs take turns they wait for them here."""

    turn_ends = math.inf

    def append(self, mark):
        super().append(mark)
        if mark[0] >= Marks.turn_ends:
            sys.__stdout__.write(f"\nMARK {mark[1]}\n")
            sys.__stdout__.flush()
            seconds = float(sys.stdin.readline())
            Marks.turn_ends = time.time() + seconds


# ====================================================== Programs ======================================================
# Each trains in this process and returns its marks, the first one at the end of the first update.


def ours(script: str, **flags) -> Marks:
    """One of the six scripts, as its users run it: with progress bar and log."""
    module, marks = __import__(script), Marks()

    class Recorder(tqdm):
        def update(self, n=1):
            super().update(n)
            marks.append((time.time(), self.n * flags.get("num_seeds", 1)))

    module.tqdm = Recorder
    module.train(module.Args(**flags))
    return marks


def parts(script: str, **flags) -> dict[str, float]:
    """Microseconds per environment step that a PyTorch script spends in the parts of its loop."""
    module, spent = __import__(script), Counter()

    def timed(name, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            outcome = function(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return outcome

        return call

    for owner, name in ((module, "learn"), (module, "rollout"), (module, "update"), (SyncVectorEnv, "step")):
        setattr(owner, name, timed(name, getattr(owner, name)))
    module.train(module.Args(**flags))
    rest = spent["learn"] - spent["rollout"] - spent["update"]
    seconds = {"environments": spent["step"], "policy": spent["rollout"] - spent["step"]}
    seconds |= {"update": spent["update"], "log and checkpoint": rest}
    return {name: x / flags["total_timesteps"] * 1e6 for name, x in seconds.items()}


def run_script(path: str, *flags: str) -> None:
    """A script written for Gymnasium before 1.0, where TransformObservation did not ask for a space."""
    import gymnasium as gym

    transform = gym.wrappers.TransformObservation
    gym.wrappers.TransformObservation = lambda env, function: transform(env, function, env.observation_space)
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def cleanrl(
    path: str, steps: int, script: str = "ppo.py", batch_size: int = 512, flags: tuple = ("--no-cuda",)
) -> Marks:
    """CleanRL, which prints a line at the end of each update."""
    marks, show = Marks(), builtins.print

    def record(*args, **kwargs):
        if args[0] == "SPS:":
            marks.append((time.time(), batch_size * (len(marks) + 1)))
        else:
            show(*args, **kwargs, file=sys.stderr)

    builtins.print = record
    run_script(f"{path}/cleanrl/{script}", "--total-timesteps", str(steps), *flags)
    builtins.print = show
    return marks


def leanrl(path: str, steps: int, batch_size: int, flags: tuple) -> Marks:
    """LeanRL's PPO, compiled and in CUDA graphs, whose progress bar counts updates. Without Weights & Biases."""
    import torch

    marks = Marks()

    class Recorder(tqdm):
        def __iter__(self):
            for iteration in super().__iter__():
                yield iteration
                if iteration > 3:  # it warms up until then
                    torch.cuda.synchronize()
                    marks.append((time.time(), batch_size * iteration))

    sys.modules["tqdm"].tqdm = Recorder
    sys.modules["wandb"] = types.SimpleNamespace(init=lambda **_: None, log=lambda *_, **__: None)
    script = f"{path}/leanrl/ppo_continuous_action_torchcompile.py"
    run_script(script, "--total-timesteps", str(steps), "--compile", "--cudagraphs", *flags)
    return marks


def sb3(library: str, algorithm: str, steps: int, num_envs: int, target: float | None = None, **settings) -> Marks:
    """stable-baselines3, or sbx, which has its interface."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.utils import LinearSchedule

    marks = Marks()

    class Recorder(BaseCallback):
        def _on_rollout_start(self):
            marks.append((time.time(), self.num_timesteps))

        def _on_step(self):
            episodes = [episode["r"] for episode in self.model.ep_info_buffer]
            return target is None or len(episodes) < 100 or np.mean(episodes) < target

    for name in ("learning_rate", "clip_range"):  # "linear 0.001": down to 0
        if isinstance(settings.get(name), str):
            settings[name] = LinearSchedule(float(settings[name].split()[1]), 0, 1)
    envs = make_vec_env("CartPole-v1", num_envs, seed=settings.get("seed"))
    device = {"device": "cpu"} if library == "stable_baselines3" else {}
    getattr(__import__(library), algorithm)("MlpPolicy", envs, **device, **settings).learn(steps, callback=Recorder())
    return [*marks[1:], (time.time(), marks[-1][1])] if target else marks[1:]


def purejaxrl(path: str, steps: int, num_envs: int, num_seeds: int = 1, times: int = 1) -> Marks:
    """PureJaxRL's ppo.py. One program from the first to the last step, compiled first. What it
    asks of its wrappers is served by gymnax's own, for its copies stop at an older gymnax. On a CPU its weights are
    initialised one agent at a time, as ours are, or it hangs where there are several."""
    import flax.linen.initializers as initializers
    import gymnax.wrappers
    import jax

    orthogonal = initializers.orthogonal

    def one_at_a_time(scale):
        def initialize(key, *shape_and_dtype):
            return jax.custom_batching.sequential_vmap(lambda key: orthogonal(scale)(key, *shape_and_dtype))(key)

        return initialize

    if jax.default_backend() == "cpu":
        initializers.orthogonal = one_at_a_time

    class LogWrapper(gymnax.wrappers.LogWrapper):
        def step(self, *args):
            obs, state, reward, terminated, truncated, info = super().step(*args)
            names = ("returned_episode_returns", "returned_episode_lengths", "returned_episode")
            return obs, state, reward, terminated | truncated, {name: info[name] for name in names}

    flatten = gymnax.wrappers.FlattenObservationWrapper
    wrappers = types.SimpleNamespace(LogWrapper=LogWrapper, FlattenObservationWrapper=flatten)
    sys.modules["wrappers"] = wrappers
    module = runpy.run_path(str(Path(path, "purejaxrl/ppo.py")))
    train = module["make_train"](PUREJAXRL | {"NUM_ENVS": num_envs, "TOTAL_TIMESTEPS": steps})
    keys = jax.random.split(jax.random.PRNGKey(30), num_seeds)
    train, keys = (jax.jit(jax.vmap(train)), keys) if num_seeds > 1 else (jax.jit(train), keys[0])
    program, marks = train.lower(keys).compile(), Marks()
    marks.append((time.time(), 0))
    for done in range(times):
        jax.block_until_ready(program(keys))
        marks.append((time.time(), (done + 1) * steps * num_seeds))
    return marks


# ===================================================== Measuring ======================================================


def processor(cuda: bool = False) -> str:
    """What the operating system, or the driver of the GPU, calls it."""
    if cuda:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return " ".join(re.sub(r"\((R|TM)\)|Processor|@", "", names[0] if names else platform.machine()).split())


def in_fresh_process(program: Callable, cores: int, processes: int = 1, **settings) -> tuple[Any, float, float]:
    """What the program returns, its memory [MB, at the peak], and when its process was started. Of several processes,
    which torchrun starts, it is what the first one says."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    worker = [__file__, "--worker", json.dumps([program.__name__, cores, settings])]
    command = [sys.executable, *launcher, *worker]
    env = os.environ | {"TQDM_DISABLE": ""} | ({"OMP_NUM_THREADS": "1"} if cores == 1 else {})
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return *json.loads(done.stdout.splitlines()[-1]), start


def measure(program: Callable, cores: int, **settings) -> dict[str, float]:
    """Run a program. Returns start and total [s], speed [steps/s] and memory [MB, at the peak]."""
    marks, memory, start = in_fresh_process(program, cores, **settings)
    times, steps = np.array(marks).T
    if {"target", "target_return"} & settings.keys() and steps[-1] > 0.99 * settings.get("steps", 200_000):
        raise RuntimeError(f"{program.__name__} did not reach the target: {settings}")
    warm = len(marks) // 3 if len(marks) > 2 else 0
    speed = (steps[-1] - steps[warm]) / (times[-1] - times[warm])
    return {"start": times[0] - start, "total": times[-1] - start, "speed": speed, "memory": memory}


def start_worker(program: Callable, cores: int, settings: dict, folder: str) -> subprocess.Popen:
    """A process that trains up to its first mark and then waits for its turn."""
    command = [sys.executable, __file__, "--worker", json.dumps([program.__name__, cores, settings]), "--in-turns"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = os.environ | {"TQDM_DISABLE": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # all share the GPU's memory
    env["JAX_DEFAULT_MATMUL_PRECISION"] = "tensorfloat32"  # JAX's default on a GPU; our scripts' is float32
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


def next_mark(process: subprocess.Popen) -> int:
    """Steps that the process has done when it waits for its next turn."""
    for line in process.stdout:
        if line.startswith("MARK"):
            return int(line.split()[1])
    raise RuntimeError(f"{process.args} ended with status {process.wait()}")


def in_turns(programs: dict[str, tuple[Callable, dict]], repeats: int, seconds: float = 2) -> dict[str, list[dict]]:
    """What `measure` returns for each turn of each program, after one turn to warm up. They start one after another,
    so that each compiles alone, and live until all have had their turns."""
    workers, steps, results = {}, {}, {who: [] for who in programs}
    with tempfile.TemporaryDirectory() as folder:
        for who, (program, settings) in tqdm(programs.items(), "compiling", leave=False):
            workers[who] = start_worker(program, 16, settings, folder)
            steps[who] = next_mark(workers[who])
        for _ in tqdm(range(repeats + 1), "turns", leave=False):
            for who, process in workers.items():
                first, start = steps[who], time.time()
                process.stdin.write(f"{seconds}\n")
                process.stdin.flush()
                steps[who] = next_mark(process)
                results[who].append({"speed": (steps[who] - first) / (time.time() - start), "start": math.nan})
        for process in workers.values():
            process.kill()
            process.wait()
    return {who: turns[1:] for who, turns in results.items()}


def worker(name: str, cores: int, settings: dict) -> None:
    """In that process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    outcome = globals()[name](**settings)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if os.environ.get("RANK", "0") == "0":  # the lines of several would run into each other
        print("\n" + json.dumps([outcome, memory]))


@dataclass(frozen=True)
class Pair:
    """Two programs, and the quantity whose ratio counts."""

    ours: tuple[Callable, dict]
    peer: tuple[Callable, dict]
    cores: int = 1
    quantity: str = "speed"
    cuda: bool = False


def pairs(cleanrl_path: str | None, purejaxrl_path: str | None) -> dict[str, Pair]:
    """Every comparison by its name."""
    ppo = {"script": "ppo", "total_timesteps": 150_000, **CLEANRL}
    ppo_jax = {"script": "ppo_jax", "total_timesteps": 1_000_000, **CLEANRL}
    host = ppo_jax | {"env_backend": "gymnasium", "total_timesteps": 200_000}
    stable = {"library": "stable_baselines3", "algorithm": "PPO", "steps": 60_000, "num_envs": 4, **CLEANRL_IN_SB3}
    zoo = stable | ZOO | {"num_envs": 8, "steps": 100_000, "target": 475}
    a2c = {"library": "stable_baselines3", "algorithm": "A2C", "steps": 60_000, "num_envs": 8, "n_steps": 64}
    vpg = {"script": "vpg_advantage", "total_timesteps": 200_000, "eval_episodes": 0, "save_every": 0}
    solve = {"script": "ppo", "target_return": 475, "eval_episodes": 0}
    found = {
        "ppo.py / stable-baselines3": Pair((ours, ppo), (sb3, stable)),
        "ppo.py --compile / stable-baselines3": Pair((ours, ppo | {"compile": True}), (sb3, stable)),
        "vpg_advantage.py / stable-baselines3 A2C": Pair((ours, vpg), (sb3, a2c)),
        "ppo_jax.py --env-backend gymnasium / sbx": Pair((ours, host), (sb3, stable | {"library": "sbx"})),
        "time to solve: ppo.py / stable-baselines3": Pair((ours, solve), (sb3, zoo), 1, "total"),
        "time to solve: ppo_jax.py / stable-baselines3": Pair(
            (ours, solve | {"script": "ppo_jax"}), (sb3, zoo), 2, "total"
        ),
    }
    for env_id, steps in (("LunarLander-v3", 80_000), ("HalfCheetah-v5", 80_000), ("Humanoid-v5", 20_000)):
        sync = {"script": "ppo", "env_id": env_id, "num_envs": 16, "num_steps": 128, "num_minibatches": 16}
        sync |= {"update_epochs": 1, "total_timesteps": steps, "eval_episodes": 0}
        for cores in (2, 16) if (os.cpu_count() or 1) >= 16 else (2,):
            name = f"16 {env_id}: --async-envs / without" + f", {cores} cores" * (cores > 2)
            found[name] = Pair((ours, sync | {"async_envs": True}), (ours, sync), cores)
        found[f"16 {env_id}: torchrun, 2 processes / 1"] = Pair((ours, sync | {"processes": 2}), (ours, sync), 2)
    if cleanrl_path:
        peer = (cleanrl, {"path": cleanrl_path, "steps": 100_000})
        found["ppo.py / CleanRL"] = Pair((ours, ppo), peer)
        found["ppo.py --compile / CleanRL"] = Pair((ours, ppo | {"compile": True}), peer)
    for num_envs, num_seeds, steps in ((4, 1, 1_000_000), (64, 1, 2_000_000), (2048, 1, 4_000_000), (4, 8, 250_000)):
        size = {"num_envs": num_envs, "num_seeds": num_seeds}
        if purejaxrl_path:
            name = f"ppo_jax.py / PureJaxRL, {num_envs} environments" + f", {num_seeds} seeds" * (num_seeds > 1)
            peer = (purejaxrl, {"path": purejaxrl_path, "steps": steps, **size})
            found[name] = Pair((ours, ppo_jax | size | {"total_timesteps": steps}), peer, 2)
            if num_envs >= 64:
                shared = ppo_jax | size | {"total_timesteps": steps, "shard_envs": True}
                found[name.replace(" /", " --shard-envs /")] = Pair((ours, shared), peer, 2)
    return found


def pairs_on_gpu(cleanrl_path: str | None, leanrl_path: str | None, purejaxrl_path: str | None) -> dict[str, Pair]:
    """Every comparison that needs a GPU, by its name."""
    found, flags = {}, ("--env-id", "HalfCheetah-v5")
    cheetah = {"script": "ppo", "total_timesteps": 10**9, "cuda": True, **CLEANRL_CONTINUOUS}  # until it is killed
    compiled = cheetah | {"compile": True}
    peer = {"steps": 10**9, "batch_size": 2048, "flags": flags}
    if cleanrl_path:
        peer_flags = {"path": cleanrl_path, "script": "ppo_continuous_action.py", **peer}
        found["HalfCheetah-v5: ppo.py --cuda / CleanRL"] = Pair((ours, cheetah), (cleanrl, peer_flags))
    if leanrl_path:
        peer_flags = {"path": leanrl_path, **peer}
        found["HalfCheetah-v5: ppo.py --cuda --compile / LeanRL"] = Pair((ours, compiled), (leanrl, peer_flags))
    on_cpu = {"cuda": False}
    found["HalfCheetah-v5: ppo.py --cuda --compile / ppo.py"] = Pair((ours, compiled), (ours, cheetah | on_cpu))
    for num_envs, num_seeds, steps in ((4, 1, 102_400), (2048, 1, 26_214_400), (4, 2048, 51_200)):
        size = {"num_envs": num_envs, "num_seeds": num_seeds}
        flags = {"script": "ppo_jax", "total_timesteps": 10**9, "cuda": True, **CLEANRL, **size}
        of_what = f"{num_envs} environments" + f", {num_seeds} seeds, no checkpoints" * (num_seeds > 1)
        flags |= {"save_every": 0} if num_seeds > 1 else {}  # of 230 MB, which PureJaxRL does not write
        if purejaxrl_path:
            peer_flags = {"path": purejaxrl_path, "steps": steps, "times": 10_000, **size}
            found[f"{of_what}: ppo_jax.py --cuda / PureJaxRL"] = Pair((ours, flags), (purejaxrl, peer_flags))
        found[f"{of_what}: ppo_jax.py --cuda / without"] = Pair((ours, flags), (ours, flags | on_cpu))
    return {name: replace(pair, cores=16, cuda=True) for name, pair in found.items()}


def compare(name: str, pair: Pair, repeats: int) -> dict:
    """Measure a pair. The repeats have seeds of their own, which matters to a time until something is learned."""
    programs, results = {"ours": pair.ours, "peer": pair.peer}, {"ours": [], "peer": []}
    for i in tqdm(range(repeats), name, leave=False):
        for who, (program, settings) in programs.items():
            seeded = {"seed": 100 + i} if pair.quantity == "total" else {}
            results[who].append(measure(program, pair.cores, **settings, **seeded))
    return row_of(name, pair, results)


def compare_on_gpu(found: dict[str, Pair], repeats: int) -> list[dict]:
    """Measure all pairs at once: a program that is in several is one process."""
    turns = in_turns({str(program): program for pair in found.values() for program in (pair.ours, pair.peer)}, repeats)
    sides = {name: {"ours": turns[str(pair.ours)], "peer": turns[str(pair.peer)]} for name, pair in found.items()}
    return [row_of(name, pair, sides[name]) for name, pair in found.items()]


def row_of(name: str, pair: Pair, results: dict[str, list[dict]]) -> dict:
    """A row of speed.csv."""
    values = {who: np.array([result[pair.quantity] for result in of_who]) for who, of_who in results.items()}
    ratios = values["ours"] / values["peer"]
    row = {"comparison": name, "quantity": pair.quantity, "cores": pair.cores, "repeats": len(ratios)}
    for who, of_who in results.items():
        row[who] = f"{np.median(values[who]):.4g}"
        row[f"{who}_start"] = f"{np.median([result['start'] for result in of_who]):.3g}"
    return row | {
        "ratio": f"{np.median(ratios):.3g}",
        "lowest": f"{ratios.min():.3g}",
        "highest": f"{ratios.max():.3g}",
        "processor": processor(pair.cuda),
    }


def scale(script: str, num_envs: int) -> dict:
    """A row of scaling.csv: default flags, but for the environments and 128 steps of each."""
    iterations = int(np.clip(4096 / num_envs, 3, 30))
    num_steps = {} if script.startswith("reinforce") else {"num_steps": 128}
    total = iterations * num_envs * num_steps.get("num_steps", 25)  # untrained, an episode of CartPole is that short
    flags = {"num_envs": num_envs, "total_timesteps": total, "eval_episodes": 0, "save_every": 0, **num_steps}
    result = measure(ours, 2, script=script, **flags)
    return {
        "script": script,
        "num_envs": num_envs,
        "speed": f"{result['speed']:.4g}",
        "memory": f"{result['memory']:.4g}",
    }


def by_default(script: str, backend: str | None, repeats: int = 3) -> dict:
    """A row of defaults.csv: no flag given but perhaps --env-backend."""
    flags = {"env_backend": backend} if backend else {}
    results = [measure(ours, 2, script=script, eval_episodes=0, **flags) for _ in range(repeats)]
    row = {"command": f"{script}.py" + f" --env-backend {backend}" * (backend is not None)}
    row |= {name: f"{np.median([result[name] for result in results]):.3g}" for name in ("start", "speed")}
    return row | {"runs": f"{repeats}", "processor": processor()}


# ======================================================= Report =======================================================


def merge(path: Path, rows: list[dict], keys: tuple[str, ...]) -> list[dict]:
    """Put rows into a CSV file, in place of those with the same keys. Returns all."""
    with path.open(newline="") if path.exists() else nullcontext(()) as file:
        table = {tuple(str(row[key]) for key in keys): row for row in (*csv.DictReader(file), *rows)}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, next(iter(table.values()), ()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())
    return list(table.values())


def report(
    speeds: list[dict], shares: list[dict], scaling: list[dict], starts: list[dict], readme: Path | None
) -> None:
    """SPEED.md, speed.png and the README's tables."""
    import matplotlib.pyplot as plt  # here, for what is imported above counts as a worker's time to start

    from benchmarks.table import put_into

    libraries = ("torch", "jax", "flax", "gymnasium", "gymnax", "stable-baselines3", "sbx-rl")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    lines = [f"Measured by `speed.py`, on CPUs with Python {platform.python_version()}, {versions}.", ""]
    lines += [
        "| comparison | cores | ours | other | ratio, median [lowest, highest] | pairs | start of both | processor |"
    ]
    lines += ["|---" * 8 + "|"]
    for row in speeds:
        unit = "s" if row["quantity"] == "total" else "steps/s"
        a, b = (f"{float(row[who]):,.0f} {unit}" if unit != "s" else f"{row[who]} s" for who in ("ours", "peer"))
        ratio = f"{row['ratio']} [{row['lowest']}, {row['highest']}]"
        cells = [
            row["comparison"],
            row["cores"],
            a,
            b,
            ratio,
            row["repeats"],
            f"{row['ours_start']} s, {row['peer_start']} s" if row["ours_start"] != "nan" else "",
            row["processor"],
        ]
        lines += ["| " + " | ".join(map(str, cells)) + " |"]
    table = ["| | start to first update | steps per second after it | runs | processor |", "|---" * 5 + "|"]
    for row in starts:
        command, start, speed, *rest = row.values()
        table += [f"| `{command}` | {start} s | {float(speed):,.0f} | " + " | ".join(rest) + " |"]
    if readme is not None:
        put_into(readme, "speed.py", "\n".join([*lines, ""]))
        put_into(readme, "speed.py defaults/", "\n".join([*table, ""]))
    if shares:
        lines += ["", "Where the time goes, in microseconds per environment step, over the first 100,000: one core,"]
        lines += ["default flags.", ""]
        lines += ["| " + " | ".join(shares[0]) + " |", "|---" * len(shares[0]) + "|"]
        lines += ["| " + " | ".join(row.values()) + " |" for row in shares]
    (HERE / "SPEED.md").write_text("\n".join(lines) + "\n")
    if not scaling:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for ax, quantity, label in zip(axes, ("speed", "memory"), ("steps per second", "peak memory, MB"), strict=True):
        for script in dict.fromkeys(row["script"] for row in scaling):
            of_script = sorted(
                (int(row["num_envs"]), float(row[quantity])) for row in scaling if row["script"] == script
            )
            ax.loglog(*zip(*of_script, strict=True), marker="o", label=f"{script}.py")
        ax.set(xlabel="environments", ylabel=label)
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(HERE / "speed.png", dpi=120)


@dataclass(frozen=True)
class Args:
    """Measure, and write the tables and the figure."""

    words: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # a word of a comparison's name, or parts/ppo ...
    cleanrl: str | None = None  # checkout of vwxyzjn/cleanrl
    leanrl: str | None = None  # checkout of pytorch-labs/LeanRL
    purejaxrl: str | None = None  # checkout of luchris429/purejaxrl
    cuda: bool = False  # only the comparisons that need a GPU
    repeats: int = 5  # pairs; of the times to solve twice as many
    scaling: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)  # numbers of environments
    readme: Path | None = None  # where to put the tables of comparisons and of default flags


def main() -> None:
    args = tyro.cli(Args)
    results = HERE / "results"
    speeds = merge(results / "speed.csv", [], ("comparison",))
    shares = merge(results / "parts.csv", [], ("script",))
    scaling = merge(results / "scaling.csv", [], ("script", "num_envs"))
    starts = merge(results / "defaults.csv", [], ("command",))
    found = pairs(args.cleanrl, args.purejaxrl)
    if args.cuda:
        found = pairs_on_gpu(args.cleanrl, args.leanrl, args.purejaxrl)
    found = {name: pair for name, pair in found.items() if not args.words or any(word in name for word in args.words)}
    repeats = {name: args.repeats * (2 if pair.quantity == "total" else 1) for name, pair in found.items()}
    one_by_one = (compare(name, pair, repeats[name]) for name, pair in found.items())
    for row in compare_on_gpu(found, args.repeats) if args.cuda else one_by_one:
        print(row, flush=True)
        speeds = merge(results / "speed.csv", [row], ("comparison",))
    for script in ("reinforce", "vpg_advantage", "ppo"):
        if f"parts/{script}" in args.words or not (args.words or args.cuda):
            spent, *_ = in_fresh_process(parts, 1, script=script, total_timesteps=100_000, eval_episodes=0)
            row = {"script": script} | {name: f"{x:.1f}" for name, x in spent.items()} | {"processor": processor()}
            shares = merge(results / "parts.csv", [row], ("script",))
    for script in ("reinforce", "vpg_advantage", "ppo", "reinforce_jax", "vpg_advantage_jax", "ppo_jax"):
        if f"scaling/{script}" in args.words or not (args.words or args.cuda):
            rows = [scale(script, num_envs) for num_envs in tqdm(args.scaling, script)]
            scaling = merge(results / "scaling.csv", rows, ("script", "num_envs"))
    for script in ("ppo", "ppo_jax", "vpg_advantage", "vpg_advantage_jax", "reinforce", "reinforce_jax"):
        if f"defaults/{script}" in args.words or not (args.words or args.cuda):
            rows = [by_default(script, x) for x in (("gymnasium", None) if script.endswith("_jax") else (None,))]
            starts = merge(results / "defaults.csv", rows, ("command",))
    report(speeds, shares, scaling, starts, args.readme)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        Marks.turn_ends = 0 if "--in-turns" in sys.argv else math.inf
        worker(*json.loads(sys.argv[2]))
    else:
        main()
