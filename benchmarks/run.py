"""Run the experiments of experiments.toml and condense them into results/.

    python benchmarks/run.py                  # whatever is not finished, a run per core at a time
    python benchmarks/run.py pendulum --ray   # with this word in its name; on the cluster that `ray start` has made

A run is a call of its script's `train`, from the flags of the command line, in a process of its own: JAX and PyTorch
are set up once per process. It leaves an ordinary run folder under runs/, on a cluster in Ray's own. Condensed:

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
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import tyro
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


class Outcome(NamedTuple):
    """What comes of a run."""

    experiment: Experiment
    seed: int  # the first one, if the run has several
    rows: list[dict]  # of NAME.csv
    kept: list[np.ndarray]  # what `keep` asks for, of each seed
    error: str = ""


def experiments(path: Path, words: Iterable[str] = ()) -> list[Experiment]:
    """Those of the file whose names hold one of the words, or all."""
    every = []
    for table, entry in tomllib.loads(path.read_text()).items():
        every += [Experiment(table, script, **entry) for script in entry.pop("scripts")]
    return [e for e in every if not words or any(word in e.name for word in words)]


# ==== CSV files ====
def read(path: Path) -> list[dict[str, str]]:
    """The rows, none if there is no file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def write(path: Path, rows: list[dict]) -> None:
    """Whole or not at all."""
    with path.with_suffix(".partial").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".partial").replace(path)


def finished(experiment: Experiment, out: Path) -> list[dict[str, str]]:
    """The rows that the present command made."""
    rows = read(out / f"{experiment.name}.csv")
    return [row for row in rows if row["command"] == experiment.command(int(row["seed"]))]


def store(outcome: Outcome, out: Path) -> None:
    """Add a run to its experiment's files; rows of other commands go."""
    e = outcome.experiment
    if outcome.kept and outcome.seed == FIRST_SEED:
        np.savetxt(out / f"{e.name}.{e.keep}.csv", outcome.kept[0], "%.6g", ",")
    rows = finished(e, out) + outcome.rows  # written last: they say that the run is finished
    write(out / f"{e.name}.csv", sorted(rows, key=lambda row: int(row["seed"])))


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
    """The training of one agent: `steps` until its last episode finished; the step at which the rolling mean first
    `reached` the threshold, and the `lowest_after` that."""
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
        rewards.append(reward + 0.0)  # not -0
        return reward

    module.evaluate(agent, gym.wrappers.TransformReward(module.make_env(args), record), args)
    return np.reshape(rewards, (args.eval_episodes, -1))


def run(e: Experiment, seed: int) -> Outcome:
    """Train in this process."""
    module = importlib.import_module(e.script)
    args = tyro.cli(module.Args, args=shlex.split(e.command(seed))[2:])
    start = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        result = module.train(args)
    seconds = time.perf_counter() - start
    last_step = args.total_timesteps - args.total_timesteps % getattr(args, "batch_size", 1)
    agents = [(result.episode_returns, result.episode_steps, result.eval_returns)]
    if e.seeds_per_process > 1:
        agents = zip(*agents[0])
    outcome = Outcome(e, seed, [], [])
    for i, (returns, steps, evaluation) in enumerate(agents):
        row = {"seed": seed + i, "seconds": f"{seconds:.1f}"} | summary(returns, steps, evaluation, e.threshold)
        if e.keep == "play":
            outcome.kept.append(play(module, result.agent, args))
            last = outcome.kept[-1][:, -1]
            row |= {"last_reward": f"{last.mean():.6g}", "success": f"{np.mean(last == 0):.6g}"}
        if e.keep == "episodes":
            outcome.kept.append(np.column_stack([steps, returns]))
        outcome.rows.append(row | {"command": e.command(seed)} | curve(returns, steps, last_step))
    return outcome


def attempt(e: Experiment, seed: int) -> Outcome:
    """`run`; one that fails stops no other."""
    try:
        return run(e, seed)
    except (Exception, SystemExit) as error:
        return Outcome(e, seed, [], [], f"{type(error).__name__}: {error}")


# ==== Many runs ====
def end_with_parent() -> None:
    """End this process when the one that started it has ended, in whatever way."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def apart(e: Experiment, seed: int) -> Outcome:
    """`attempt` in a new process, and in another one if that is killed."""
    spawn = multiprocessing.get_context("spawn")
    for _ in range(ATTEMPTS):
        with ProcessPoolExecutor(1, spawn, end_with_parent) as process, suppress(BrokenProcessPool):
            return process.submit(attempt, e, seed).result()
    return Outcome(e, seed, [], [], f"killed {ATTEMPTS} times")


def here(tasks: list[tuple[Experiment, int]], jobs: int) -> Iterator[Outcome]:
    """On this machine: threads, each of which waits for a process."""
    from joblib import Parallel, delayed

    return Parallel(jobs, backend="threading", return_as="generator_unordered")(delayed(apart)(*task) for task in tasks)


def on_ray(tasks: list[tuple[Experiment, int]]) -> Iterator[Outcome]:
    """On a Ray cluster, which gets a copy of the scripts. Ray itself starts a run again whose process or machine is
    gone; joblib's backend for Ray does not."""
    import ray

    settings = {"working_dir": str(HERE.parent), "excludes": [".git", "runs"], "env_vars": {"TQDM_DISABLE": "1"}}
    ray.init("auto", runtime_env=settings, log_to_driver=False)
    remote = ray.remote(num_cpus=1, max_calls=1, max_retries=ATTEMPTS - 1)(attempt)
    futures = {remote.remote(*task): task for task in tasks}
    while futures:
        (future,), _ = ray.wait(list(futures))
        task = futures.pop(future)
        try:
            yield ray.get(future)
        except ray.exceptions.RayError as error:  # killed too often
            yield Outcome(*task, [], [], f"{type(error).__name__}: {error}")


def processor() -> str:
    """What the operating system calls it."""
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
    table: Path = HERE / "experiments.toml"  # the experiments
    out: Path = HERE / "results"  # folder of the condensed results
    jobs: int = os.cpu_count() or 1  # runs at a time, on this machine
    ray: bool = False  # run on a Ray cluster, not on this machine alone


def main(args: Args) -> int:
    os.environ["TQDM_DISABLE"] = "1"  # the runs' bars; tqdm read it on import, so not this one's
    args.out.mkdir(parents=True, exist_ok=True)
    tasks, failed, chosen = [], 0, experiments(args.table, args.words)
    if not chosen:
        sys.exit(f"error: no name of an experiment in {args.table} has one of the words {' '.join(args.words)}")
    for e in chosen:
        done = {int(row["seed"]) for row in finished(e, args.out)}
        seeds = range(FIRST_SEED, FIRST_SEED + e.seeds, e.seeds_per_process)
        tasks += [(e, seed) for seed in seeds if seed not in done]
    for outcome in tqdm(on_ray(tasks) if args.ray else here(tasks, args.jobs), total=len(tasks), unit="run"):
        if outcome.error:
            failed += 1
            tqdm.write(f"{outcome.experiment.name}, seed {outcome.seed}: {outcome.error}", file=sys.stderr)
        else:
            store(outcome, args.out)
            note_machine(args.out / "machine.json", PACKAGES)
    return int(failed > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once; the runs end with this process
    sys.exit(main(tyro.cli(Args)))
