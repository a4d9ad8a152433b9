"""How fast the scripts are, beside the code that people use today.

    python benchmarks/speed.py --cleanrl PATH --purejaxrl PATH --readme README.md  # about an hour on two cores
    python benchmarks/speed.py CleanRL scaling/ppo --cleanrl PATH                  # what has these words in its name
    python benchmarks/speed.py --cuda --leanrl PATH                                # the comparisons that need a GPU

Every measurement is a process of its own, pinned to one core unless the row says more; of a comparison (see
comparisons.toml) the programs take turns, A B A B. Steps per second are those after the first third of a run, so
neither start nor compilation counts; "start" is the time from the start of the process to the end of its first update,
in our JAX scripts of the first 16 or fewer. CleanRL, LeanRL and PureJaxRL are read from checkouts that are named on the
command line; without them their rows stay as they were.

Writes results/ and speed.png, and the tables between the marks of SPEED.md and, if it is named, of the README.
"""

import importlib
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.run import HERE, note_machine, processor, read, write
from benchmarks.table import made_with, markdown, put_into

SCRIPTS = ("reinforce", "vpg_advantage", "ppo", "reinforce_jax", "vpg_advantage_jax", "ppo_jax")
NUM_ENVS = (1, 4, 16, 64, 256, 1024, 4096)  # of the figure
PACKAGES = ("torch", "jax", "flax", "gymnasium", "gymnax", "stable-baselines3", "sbx-rl")
KEYS = {"speed": ["comparison"], "scaling": ["script", "num_envs"], "defaults": ["command"]}


# ==== Programs ====
def ours(script: str, flags: list[str]) -> list:
    """Train by one of the six scripts, as its users run it, with progress bar and log. Returns its marks: (time,
    environment steps done) at the ends of updates."""
    module, marks = importlib.import_module(script), []
    args = tyro.cli(module.Args, args=flags)

    class Recorder(tqdm):
        def update(self, n=1):
            super().update(n)
            marks.append((time.time(), self.n * getattr(args, "num_seeds", 1)))

    module.tqdm = Recorder
    returns = module.train(args).episode_returns
    if args.target_return is not None and returns[-args.return_window :].mean() < args.target_return:
        sys.exit(f"the return of {args.target_return} was not reached")
    return marks


# ==== Measuring ====
def worker(cores: str, program: str, *flags: str) -> None:
    """In a process of its own: run a script or a peer; print its marks and the peak memory in MB."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    if program.endswith(".py"):
        marks = ours(program.removesuffix(".py"), flags)
    else:
        marks = tyro.cli(getattr(importlib.import_module("benchmarks.peers"), program), args=flags)
    print("\n" + json.dumps([marks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def measure(command: str, cores: int) -> dict[str, float]:
    """Run a program in a process. Returns start and total [s], speed [steps/s] and memory [MB, at the peak]."""
    line = [sys.executable, __file__, "--worker", str(cores), *shlex.split(command)]
    env = os.environ | {"TQDM_DISABLE": ""} | ({"OMP_NUM_THREADS": "1"} if cores == 1 else {})
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(done.stderr)
    marks, memory = json.loads(done.stdout.splitlines()[-1])
    times, steps = np.array(marks).T
    warm = len(marks) // 3 if len(marks) > 2 else 0
    speed = (steps[-1] - steps[warm]) / (times[-1] - times[warm])
    return {"start": times[0] - start, "total": times[-1] - start, "speed": speed, "memory": memory}


def gpu() -> str:
    """What its driver calls it."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def compare(name: str, pair: dict, repeats: int) -> dict:
    """A row of speed.csv. A time until something is learned has another seed in each repeat, and twice as many."""
    cores, quantity, results = pair.get("cores", 1), pair.get("quantity", "speed"), {"ours": [], "peer": []}
    for i in tqdm(range(repeats * (2 if quantity == "total" else 1)), name, leave=False):
        for who, of_who in results.items():
            of_who.append(measure(pair[who] + f" --seed {100 + i}" * (quantity == "total"), cores))
    values = {who: np.array([result[quantity] for result in of_who]) for who, of_who in results.items()}
    ratios = values["ours"] / values["peer"]
    row = {"comparison": name, "quantity": quantity, "cores": cores, "repeats": len(ratios)}
    for who, of_who in results.items():
        row[who] = f"{np.median(values[who]):.4g}"
        row[f"{who}_start"] = f"{np.median([result['start'] for result in of_who]):.3g}"
    found = {"ratio": np.median(ratios), "lowest": ratios.min(), "highest": ratios.max()}
    return (
        row | {name: f"{x:.3g}" for name, x in found.items()} | {"processor": gpu() if "cuda" in pair else processor()}
    )


def scale(script: str, num_envs: int) -> dict:
    """A row of scaling.csv: default flags, but for the environments and 128 steps of each."""
    # 16 iterations of a JAX script may be one call of its program, which would be a single mark
    iterations = max(17 if script.endswith("_jax") else 3, min(30, 4096 // num_envs))
    steps = iterations * num_envs * (25 if script.startswith("reinforce") else 128)  # untrained, an episode has 25
    command = f"{script}.py --num-envs {num_envs} --total-timesteps {steps} --eval-episodes 0 --save-every 0"
    result = measure(command + " --num-steps 128" * (not script.startswith("reinforce")), 2)
    return {"script": script, "num_envs": num_envs} | {name: f"{result[name]:.4g}" for name in ("speed", "memory")}


def by_default(command: str, repeats: int = 3) -> dict:
    """A row of defaults.csv."""
    results = [measure(f"{command} --eval-episodes 0", 2) for _ in range(repeats)]
    row = {name: f"{np.median([result[name] for result in results]):.3g}" for name in ("start", "speed")}
    return {"command": command, **row, "runs": repeats, "processor": processor()}


# ==== Report ====
def comparisons(rows: list[dict[str, str]]) -> str:
    """Their table."""
    cells = []
    for row in rows:
        unit, form = ("s", ".1f") if row["quantity"] == "total" else ("steps/s", ",.0f")
        both = [f"{float(row[who]):{form}} {unit}" for who in ("ours", "peer")]
        start = "" if row["ours_start"] == "nan" else f"{row['ours_start']} s, {row['peer_start']} s"
        ratio = f"{row['ratio']} [{row['lowest']}, {row['highest']}]"
        cells.append([row["comparison"], row["cores"], *both, ratio, row["repeats"], start, row["processor"]])
    ratio = "ratio, median [lowest, highest]"
    return markdown(["comparison", "cores", "ours", "other", ratio, "pairs", "start of both", "processor"], cells)


def report(results: Path, headlines: list[str], readme: Path | None) -> None:
    """SPEED.md, speed.png and the README's table."""
    import matplotlib.pyplot as plt  # here, for what is imported above counts as a worker's time to start

    speeds, scaling, defaults = (read(results / f"{name}.csv") for name in KEYS)
    lines = [made_with(results / "speed.json"), comparisons(speeds)]
    lines += ["Default flags, two cores; seconds until the first update, and steps per second after it:"]
    lines += [markdown(list(defaults[0]), [row.values() for row in defaults])]
    put_into(HERE / "SPEED.md", "speed.py", "\n\n".join(line.strip() for line in lines) + "\n")
    if readme is not None:
        put_into(readme, "speed.py", comparisons([row for row in speeds if row["comparison"] in headlines]))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, quantity, label in zip(axes, ("speed", "memory"), ("steps per second", "peak memory, MB")):
        for script in SCRIPTS:
            points = [(int(row["num_envs"]), float(row[quantity])) for row in scaling if row["script"] == script]
            axis.loglog(*zip(*points), marker="o", label=f"{script}.py")
        axis.set(xlabel="environments", ylabel=label)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(HERE / "speed.png", dpi=120)


@dataclass(frozen=True)
class Args:
    """Measure, and write the tables and the figure."""

    words: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # of a comparison, or scaling/SCRIPT, defaults/SCRIPT
    cleanrl: Path | None = None  # checkout of vwxyzjn/cleanrl
    leanrl: Path | None = None  # checkout of pytorch-labs/LeanRL
    purejaxrl: Path | None = None  # checkout of luchris429/purejaxrl
    cuda: bool = False  # only the comparisons that need a GPU
    repeats: int = 5  # pairs; of the times to solve twice as many
    readme: Path | None = None  # where to put the rows that are `headline`


def main(args: Args) -> None:
    results, pairs, jobs = HERE / "results", tomllib.loads((HERE / "comparisons.toml").read_text()), []
    flags = pairs.pop("flags") | vars(args)
    for name, pair in pairs.items():
        known = all(flags[word] for word in re.findall(r"{(\w+)}", pair["ours"] + pair["peer"]))
        if known and pair.get("cuda", False) == args.cuda:
            commands = {who: pair[who].format(**flags) for who in ("ours", "peer")}
            jobs.append(("speed", name, partial(compare, name, pair | commands, args.repeats)))
    for script in () if args.cuda else SCRIPTS:
        jobs += [("scaling", f"scaling/{script}", partial(scale, script, num_envs)) for num_envs in NUM_ENVS]
        backends = ("", " --env-backend gymnasium") if script.endswith("_jax") else ("",)
        jobs += [("defaults", f"defaults/{script}", partial(by_default, f"{script}.py{flag}")) for flag in backends]
    for kind, name, job in tqdm(jobs):
        if not args.words or any(word in name for word in args.words):
            row = {key: str(value) for key, value in job().items()}
            tqdm.write(str(row))
            rows = {tuple(x[key] for key in KEYS[kind]): x for x in (*read(results / f"{kind}.csv"), row)}
            write(results / f"{kind}.csv", list(rows.values()))
            note_machine(results / "speed.json", PACKAGES)
    report(results, [name for name, pair in pairs.items() if "headline" in pair], args.readme)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main(tyro.cli(Args))
