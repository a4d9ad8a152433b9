"""Draw results to PNG, a panel for each source: a table of experiments.toml or one script's part of it.

python benchmarks/plot.py curves cartpole-all acrobot-all --out all.png
python benchmarks/plot.py curves cartpole-128-agents --share-above 475 --out share.png
python benchmarks/plot.py moving-average lunarlander-reinforce-long --out one-run.png
python benchmarks/plot.py distance point-target-ppo-4e-3 --out distance.png
"""

import sys
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


def curves(axis: plt.Axes, chosen: list[Experiment], folder: Path, share_above: float | None) -> None:
    """A line per script: the mean over seeds of the last 100 training returns, with its 95 % bootstrap interval."""
    for e in chosen:
        rows = finished(e, folder)
        steps, mean, low, high = average(rows, share_above)
        color, style = COLORS[e.script.removesuffix("_jax")], "--" if e.script.endswith("_jax") else "-"
        axis.plot(steps, mean, style, color=color, label=f"{e.script} ({len(rows)})")
        axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    what = "return, last 100 episodes" if share_above is None else f"share of agents at {share_above:g} or more"
    axis.set(xlabel="environment steps", ylabel=what)
    axis.legend(title="script (seeds)", fontsize="small")


def moving_average(axis: plt.Axes, e: Experiment, folder: Path, window: int = 10) -> None:
    """The training returns of one run (keep = "episodes"): the mean of the last ones, and their standard deviation."""
    returns = np.loadtxt(folder / f"results/{e.name}.episodes.csv", delimiter=",")[:, 1]
    windows = np.lib.stride_tricks.sliding_window_view(returns, window)
    episode, mean, std = np.arange(window, len(returns) + 1), windows.mean(-1), windows.std(-1)
    axis.fill_between(episode, mean - std, mean + std, alpha=0.3, linewidth=0)
    axis.plot(episode, mean)
    axis.set(xlabel="episode", ylabel=f"return, mean of {window}, ± 1 standard deviation")


def distance(axis: plt.Axes, e: Experiment, folder: Path, grid_size: int = 10) -> None:
    """The evaluation episodes of one agent on PointTarget (keep = "play"): the distance to the target at every step."""
    rewards = np.loadtxt(folder / f"results/{e.name}.play.csv", delimiter=",")
    cells = -grid_size * rewards  # the reward is minus distance / size
    noise = np.random.default_rng(0).uniform(-0.15, 0.15, (len(cells), 1))  # or the lines would cover each other
    axis.plot(1 + np.arange(cells.shape[1]), (cells + noise).T, color="C0", alpha=0.15)
    axis.set(xlabel="step", ylabel="distance to the target, cells", ylim=(-0.5, grid_size))
    axis.text(0.95, 0.92, f"success {(cells[:, -1] == 0).mean():.0%}", ha="right", transform=axis.transAxes)


def main(
    kind: Annotated[Literal["curves", "moving-average", "distance"], tyro.conf.Positional],
    sources: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: Path,
    share_above: float | None = None,
    folder: Path = HERE,
) -> None:
    """Draw results to a PNG file; with --share-above the share of agents whose mean return is at least that."""
    columns = 2 if len(sources) == 4 else min(len(sources), 3)
    rows = -(-len(sources) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.5 * rows), squeeze=False, layout="constrained")
    for axis, source in zip(axes.flat, sources):
        chosen = [e for e in experiments(folder) if source in (e.table, e.name) and finished(e, folder)]
        if kind == "curves":
            curves(axis, chosen, folder, share_above)
        elif kind == "moving-average":
            moving_average(axis, chosen[0], folder)
        else:
            distance(axis, chosen[0], folder)
        axis.set_title(f"{flag(chosen[0], '--env-id').rpartition(':')[2]}\n{source}")
        axis.grid(alpha=0.3)
        axis.locator_params("x", nbins=6)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    tyro.cli(main)
