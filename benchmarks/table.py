"""Write RESULTS.md: what every finished experiment of experiments.toml came to.

    python benchmarks/table.py --readme README.md

Means over seeds with 95 % bootstrap intervals. The README, if named, gets those that have published results to be
compared with, between its two marks.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import tyro
from scipy.stats import bootstrap

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.run import HERE, Experiment, experiments, read

HEADER = """# Results

Written by `python benchmarks/table.py` from `benchmarks/results/`, which `python benchmarks/run.py` fills from
`benchmarks/experiments.toml`. Means over all seeds that were run, 100, 101, ..., in brackets the 95 % bootstrap
interval of that mean; of three seeds it is the lowest and the highest. *Training* is the mean return of the last 100
training episodes, *evaluation* that of fresh episodes with the trained agent, 10 where the command does not say how
many. Times are of a whole process, one seed or all of a command with `--num-seeds`, and their median over processes.

Made with """


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; nothing is known from a single value."""
    if len(values) < 2:
        return np.nan, np.nan
    return tuple(bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval)


def column(rows: list[dict[str, str]], name: str) -> np.ndarray:
    """The numbers in the rows that have one."""
    return np.array([float(row[name]) for row in rows if row[name]])


def with_interval(values: np.ndarray, scale: float = 1, digits: int = 1) -> str:
    """The mean and its interval, for a cell."""
    low, high = interval(values)
    bracket = "" if np.isnan(low) else f" [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
    return f"{scale * values.mean():.{digits}f}{bracket}" if len(values) else ""


def flag(e: Experiment, name: str) -> str:
    """What a flag of the experiment is set to."""
    words = e.flags.split()
    return words[words.index(name) + 1]


def notes(e: Experiment, rows: list[dict[str, str]]) -> str:
    """What only some experiments are asked."""
    found, success, reached = [], column(rows, "success"), column(rows, "reached")
    if len(success):
        found += [f"last reward {with_interval(column(rows, 'last_reward'), digits=3)}"]
        found += [f"success {with_interval(success, 100)} %, worst seed {100 * success.min():.0f} %"]
    if e.threshold is not None:
        found += [f"{len(reached)} of {len(rows)} reached {e.threshold:g}"]
        if len(reached):
            lowest = column(rows, "lowest_after")
            found[-1] += f", at step {np.median(reached):,.0f} (median), after that the lowest was {lowest.min():.0f}"
            if e.collapse is not None:
                found[-1] += f", {(lowest < e.collapse).sum()} fell below {e.collapse:g}"
    if e.pass_mark is not None:
        margins = column(rows, "eval_mean") - column(rows, "eval_std")
        passed = f"{(margins >= e.pass_mark).sum()} of {len(rows)}"
        found += [f"mean - std >= {e.pass_mark:g} on {passed}, lowest {margins.min():.1f}"]
    if "--target-return" in e.flags:
        stopped = [int(row["episodes"]) for row in rows if int(row["steps"]) < int(flag(e, "--total-timesteps"))]
        after = f", after {', '.join(map(str, sorted(stopped)))} episodes" if stopped else ""
        found += [f"{len(stopped)} of {len(rows)} reached {flag(e, '--target-return')}{after}"]
    return "; ".join(found)


def section(group: list[tuple[Experiment, list[dict[str, str]]]]) -> str:
    """One table of experiments.toml: what it shows, a row per script, and the commands."""
    e = group[0][0]
    shows = " ".join(filter(None, (e.shows, e.published and f"Published: {e.published}.")))
    lines = [f"## {e.table}\n", f"{shows} Settings: {e.why}\n"]
    lines += ["| script | seeds | training | evaluation | | minutes |", "|---|---|---|---|---|---|"]
    for e, rows in group:
        minutes = np.median(column(rows, "seconds")) / 60
        cells = [f"`{e.script}.py`", len(rows), with_interval(column(rows, "return"))]
        cells += [with_interval(column(rows, "eval_mean")), notes(e, rows), f"{minutes:.1f}"]
        lines += ["| " + " | ".join(map(str, cells)) + " |"]
    commands = [rows[0]["command"] for _, rows in group]
    return "\n".join([*lines, "\n```", *commands, "```\n"])


def short(groups: list[list[tuple[Experiment, list[dict[str, str]]]]]) -> str:
    """The README's table, and the commands of its rows with their first seed."""
    columns = ("environment, steps", "script", "training", "evaluation", "published", "seeds")
    lines, commands = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"], []
    published = [row for group in groups for row in group if row[0].published]
    tables = {(flag(e, "--env-id"), e.table) for e, _ in published}
    for e, rows in published:
        several = sum(env_id == flag(e, "--env-id") for env_id, _ in tables) > 1
        which = f" ({e.table})" if several else ""
        cells = [f"{flag(e, '--env-id')}, {int(rows[0]['steps']):,}{which}", f"`{e.script}.py`"]
        cells += [with_interval(column(rows, name)) for name in ("return", "eval_mean")]
        cells += [e.published, len(rows)]
        lines += ["| " + " | ".join(map(str, cells)) + " |"]
        commands += [rows[0]["command"]]
    folded = ["\n<details><summary>Commands, with the first seed</summary>\n\n```", *commands, "```\n\n</details>\n"]
    return "\n".join([*lines, *folded])


def long_runs(rows: list[dict[str, str]]) -> str:
    """What `long_run.py` saw: a row per run, each quantity after five minutes and at the end."""
    lines = [
        "## Long runs\n",
        "CartPole-v1, default flags but for 2,000,000,000 steps, side by side; after five minutes and at the end.\n",
    ]
    lines += ["| run | minutes | steps | resident memory, MB | open files | processor seconds per 1,000 steps |"]
    lines += ["|---" * 6 + "|"]
    for name in dict.fromkeys(row["run"] for row in rows):
        of_run = [row for row in rows if row["run"] == name]
        early = min(of_run, key=lambda row: abs(float(row["minute"]) - 5))
        pairs = (f"{early[key]}, {of_run[-1][key]}" for key in ("memory", "files", "seconds_per_1000"))
        lines += [f"| {name} | {of_run[-1]['minute']} | {int(of_run[-1]['step']):,} | {' | '.join(pairs)} |"]
    return "\n".join(lines) + "\n"


def put_into(readme: Path, script: str, text: str) -> None:
    """Replace what stands between this script's mark in the README and the next end mark."""
    begin, end = f"<!-- written by benchmarks/{script} -->\n", "<!-- until here -->"
    new = f"{begin}\n{text}\n{end}"
    readme.write_text(re.sub(f"{begin}.*?{end}", lambda _: new, readme.read_text(), flags=re.DOTALL))


def main(
    table: Path = HERE / "experiments.toml",
    results: Path = HERE / "results",
    out: Path = HERE / "RESULTS.md",
    readme: Path | None = None,
):
    """Write `out` from the experiments of `table` that have results."""
    groups = {}
    for e in experiments(table):
        rows = [r for r in read(results / f"{e.name}.csv") if r["command"] == e.command(int(r["seed"]))]
        if rows:
            groups.setdefault(e.table, []).append((e, rows))
    made_with = json.loads((results / "machine.json").read_text())
    header = HEADER + ", ".join(f"{name} {value}" for name, value in made_with.items()) + ".\n"
    watched = read(results / "long_run.csv")
    out.write_text("\n".join([header, *map(section, groups.values()), *([long_runs(watched)] if watched else [])]))
    if readme is not None:
        put_into(readme, "table.py", short(list(groups.values())))


if __name__ == "__main__":
    tyro.cli(main)
