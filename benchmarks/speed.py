"""How fast the scripts are, beside the code that people use today.

    python benchmarks/speed.py --cleanrl PATH --purejaxrl PATH --readme README.md  # about an hour on two cores
    python benchmarks/speed.py cuda --leanrl PATH --purejaxrl PATH                 # what has this word in its name

Every measurement is a process of its own, pinned to one core unless the row says more; the programs of a comparison
(see comparisons.toml) take turns. "Start" is the time from the start of the process to the first mark: the end of the
first update, in our JAX scripts of the first 16 or fewer. Steps per second are those after the first third of a run.

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
KEYS = {"speed": ["comparison"], "scaling": ["script", "num_envs"]}


def ours(script: str, flags: list[str]) -> list:
    """Train by a script. Returns its marks: (time, environment steps done) at the ends of updates."""
    module, marks = importlib.import_module(script.replace("/", ".")), []
    args = tyro.cli(module.Args, args=flags)

    class Recorder(tqdm):
        def update(self, n=1):
            super().update(n)
            done = marks[-1][1] if marks else 0
            marks.append((time.time(), done + n * getattr(args, "num_seeds", 1)))

    module.tqdm = Recorder
    module.train(args)
    return marks


def worker(cores: str, program: str, *flags: str) -> None:
    """In a process of its own: run a script or a peer; print its marks and the peak memory in MB."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    if program.endswith(".py"):
        marks = ours(program.removesuffix(".py"), flags)
    else:
        marks = tyro.cli(getattr(importlib.import_module("benchmarks.peers"), program), args=flags)
    if marks:  # of torchrun's processes the first one
        print("\n" + json.dumps([marks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def measure(command: str, cores: int) -> dict[str, float]:
    """Run a program in a process. Returns start and total [s], speed [steps/s] and memory [MB, at the peak]."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(cores)] if "torchrun" in command else []
    line = [sys.executable, *torchrun, __file__, "--worker", str(cores), *shlex.split(command)]
    env = os.environ | {"TQDM_DISABLE": ""} | ({"OMP_NUM_THREADS": "1"} if cores == 1 else {})
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        done = subprocess.run(line, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=True)
    marks, memory = json.loads(done.stdout.splitlines()[-1])
    times, steps = np.array(marks).T
    warm = len(marks) // 3
    speed = (steps[-1] - steps[warm]) / (times[-1] - times[warm])
    return {"start": times[0] - start, "total": times[-1] - start, "speed": speed, "memory": memory}


def median(results: list[dict[str, float]], quantity: str, digits: int = 3) -> str:
    return f"{np.median([result[quantity] for result in results]):.{digits}g}"


def compare(name: str, pair: dict, words: dict) -> dict:
    """A row of speed.csv: the programs in turn, on seeds 100, 101, ..."""
    quantity, cores = pair.get("quantity", "speed"), pair.get("cores", 1)
    ours, peer = [], []
    for seed in range(100, 110 if quantity == "total" else 105):
        ours.append(measure(f"{pair['ours'].format(**words)} --seed {seed}", cores))
        peer.append(measure(f"{pair['peer'].format(**words)} --seed {seed}", cores))
    ratios = np.array([a[quantity] / b[quantity] for a, b in zip(ours, peer)])
    row = {"comparison": name, "quantity": quantity, "cores": cores, "repeats": len(ratios)}
    row |= {"ours": median(ours, quantity, 4), "ours_start": median(ours, "start")}
    row |= {"peer": median(peer, quantity, 4), "peer_start": median(peer, "start")}
    row |= {"ratio": f"{np.median(ratios):.3g}", "lowest": f"{ratios.min():.3g}", "highest": f"{ratios.max():.3g}"}
    query = "nvidia-smi --id=0 --query-gpu=name --format=csv,noheader"
    return row | {"processor": subprocess.getoutput(query) if "--cuda" in pair["ours"] else processor()}


def scale(script: str, num_envs: int) -> dict:
    """A row of scaling.csv: default flags, but for the environments and 128 steps of each."""
    iterations = 32 if script.endswith("_jax") else 8  # a JAX script marks the time after 16 or fewer
    per_env, flag = (25, "") if script.startswith("reinforce") else (128, "--num-steps 128")  # 25: an untrained episode
    steps = iterations * num_envs * per_env
    command = f"{script}.py --num-envs {num_envs} {flag} --total-timesteps {steps} --eval-episodes 0 --save-every 0"
    result = measure(command, 2)
    return {"script": script, "num_envs": num_envs} | {name: f"{result[name]:.4g}" for name in ("speed", "memory")}


def comparisons(rows: list[dict[str, str]]) -> str:
    cells = []
    for row in rows:
        unit, form = ("s", ".1f") if row["quantity"] == "total" else ("steps/s", ",.0f")
        both = [f"{float(row[who]):{form}} {unit}" for who in ("ours", "peer")]
        start = "" if row["ours_start"] == "nan" else f"{row['ours_start']} s, {row['peer_start']} s"
        ratio = f"{row['ratio']} [{row['lowest']}, {row['highest']}]"
        cells.append([row["comparison"], row["cores"], *both, ratio, row["repeats"], start, row["processor"]])
    ratio = "ratio, median [lowest, highest]"
    return markdown(["comparison", "cores", "ours", "other", ratio, "pairs", "start of both", "processor"], cells)


def report(headlines: list[str], readme: Path | None) -> None:
    """SPEED.md, speed.png and the README's table."""
    import matplotlib.pyplot as plt  # here, for what is imported above counts as a worker's time to start

    speeds, scaling = (read(HERE / f"results/{name}.csv") for name in KEYS)
    put_into(HERE / "SPEED.md", "speed.py", f"{made_with(HERE / 'results/speed.json')}\n{comparisons(speeds)}")
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


def add(kind: str, row: dict) -> None:
    """To results/KIND.csv, in place of the row of the same key."""
    print(row)
    path, row = HERE / f"results/{kind}.csv", {name: str(value) for name, value in row.items()}
    rows = {tuple(x[name] for name in KEYS[kind]): x for x in (*read(path), row)}
    write(path, list(rows.values()))
    note_machine(HERE / "results/speed.json", PACKAGES)


@dataclass(frozen=True)
class Args:
    """Measure, and write the tables and the figure."""

    words: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # of a comparison, or scaling/SCRIPT
    cleanrl: Path | None = None  # checkout of vwxyzjn/cleanrl
    leanrl: Path | None = None  # checkout of pytorch-labs/LeanRL
    purejaxrl: Path | None = None  # checkout of luchris429/purejaxrl
    readme: Path | None = None  # where to put the rows that are `headline`


def main(args: Args) -> None:
    def chosen(name: str) -> bool:
        return not args.words or any(word in name for word in args.words)

    pairs = tomllib.loads((HERE / "comparisons.toml").read_text())
    words = pairs.pop("flags") | {name: path for name, path in vars(args).items() if path}
    for name, pair in pairs.items():
        known = set(re.findall(r"{(\w+)}", pair["ours"] + pair["peer"])) <= words.keys()
        if chosen(name) and known and ("--cuda" in pair["ours"]) == ("cuda" in args.words):
            add("speed", compare(name, pair, words))
    for script in SCRIPTS:
        if chosen(f"scaling/{script}"):
            for num_envs in NUM_ENVS:
                add("scaling", scale(script, num_envs))
    report([name for name, pair in pairs.items() if "headline" in pair], args.readme)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main(tyro.cli(Args))
