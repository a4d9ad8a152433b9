"""Run the experiments of experiments.toml and condense them into results/.

    python benchmarks/run.py                  # whatever is not finished, a run per core at a time
    python benchmarks/run.py pendulum --ray   # with this word in its name; on the cluster that `ray start` has made

A run is a process of its own and leaves an ordinary run folder under runs/, on a cluster in Ray's own. Condensed:

    results/NAME.csv           a row per seed: results, command, and the mean of the last 100 training returns at the
                               step that heads the column. A seed whose row has the present command is finished
    results/NAME.episodes.csv  step and return of every training episode of the first seed, under keep = "episodes"
    results/NAME.play.csv      rewards of its evaluation, a line per episode, under keep = "play"

Rows are written as each run finishes. A run whose process is killed is started again; so is, by the next call, one that
was under way when this program was killed. None is resumed, so that a command always means the same numbers.
"""

import csv
import importlib
import io
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import numpy as np
import tyro
from joblib import Parallel, delayed
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the scripts, and envs/

FIRST_SEED, WINDOW, POINTS = 100, 100, 50  # seeds from, episodes that a training return averages, steps in a curve
ATTEMPTS = 3  # at a run whose process is killed
PACKAGES = ("torch", "jax", "flax", "optax", "gymnasium", "gymnax", "numpy")  # whose versions matter


@dataclass(frozen=True)
class Experiment:
    """A table of experiments.toml with one of its scripts; the fields are explained there."""

    table: str
    script: str
    flags: str
    seeds: int
    shows: str = ""
    why: str = ""
    published: str = ""
    best: str = ""
    measure: Literal["training", "evaluation"] = "training"
    one_program: bool = False
    threshold: float | None = None
    collapse: float | None = None
    pass_mark: float | None = None
    keep: Literal["episodes", "play"] | None = None

    @property
    def name(self) -> str:
        return f"{self.table}.{self.script}"

    @property
    def seeds_per_process(self) -> int:
        return self.seeds if self.one_program and self.script.endswith("_jax") else 1

    def command(self, seed: int) -> str:
        """What trains the agent of this seed, and others if they share its process."""
        if self.seeds_per_process > 1:
            return f"python {self.script}.py {self.flags} --seed {FIRST_SEED} --num-seeds {self.seeds}"
        return f"python {self.script}.py {self.flags} --seed {seed}"


def experiments(folder: Path, words: Iterable[str] = ()) -> list[Experiment]:
    """Those of the folder's experiments.toml whose names hold one of the words, or all."""
    every = []
    for table, entry in tomllib.loads((folder / "experiments.toml").read_text()).items():
        every += [Experiment(table, script, **entry) for script in entry.pop("scripts")]
    return [e for e in every if not words or any(word in e.name for word in words)]


# ==== CSV files ====
def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def write(path: Path, rows: list[dict]) -> None:
    """Whole or not at all."""
    with path.with_suffix(".partial").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".partial").replace(path)


def finished(e: Experiment, folder: Path) -> list[dict[str, str]]:
    """The rows that the present command made."""
    rows = read(folder / f"results/{e.name}.csv")
    return [row for row in rows if row["command"] == e.command(int(row["seed"]))]


def store(e: Experiment, rows: list[dict], kept: np.ndarray, folder: Path) -> None:
    """Add a run to its experiment's files; rows of other commands go."""
    if e.keep and rows[0]["seed"] == FIRST_SEED:
        np.savetxt(folder / f"results/{e.name}.{e.keep}.csv", kept, "%.6g", ",")
    rows = finished(e, folder) + rows  # written last: they say that the run is finished
    write(folder / f"results/{e.name}.csv", sorted(rows, key=lambda row: int(row["seed"])))


# ==== A run ====
def rolling(returns: np.ndarray) -> np.ndarray:
    """[episodes] -> [episodes + 1]: the mean of the last WINDOW of the first 0, 1, 2, ... episodes."""
    total, n = np.concatenate([[0], np.cumsum(returns, dtype=float)]), np.arange(len(returns) + 1)
    return (total - total[np.maximum(n - WINDOW, 0)]) / np.clip(n, 1, WINDOW)


def curve(returns: np.ndarray, steps: np.ndarray, last_step: int) -> dict[str, str]:
    """The rolling mean at POINTS steps: empty until an episode has finished, the last one after a run that stopped."""
    grid = np.linspace(0, last_step, POINTS + 1).astype(int)[1:]
    n = np.searchsorted(steps, grid, side="right")  # episodes finished by then
    return {str(step): f"{x:.5g}" if k else "" for step, k, x in zip(grid, n, rolling(returns)[n])}


def summary(returns: np.ndarray, steps: np.ndarray, evaluation: np.ndarray, threshold: float | None) -> dict:
    """The training of one agent; at which step it `reached` the threshold, and the `lowest_after` that, as means."""
    means = rolling(returns)
    row = {"steps": int(steps.max(initial=0)), "episodes": len(returns), "return": f"{means[-1]:.6g}"}
    row |= {"reached": "", "lowest_after": "", "eval_mean": "", "eval_std": ""}
    above = means[WINDOW:] >= (np.inf if threshold is None else threshold)  # of full windows
    if above.any():
        first = WINDOW + int(above.argmax())
        row |= {"reached": int(steps[first - 1]), "lowest_after": f"{means[first:].min():.6g}"}
    if len(evaluation):
        row |= {"eval_mean": f"{evaluation.mean():.6g}", "eval_std": f"{evaluation.std():.6g}"}
    return row


def play(module: Any, agent: Any, args: Any) -> np.ndarray:
    """[eval_episodes, steps]: the rewards of PyTorch's evaluation, played again, if episodes have one length."""
    rewards = []

    def record(reward: float) -> float:
        rewards.append(reward)
        return reward

    module.evaluate(agent, gym.wrappers.TransformReward(module.make_env(args), record), args)
    return np.reshape(rewards, (args.eval_episodes, -1)) + 0.0  # not -0


def run(e: Experiment, seed: int) -> tuple[list[dict], np.ndarray]:
    """Train in this process. Returns a row of NAME.csv per agent, and what `keep` asks for of the first one."""
    module = importlib.import_module(e.script)
    args = tyro.cli(module.Args, args=shlex.split(e.command(seed))[2:])
    start = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        result = module.train(args)
    seconds = f"{time.perf_counter() - start:.1f}"
    last_step = args.total_timesteps - args.total_timesteps % getattr(args, "batch_size", 1)
    agents = [(result.episode_returns, result.episode_steps, result.eval_returns)]
    if e.seeds_per_process > 1:
        agents = list(zip(*agents[0]))
    kept = np.column_stack([agents[0][1], agents[0][0]])
    rows = []
    for i, (returns, steps, evaluation) in enumerate(agents):
        row = {"seed": seed + i, "seconds": seconds} | summary(returns, steps, evaluation, e.threshold)
        if e.keep == "play":
            kept = play(module, result.agent, args)
            row |= {"last_reward": f"{kept[:, -1].mean():.6g}", "success": f"{np.mean(kept[:, -1] == 0):.6g}"}
        rows.append(row | {"command": e.command(seed)} | curve(returns, steps, last_step))
    return rows, kept


# ==== Many runs ====
def end_with_parent() -> None:
    """End this process when the one that started it has ended, in whatever way."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_process(e: Experiment, seed: int) -> tuple[list[dict], np.ndarray]:
    """`run` in a new process of this machine, and in another one if that is killed."""
    spawn = multiprocessing.get_context("spawn")
    for _ in range(ATTEMPTS):
        with ProcessPoolExecutor(1, spawn, end_with_parent) as process, suppress(BrokenProcessPool):
            return process.submit(run, e, seed).result()
    raise RuntimeError(f"killed {ATTEMPTS} times")


def connect_ray() -> Callable:
    """Returns `run` on the cluster. Ray, unlike joblib's backend for it, starts again a run whose machine is gone."""
    import ray

    settings = {"working_dir": str(HERE.parent), "excludes": [".git", "runs"], "env_vars": {"TQDM_DISABLE": "1"}}
    ray.init("auto", runtime_env=settings, log_to_driver=False)
    remote = ray.remote(num_cpus=1, max_calls=1, max_retries=ATTEMPTS - 1)(run)
    return lambda e, seed: ray.get(remote.remote(e, seed))


def attempt(runner: Callable, e: Experiment, seed: int) -> tuple[Experiment, int, Any]:
    """What the run returns or, so that one that fails stops no other, its error."""
    try:
        return e, seed, runner(e, seed)
    except (Exception, SystemExit) as error:
        return e, seed, error


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return " ".join(re.sub(r"\((R|TM)\)|Processor", "", names[0] if names else platform.machine()).split())


def note_machine(path: Path, packages: Iterable[str]) -> None:
    """Add this one to a file's list of what numbers were made with."""
    this = {"cpu": f"{processor()}, {os.cpu_count()} cores", "python": platform.python_version()}
    this |= {package: version(package) for package in packages}
    known = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps(known if this in known else [*known, this], indent=4) + "\n")


@dataclass(frozen=True)
class Args:
    """Run what is not finished of the experiments."""

    words: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # only those with one of them in their names
    folder: Path = HERE  # of experiments.toml and results/
    jobs: int = os.cpu_count() or 1  # runs at a time, on this machine
    ray: bool = False  # run on a Ray cluster, not on this machine alone


def main(args: Args) -> int:
    os.environ["TQDM_DISABLE"] = "1"  # the runs' bars; tqdm read it on import, so not this one's
    (args.folder / "results").mkdir(exist_ok=True)
    tasks, failed = [], 0
    for e in experiments(args.folder, args.words):
        done = {int(row["seed"]) for row in finished(e, args.folder)}
        seeds = range(FIRST_SEED, FIRST_SEED + e.seeds, e.seeds_per_process)
        tasks += [(e, seed) for seed in seeds if seed not in done]
    runner, jobs = (connect_ray(), len(tasks) + 1) if args.ray else (in_process, args.jobs)
    parallel = Parallel(jobs, backend="threading", return_as="generator_unordered")  # a thread only waits for its run
    outcomes = parallel(delayed(attempt)(runner, *task) for task in tasks)
    for e, seed, outcome in tqdm(outcomes, total=len(tasks), unit="run"):
        if isinstance(outcome, BaseException):
            failed += 1
            tqdm.write(f"{e.name}, seed {seed}: {type(outcome).__name__}: {outcome}", file=sys.stderr)
        else:
            store(e, *outcome, args.folder)
            note_machine(args.folder / "results/machine.json", PACKAGES)
    return int(failed > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once; the runs end with this process
    sys.exit(main(tyro.cli(Args)))
