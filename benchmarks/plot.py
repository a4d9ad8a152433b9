"""Draw results to PNG.

    python benchmarks/plot.py curves cartpole-all acrobot-all --out all.png    # a panel each, a line per script
    python benchmarks/plot.py curves runs/CartPole-v1__ppo__* --x seconds --out runs.png
    python benchmarks/plot.py curves cartpole-128-agents --share-above 475 --out share.png
    python benchmarks/plot.py moving-average lunarlander-reinforce-long.reinforce --out one-run.png
    python benchmarks/plot.py distance point-target-ppo-4e-3.ppo --out distance.png

A source is a run folder, a table of experiments.toml (cartpole-all), or one script's part of it (cartpole-all.ppo).
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.run import HERE, curve, read, read_clock
from benchmarks.table import interval

matplotlib.use("Agg")  # no display needed
Sources = Annotated[tuple[str, ...], tyro.conf.Positional]
NAMES = {"step": "environment steps", "seconds": "seconds", "episodes": "episodes"}
COLUMNS = 3  # panels side by side


class Run(NamedTuple):
    """The training of one agent."""

    panel: str  # what it is drawn with
    label: str  # what it is averaged with
    points: list[dict]  # rows of a curve


def episodes(run_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns and steps of the training episodes in a run folder's log."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    events = log.Scalars("charts/episodic_return")
    return np.array([e.value for e in events]), np.array([e.step for e in events])


def files(source: str, kind: str, results: Path) -> list[Path]:
    """The CSV files of a source. Raises SystemExit if there is none."""
    found = sorted({*results.glob(f"{source}.{kind}.csv"), *results.glob(f"{source}.*.{kind}.csv")})
    if not found:
        sys.exit(f"error: {source} is no run folder and has no {kind} in {results}")
    return found


def load(source: str, results: Path) -> list[Run]:
    """The runs of a source."""
    path = Path(source)
    if (path / "args.json").exists():
        args = json.loads((path / "args.json").read_text())
        points = curve(*episodes(path), read_clock(path), args["total_timesteps"])
        return [Run(args["env_id"], args["exp_name"], points)]
    runs = []
    for file in files(source, "curve", results):
        table, script, *_ = file.name.split(".")
        rows = read(file)
        for seed in dict.fromkeys(row["seed"] for row in rows):
            runs.append(Run(table, script, [row for row in rows if row["seed"] == seed]))
    return runs


def titles(panels: Iterable[str], results: Path) -> dict[str, str]:
    """The environment of each experiment, with the experiment's name if several have it; a run folder's panel is named
    after its environment already."""
    found = {}
    for panel in panels:
        commands = [
            r["command"] for file in sorted(results.glob(f"{panel}.*.csv")) for r in read(file) if "command" in r
        ]
        found[panel] = commands[0].partition("--env-id ")[2].split()[0] if commands else panel
    shared = {title for title, count in Counter(found.values()).items() if count > 1}
    return {panel: f"{title} ({panel})" if title in shared else title for panel, title in found.items()}


def average(runs: list[Run], x: str, share_above: float | None) -> np.ndarray:
    """[4, points]: x, mean over runs, and the interval of that mean, at the steps at which every run has a value."""
    at = {}
    for run in runs:
        for point in run.points:
            at.setdefault(int(point["step"]), []).append((float(point[x]), float(point["return"])))
    drawn = []
    for step in sorted(step for step, values in at.items() if len(values) == len(runs)):
        xs, ys = np.array(at[step]).T
        ys = ys if share_above is None else (ys >= share_above).astype(float)
        drawn.append((xs.mean(), ys.mean(), *interval(ys)))
    return np.array(drawn).reshape(-1, 4).T


def panels(names: list[str]) -> tuple[plt.Figure, dict[str, plt.Axes]]:
    """A grid of axes, one per name."""
    columns = 2 if len(names) == 4 else min(len(names), COLUMNS)
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.5 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for name, axis in zip(names, axes.flat, strict=False):
        axis.set_title(name)
        axis.grid(alpha=0.3)
    return figure, dict(zip(names, axes.flat, strict=False))


def curves(
    sources: Sources,
    out: Path,
    x: Literal["step", "seconds", "episodes"] = "step",
    share_above: float | None = None,
    one_panel: bool = False,
    results: Path = HERE / "results",
):
    """Mean over seeds of the last 100 training returns, with the 95 % bootstrap interval of that mean.

    Args:
        sources: what to draw, a panel per table or environment
        out: the PNG file
        x: what to draw over
        share_above: draw the share of agents whose mean is at least this instead
        one_panel: all lines in one panel
        results: folder of the CSV files
    """
    runs = [run for source in sources for run in load(source, results)]
    if one_panel:
        runs = [Run("", f"{run.panel}, {run.label}", run.points) for run in runs]
    figure, axes = panels(list(dict.fromkeys(run.panel for run in runs)))
    pairs = dict.fromkeys(run.label.removesuffix("_jax") for run in runs)  # PyTorch and JAX in one colour
    colors = {name: f"C{i}" for i, name in enumerate(pairs)}
    for panel, label in dict.fromkeys((run.panel, run.label) for run in runs):
        group = [run for run in runs if (run.panel, run.label) == (panel, label)]
        xs, mean, low, high = average(group, x, share_above)
        if not len(xs):
            sys.exit(f"error: the {len(group)} runs of {label} share no step: give them the same --total-timesteps")
        color, style = colors[label.removesuffix("_jax")], "--" if label.endswith("_jax") else "-"
        axes[panel].plot(xs, mean, style, color=color, label=f"{label} ({len(group)})")
        axes[panel].fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
    for panel, text in titles(axes, results).items():
        axes[panel].set_title(text)
    for axis in axes.values():
        what = "return, last 100 episodes" if share_above is None else f"share of agents at {share_above:g} or more"
        axis.set(xlabel=NAMES[x], ylabel=what)
        axis.legend(title="script (seeds)")
    figure.savefig(out, dpi=150)
    plt.close(figure)


def moving_average(sources: Sources, out: Path, window: int = 10, results: Path = HERE / "results"):
    """The training returns of one run: mean of the last episodes, and a band of their standard deviation around it.

    Args:
        sources: run folders, or experiments run with keep = "episodes"; a panel each
        out: the PNG file
        window: episodes that are averaged
        results: folder of the CSV files
    """
    figure, axes = panels(list(sources))
    for source, axis in axes.items():
        if (Path(source) / "args.json").exists():
            returns = episodes(Path(source))[0]
        else:
            returns = np.array([float(row["return"]) for row in read(files(source, "episodes", results)[0])])
        windows = np.lib.stride_tricks.sliding_window_view(returns, window)
        episode, mean, std = np.arange(window, len(returns) + 1), windows.mean(-1), windows.std(-1)
        axis.fill_between(episode, mean - std, mean + std, alpha=0.3, linewidth=0)
        axis.plot(episode, mean)
        axis.set(xlabel="episode", ylabel=f"return, mean of {window}, ± 1 standard deviation")
    figure.savefig(out, dpi=150)
    plt.close(figure)


def distance(sources: Sources, out: Path, grid_size: int = 10, results: Path = HERE / "results"):
    """PointTarget's evaluation episodes as lines: the distance to the target after every step.

    Args:
        sources: experiments run with keep = "play"; a panel each
        out: the PNG file
        grid_size: of the environment
        results: folder of the CSV files
    """
    figure, axes = panels(list(sources))
    for source, axis in axes.items():
        rows = read(files(source, "play", results)[0])
        cells = -grid_size * np.array([float(row["reward"]) for row in rows])  # the reward is minus distance / size
        cells = cells.reshape(-1, 1 + max(int(row["step"]) for row in rows))
        noise = np.random.default_rng(0).uniform(-0.15, 0.15, (len(cells), 1))  # or the lines would cover each other
        axis.plot(1 + np.arange(cells.shape[1]), (cells + noise).T, color="C0", alpha=0.15)
        axis.set(xlabel="step", ylabel="distance to the target, cells", ylim=(-0.5, grid_size))
        axis.text(0.95, 0.92, f"success {(cells[:, -1] == 0).mean():.0%}", ha="right", transform=axis.transAxes)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main(args: list[str] | None = None) -> None:
    """Draw what the command line says."""
    figures = {"curves": curves, "moving-average": moving_average, "distance": distance}
    tyro.extras.subcommand_cli_from_dict(figures, args=args)


if __name__ == "__main__":
    main()
