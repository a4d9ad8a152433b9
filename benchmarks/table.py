"""Write RESULTS.md: what every finished experiment of experiments.toml came to.

    python benchmarks/table.py --readme README.md

Means over seeds with 95 % bootstrap intervals. What stands outside of the marks in RESULTS.md is written by hand. The
README, if named, gets a short table between its own marks: PPO beside the best published result, for experiments that
name one.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.run import HERE, Experiment, experiments, finished

COLUMNS = {"training": "return", "evaluation": "eval_mean"}  # what the tables and the CSV files call them


def interval(values: np.ndarray) -> np.ndarray:
    """95 % bootstrap interval of the mean over seeds: [seeds, ...] -> [2, ...]; not a number if there is only one."""
    if len(values) < 2:
        return np.full((2, *values.shape[1:]), np.nan)
    weights = np.random.default_rng(0).multinomial(len(values), np.full(len(values), 1 / len(values)), 10_000)
    return np.quantile(weights / len(values) @ values, (0.025, 0.975), axis=0)


def column(rows: list[dict[str, str]], name: str) -> np.ndarray:
    """The numbers in the rows that have one."""
    return np.array([float(row[name]) for row in rows if row.get(name)])


def with_interval(values: np.ndarray, digits: int = 1) -> str:
    """The mean and its interval, for a cell."""
    if not len(values):
        return ""
    low, high = interval(values)
    bracket = "" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{values.mean():.{digits}f}{bracket}"


def flag(e: Experiment, name: str) -> str:
    """What a flag of the experiment is set to."""
    words = e.flags.split()
    return words[words.index(name) + 1]


def notes(e: Experiment, rows: list[dict[str, str]]) -> str:
    """What only some experiments are asked."""
    found, success, reached = [], 100 * column(rows, "success"), column(rows, "reached")
    if e.keep == "play":
        found += [f"last reward {with_interval(column(rows, 'last_reward'), 3)}"]
        found += [f"success {with_interval(success)} %, worst seed {success.min():.0f} %"]
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


def markdown(columns: list[str], rows: list[list]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(map(str, cells)) + " |\n" for cells in lines)


def section(group: list[tuple[Experiment, list[dict]]]) -> str:
    """One table of experiments.toml: what it shows, a row per script, and the commands."""
    e, cells = group[0][0], []
    shows = " ".join(filter(None, (e.shows, e.published and f"Published: {e.published}.")))
    for e, rows in group:
        of_both = [with_interval(column(rows, name)) for name in COLUMNS.values()]
        minutes = f"{np.median(column(rows, 'seconds')) / 60:.1f}"
        cells.append([f"`{e.script}.py`", len(rows), *of_both, notes(e, rows), minutes])
    table = markdown(["script", "seeds", *COLUMNS, "", "minutes"], cells)
    commands = "\n".join(rows[0]["command"] for _, rows in group)
    return f"## {e.table}\n\n{shows} Settings: {e.why}\n\n{table}\n```\n{commands}\n```\n"


def short(groups: list[list[tuple[Experiment, list[dict]]]]) -> str:
    """The README's table: experiments that name a `best` published result, each by its last scripts."""
    cells = []
    for group in groups:
        e = group[0][0]
        if e.best:
            ours = {e.script.endswith("_jax"): with_interval(column(rows, COLUMNS[e.measure])) for e, rows in group}
            steps = f"{int(flag(e, '--total-timesteps')):,}"
            row = [flag(e, "--env-id"), steps, e.measure, ours.get(False, ""), ours.get(True, ""), e.best]
            cells.append([*row, len(group[-1][1])])
    return markdown(["environment", "steps", "return in", "`ppo.py`", "`ppo_jax.py`", "best published", "seeds"], cells)


def made_with(path: Path) -> str:
    """The machines and versions that run.note_machine noted."""
    machines = [", ".join(f"{name} {value}" for name, value in found.items()) for found in json.loads(path.read_text())]
    return "Made with " + ";\nor with ".join(machines) + ".\n"


def put_into(file: Path, script: str, text: str) -> None:
    """Replace what stands between this script's mark in the file and the next end mark."""
    begin, end = f"<!-- written by benchmarks/{script} -->\n", "<!-- until here -->"
    new, found = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", file.read_text(), flags=re.DOTALL)
    if not found:
        sys.exit(f"error: {file} lacks the lines {begin}{end}")
    file.write_text(new)


def main(
    table: Path = HERE / "experiments.toml",
    results: Path = HERE / "results",
    out: Path = HERE / "RESULTS.md",
    readme: Path | None = None,
) -> None:
    """Write the tables of those experiments in TABLE that have results."""
    groups = {}
    for e in experiments(table):
        if rows := finished(e, results):
            groups.setdefault(e.table, []).append((e, rows))
    sections = [made_with(results / "machine.json"), *map(section, groups.values())]
    put_into(out, "table.py", "\n".join(sections))
    if readme is not None:
        put_into(readme, "table.py", short(list(groups.values())))


if __name__ == "__main__":
    tyro.cli(main)
