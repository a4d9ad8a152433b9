"""Run the experiments of experiments.toml and condense them into results/.

    python benchmarks/run.py                  # whatever is not finished
    python benchmarks/run.py pendulum lunar   # of the experiments with these words in their names

A run is a call of its script's `train` in a process of its own, from the flags of the command line: `Result` holds what
no log does, every episode of each of --num-seeds agents, the evaluation, and the agent to play with. It leaves an
ordinary run folder under runs/. Condensed, for each experiment and script:

    results/NAME.csv           a row per seed, with its command. A seed whose row has the present command is finished
    results/NAME.curve.csv     the mean of the last 100 training returns, on a grid of steps
    results/NAME.episodes.csv  every training return of the first seed, under keep = "episodes"
    results/NAME.play.csv      every reward of its evaluation episodes, under keep = "play"

An interrupted run is started again and not resumed, so that a command always means the same numbers.
"""

import csv
import importlib
import io
import json
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import time
import tomllib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the scripts, and envs/

FIRST_SEED, WINDOW, POINTS = 100, 100, 100  # seeds from, episodes that a training return averages, steps in a curve


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


def experiments(path: Path, words: Iterable[str] = ()) -> list[Experiment]:
    """Those of the file whose names hold one of the words, or all."""
    tables = tomllib.loads(path.read_text())
    every = [(table, entry, script) for table, entry in tables.items() for script in entry.pop("scripts")]
    every = [Experiment(table, script, **entry) for table, entry, script in every]
    return [e for e in every if not words or any(word in e.name for word in words)]


# ===================================================== CSV files ======================================================


def read(path: Path) -> list[dict[str, str]]:
    """The rows, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict]) -> None:
    """Whole or not at all, sorted by seed."""
    with path.with_suffix(".partial").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: int(row["seed"])))
    path.with_suffix(".partial").replace(path)


def finished(experiment: Experiment, out: Path) -> set[int]:
    """Seeds that have a row made by the present command."""
    rows = read(out / f"{experiment.name}.csv")
    return {int(row["seed"]) for row in rows if row["command"] == experiment.command(int(row["seed"]))}


def store(experiment: Experiment, files: dict[str, list[dict]], out: Path) -> None:
    """Add a run's rows to the experiment's files; what other commands or broken-off runs left in them goes."""
    kept = finished(experiment, out)
    for suffix, rows in sorted(files.items(), reverse=True):  # last NAME.csv, which says that the run is finished
        path = out / f"{experiment.name}{suffix}.csv"
        write(path, [row for row in read(path) if int(row["seed"]) in kept] + rows)


# ===================================================== Condensing =====================================================


def rolling(returns: np.ndarray) -> np.ndarray:
    """[episodes] -> [episodes + 1]: the mean of the last WINDOW of the first 0, 1, 2, ... episodes."""
    total, n = np.concatenate([[0], np.cumsum(returns, dtype=float)]), np.arange(len(returns) + 1)
    return (total - total[np.maximum(n - WINDOW, 0)]) / np.clip(n, 1, WINDOW)


def read_clock(run_dir: Path) -> np.ndarray:
    """[2, iterations]: environment steps, and the seconds that they took from the start of training, compilation
    included, from the run's log."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    start = log.Tensors("arguments/text_summary")[0].wall_time
    return np.array([(0, 0), *((e.step, e.wall_time - start) for e in log.Scalars("charts/SPS"))]).T


def curve(returns: np.ndarray, steps: np.ndarray, clock: np.ndarray, last_step: int) -> list[dict]:
    """The rolling mean at POINTS steps up to `last_step`, from the first finished episode to the end of the run."""
    grid = np.linspace(0, last_step, POINTS + 1).astype(int)[1:]
    n = np.searchsorted(steps, grid, side="right")  # episodes finished by then
    values = zip(grid, n, np.interp(grid, *clock), rolling(returns)[n], strict=True)
    rows = [{"step": s, "episodes": n, "seconds": f"{t:.1f}", "return": f"{r:.5g}"} for s, n, t, r in values]
    return [row for row in rows if row["episodes"] and row["step"] <= clock[0, -1]]


def summary(returns: np.ndarray, steps: np.ndarray, clock: np.ndarray, evaluation: np.ndarray, threshold: float | None):
    """The training of one agent in a row."""
    means = rolling(returns)
    row = {"steps": int(clock[0, -1]), "episodes": len(returns), "seconds": f"{clock[1, -1]:.1f}"}
    row |= {"return": f"{means[-1]:.6g}", "reached": "", "lowest_after": ""}
    above = means[WINDOW:] >= (np.inf if threshold is None else threshold)  # of full windows
    if above.any():
        first = WINDOW + int(above.argmax())
        row |= {"reached": steps[first - 1], "lowest_after": f"{means[first:].min():.6g}"}
    mean, std = (f"{evaluation.mean():.6g}", f"{evaluation.std():.6g}") if len(evaluation) else ("", "")
    return row | {"eval_episodes": len(evaluation), "eval_mean": mean, "eval_std": std}


def play(module: Any, agent: Any, args: Any) -> list[np.ndarray]:
    """The rewards of --eval-episodes episodes, from the evaluation's seeds. For the PyTorch scripts."""
    import torch

    env, rewards = module.make_env(args), []
    for seed in module.env_seeds(args.seed, 0, args.eval_episodes, stream=1):
        obs, done, episode = env.reset(seed=seed)[0], False, []
        while not done:
            with torch.inference_mode():
                action = agent.act(torch.from_numpy(obs), greedy=not args.eval_sample).numpy()
            obs, reward, terminated, truncated, _ = env.step(action)
            episode.append(reward)
            done = terminated or truncated
        rewards.append(np.array(episode))
    return rewards


def run(experiment: Experiment, seed: int) -> dict[str, list[dict]]:
    """Train in this process. Returns the rows for each of the experiment's files, by suffix."""
    module = importlib.import_module(experiment.script)
    args = tyro.cli(module.Args, args=shlex.split(experiment.command(seed))[2:])
    with redirect_stdout(io.StringIO()):
        result = module.train(args)
    clock, files = read_clock(result.run_dir), {"": [], ".curve": []}
    agents = [(result.episode_returns, result.episode_steps, result.eval_returns)]
    if experiment.seeds_per_process > 1:
        agents = zip(*agents[0], strict=True)
    for i, (returns, steps, evaluation) in enumerate(agents):
        of_seed, last_reward, success = {"seed": seed + i}, "", ""
        if experiment.keep == "play":
            rewards = play(module, result.agent, args)
            last = np.array([episode[-1] for episode in rewards])
            last_reward, success = f"{last.mean():.6g}", f"{(last == 0).mean():.6g}"
        if experiment.keep == "play" and seed + i == FIRST_SEED:
            points = [(episode, t, r) for episode, row in enumerate(rewards) for t, r in enumerate(row)]
            files[".play"] = [of_seed | {"episode": e, "step": t, "reward": f"{r:.6g}"} for e, t, r in points]
        if experiment.keep == "episodes" and seed + i == FIRST_SEED:
            points = zip(steps, returns, strict=True)
            files[".episodes"] = [of_seed | {"step": step, "return": f"{r:.6g}"} for step, r in points]
        row = of_seed | summary(returns, steps, clock, evaluation, experiment.threshold)
        files[""].append(row | {"last_reward": last_reward, "success": success, "command": experiment.command(seed)})
        files[".curve"] += [of_seed | point for point in curve(returns, steps, clock, args.last_step)]
    return files


# ====================================================== Running =======================================================


def run_apart(experiment: Experiment, seed: int) -> dict[str, list[dict]]:
    """`run` in a new process: JAX and PyTorch are set up once per process, and a crash ends that run alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run, experiment, seed).result()


def machine() -> dict[str, str]:
    """What the numbers were made with."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = ("torch", "jax", "flax", "optax", "gymnasium", "gymnax", "numpy")
    versions = {package: version(package) for package in packages}
    return {"cpu": cpu, "cores": str(os.cpu_count()), "python": platform.python_version()} | versions


def main(
    words: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    table: Path = HERE / "experiments.toml",
    out: Path = HERE / "results",
    jobs: int = os.cpu_count() or 1,
) -> int:
    """Run what is not finished of the experiments with one of WORDS in their names; without words, of all.

    Args:
        table: the experiments
        out: folder of the condensed results
        jobs: runs at a time
    """
    os.environ["TQDM_DISABLE"] = "1"  # the runs' bars; tqdm read it on import, so not this one's
    out.mkdir(parents=True, exist_ok=True)
    tasks, chosen = [], experiments(table, words)
    if not chosen:
        sys.exit(f"error: no name of an experiment in {table} has one of the words {' '.join(words)}")
    for experiment in chosen:
        seeds = range(FIRST_SEED, FIRST_SEED + experiment.seeds, experiment.seeds_per_process)
        tasks += [(experiment, seed) for seed in seeds if seed not in finished(experiment, out)]
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:  # each thread waits for a process
        futures = {pool.submit(run_apart, *task): task for task in tasks}
        try:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
            for future in tqdm(as_completed(futures), total=len(tasks), unit="run"):
                experiment, seed = futures[future]
                try:
                    store(experiment, future.result(), out)
                    (out / "machine.json").write_text(json.dumps(machine(), indent=4) + "\n")
                except (Exception, SystemExit) as error:  # the others go on
                    failed += 1
                    tqdm.write(f"{experiment.name}, seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):
                for process in multiprocessing.active_children():
                    process.terminate()
                time.sleep(0.2)
            print("stopped: the same command goes on with what is not finished", file=sys.stderr)
            return 130
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
