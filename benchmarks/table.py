"""Write RESULTS.md: what every finished experiment of experiments.toml came to.

    python benchmarks/table.py --readme README.md

What stands outside of the marks in RESULTS.md is written by hand. The README, if named, gets a short table between its
own marks: PPO beside the best published result, for experiments that name one.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.run import HERE, Experiment, experiments, finished

COLUMNS = {"training": "return", "evaluation": "eval_mean"}  # what the tables and the CSV files call them


def interval(values: np.ndarray) -> np.ndarray:
    """95 % bootstrap interval of the mean over seeds: [seeds, ...] -> [2, ...]."""
    weights = np.random.default_rng(0).multinomial(len(values), np.full(len(values), 1 / len(values)), 10_000)
    return np.quantile(weights / len(values) @ values, (0.025, 0.975), axis=0)


def column(rows: list[dict[str, str]], name: str) -> np.ndarray:
    """The numbers in the rows that have one."""
    return np.array([float(row[name]) for row in rows if row.get(name)])


def with_interval(values: np.ndarray, digits: int = 1) -> str:
    if not len(values):
        return ""
    mean = f"{values.mean():.{digits}f}"
    low, high = interval(values)
    return mean if len(values) == 1 else f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"


def flag(e: Experiment, name: str) -> str:
    words = e.flags.split()
    return words[words.index(name) + 1]


def notes(e: Experiment, rows: list[dict[str, str]]) -> str:
    """What only some experiments are asked."""
    found, reached = [], column(rows, "reached")
    if e.keep == "play":
        success = 100 * column(rows, "success")
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
    """The README's table: experiments that name a `best` published result."""
    cells = []
    for group in groups:
        e, rows = group[-1]
        if e.best:
            ours = {e.script: with_interval(column(rows, COLUMNS[e.measure])) for e, rows in group}
            setting = [flag(e, "--env-id"), f"{int(flag(e, '--total-timesteps')):,}", e.measure]
            cells.append([*setting, ours.get("ppo", ""), ours.get("ppo_jax", ""), e.best, len(rows)])
    return markdown(["environment", "steps", "return in", "`ppo.py`", "`ppo_jax.py`", "best published", "seeds"], cells)


def made_with(path: Path) -> str:
    """The machines and versions that run.note_machine noted."""
    machines = [", ".join(f"{name} {value}" for name, value in found.items()) for found in json.loads(path.read_text())]
    return "Made with " + ";\nor with ".join(machines) + ".\n"


def put_into(file: Path, script: str, text: str) -> None:
    """Replace what stands between this script's mark in the file and the next end mark."""
    begin, end = f"<!-- written by benchmarks/{script} -->\n", "<!-- until here -->"
    before, _, rest = file.read_text().partition(begin)
    file.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def main(folder: Path = HERE, readme: Path | None = None) -> None:
    """Write RESULTS.md in the folder of experiments.toml and results/: of those experiments that have results."""
    groups = {}
    for e in experiments(folder):
        if rows := finished(e, folder):
            groups.setdefault(e.table, []).append((e, rows))
    sections = [made_with(folder / "results/machine.json"), *map(section, groups.values())]
    put_into(folder / "RESULTS.md", "table.py", "\n".join(sections))
    if readme is not None:
        put_into(readme, "table.py", short(list(groups.values())))


if __name__ == "__main__":
    tyro.cli(main)
