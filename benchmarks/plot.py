"""Draw results to PNG, a panel for each source: a table of experiments.toml or one script's part of it.

python benchmarks/plot.py curves cartpole-all acrobot-all --out all.png
python benchmarks/plot.py curves cartpole-128-agents --share-above 475 --out share.png
python benchmarks/plot.py moving-average lunarlander-reinforce-long.reinforce --out one-run.png
python benchmarks/plot.py distance point-target-ppo-4e-3 --out distance.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.run import HERE, Experiment, experiments, finished
from benchmarks.table import flag, interval

COLORS = {"reinforce": "C0", "vpg_advantage": "C1", "ppo": "C2"}  # JAX's lines are dashed


def average(rows: list[dict[str, str]], share_above: float | None) -> np.ndarray:
    """[4, points]: step, mean over seeds and its interval, at the steps at which every seed has a value."""
    steps = [name for name in rows[0] if name.isdigit() and all(row[name] for row in rows)]
    values = np.array([[float(row[step]) for step in steps] for row in rows])
    values = values if share_above is None else (values >= share_above).astype(float)
    return np.stack([np.array(steps, int), values.mean(0), *interval(values)])


def curves(axis: plt.Axes, chosen: list[Experiment], results: Path, share_above: float | None) -> None:
    """A line per script: the mean over seeds of the last 100 training returns, with its 95 % bootstrap interval."""
    for e in chosen:
        rows = finished(e, results)
        if rows:
            steps, mean, low, high = average(rows, share_above)
            color, style = COLORS[e.script.removesuffix("_jax")], "--" if e.script.endswith("_jax") else "-"
            axis.plot(steps, mean, style, color=color, label=f"{e.script} ({len(rows)})")
            axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    what = "return, last 100 episodes" if share_above is None else f"share of agents at {share_above:g} or more"
    axis.set(xlabel="environment steps", ylabel=what)
    axis.legend(title="script (seeds)", fontsize="small")


def moving_average(axis: plt.Axes, chosen: list[Experiment], results: Path, window: int = 10) -> None:
    """The training returns of one run: the mean of the last episodes, and a band of their standard deviation."""
    returns = np.loadtxt(results / f"{chosen[0].name}.episodes.csv", delimiter=",")[:, 1]
    windows = np.lib.stride_tricks.sliding_window_view(returns, window)
    episode, mean, std = np.arange(window, len(returns) + 1), windows.mean(-1), windows.std(-1)
    axis.fill_between(episode, mean - std, mean + std, alpha=0.3, linewidth=0)
    axis.plot(episode, mean)
    axis.set(xlabel="episode", ylabel=f"return, mean of {window}, ± 1 standard deviation")


def distance(axis: plt.Axes, chosen: list[Experiment], results: Path, grid_size: int = 10) -> None:
    """PointTarget's evaluation episodes as lines: the distance to the target after every step."""
    rewards = np.loadtxt(results / f"{chosen[0].name}.play.csv", delimiter=",")
    cells = -grid_size * rewards  # the reward is minus distance / size
    noise = np.random.default_rng(0).uniform(-0.15, 0.15, (len(cells), 1))  # or the lines would cover each other
    axis.plot(1 + np.arange(cells.shape[1]), (cells + noise).T, color="C0", alpha=0.15)
    axis.set(xlabel="step", ylabel="distance to the target, cells", ylim=(-0.5, grid_size))
    axis.text(0.95, 0.92, f"success {(cells[:, -1] == 0).mean():.0%}", ha="right", transform=axis.transAxes)


@dataclass(frozen=True)
class Args:
    """Draw: means over seeds, or of one run its training (keep = "episodes") or its evaluation (keep = "play")."""

    kind: Annotated[Literal["curves", "moving-average", "distance"], tyro.conf.Positional]
    sources: Annotated[tuple[str, ...], tyro.conf.Positional]  # what to draw, a panel each
    out: Path  # the PNG file
    share_above: float | None = None  # of curves, draw the share of agents whose mean is at least this instead
    table: Path = HERE / "experiments.toml"  # the experiments
    results: Path = HERE / "results"  # folder of the CSV files


def main(args: Args) -> None:
    sources, results = args.sources, args.results
    columns = 2 if len(sources) == 4 else min(len(sources), 3)
    rows = -(-len(sources) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.5 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(sources) :]:
        axis.remove()
    for axis, source in zip(axes.flat, sources):
        chosen = [e for e in experiments(args.table) if source in (e.table, e.name)]
        if not any(finished(e, results) for e in chosen):
            sys.exit(f"error: {source} has no results in {results}")
        if args.kind == "curves":
            curves(axis, chosen, results, args.share_above)
        else:
            (moving_average if args.kind == "moving-average" else distance)(axis, chosen, results)
        axis.set_title(f"{flag(chosen[0], '--env-id').rpartition(':')[2]}\n{source}")
        axis.grid(alpha=0.3)
        axis.locator_params("x", nbins=6)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args))
