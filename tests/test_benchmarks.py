"""The tools of benchmarks/, on tiny experiments, and their numbers against other ways to get them."""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import plot, run, speed, table

TOOLS = Path(run.__file__).parent
TABLE = """
[walk]
shows = "Tiny walks."
why = "To be fast."
scripts = ["ppo"]
flags = "--env-id envs.point_target:PointTarget-v0 --total-timesteps 2560 --num-envs 4 --eval-episodes 12"
seeds = 2
keep = "play"

[pole]
published = "training 12 (a stick)"
best = "12 (a stick)"
measure = "evaluation"
scripts = ["reinforce_jax"]
flags = "--env-id CartPole-v1 --total-timesteps 3000 --eval-episodes 3 --hidden-sizes 8"
seeds = 2
one_program = true
threshold = 15
collapse = 1
pass_mark = 5
keep = "episodes"
"""
LONGER = """
[a]
scripts = ["ppo"]
flags = "--env-id envs.point_target:PointTarget-v0 --total-timesteps 40960 --eval-episodes 0"
seeds = 3
"""
MARKS = "# A\n<!-- written by benchmarks/{} -->\nold\n<!-- until here -->\nB\n"


def rows(name):
    return run.read(Path("results", f"{name}.csv"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """In it the experiments of TABLE were run."""
    path, before = tmp_path_factory.mktemp("done"), Path.cwd()
    os.chdir(path)
    Path("table.toml").write_text(TABLE)
    Path("results").mkdir()
    walk, pole = run.experiments(Path("table.toml"))
    for e, seed in ((walk, 101), (walk, 100), (pole, 100)):
        run.store(run.run(e, seed), Path("results"))
    Path("results/machine.json").write_text('[{"python": "3"}, {"python": "4"}]')
    os.chdir(before)
    return path


@pytest.fixture
def done(folder, monkeypatch):
    monkeypatch.chdir(folder)


# ==== run.py ====
def test_curve_is_what_the_log_says(done):
    """Mean of the last 100 episodes by a plain loop over the log of the run folder."""
    for seed, row in zip((100, 101), rows("walk.ppo")):
        (run_dir,) = Path("runs").glob(f"*__ppo__{seed}__*")
        log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload().Scalars("charts/episodic_return")
        points = [(int(step), x) for step, x in row.items() if step.isdigit()]
        assert len(points) == 50 and points[-1][0] == 2560 and row["seed"] == str(seed)
        for step, x in points:
            until = [event.value for event in log if event.step <= step][-100:]
            assert float(x) == pytest.approx(np.mean(until), rel=1e-4) if until else x == ""
        assert float(row["return"]) == pytest.approx(np.mean([event.value for event in log][-100:]), rel=1e-5)
        assert (int(row["episodes"]), int(row["steps"])) == (len(log), 2560)


def test_evaluation(done):
    """`play` plays the evaluation's very episodes, and its last rewards are counted."""
    row, rewards = rows("walk.ppo")[0], np.loadtxt("results/walk.ppo.play.csv", delimiter=",")
    assert rewards.shape == (12, 20)
    expected = {"eval_mean": rewards.sum(1).mean(), "eval_std": rewards.sum(1).std()}
    expected |= {"last_reward": rewards[:, -1].mean(), "success": np.mean(rewards[:, -1] == 0)}
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4)


def test_many_seeds_in_one_program(done):
    """A row for each agent, with one command; episodes of the first one, from which its numbers follow."""
    summary, kept = rows("pole.reinforce_jax"), np.loadtxt("results/pole.reinforce_jax.episodes.csv", delimiter=",")
    assert [row["seed"] for row in summary] == ["100", "101"] and summary[0]["return"] != summary[1]["return"]
    assert {row["command"].partition("--hidden-sizes 8 ")[2] for row in summary} == {"--seed 100 --num-seeds 2"}
    steps, returns = kept.T
    means = [returns[i - 100 : i].mean() for i in range(100, len(returns) + 1)]
    first = next(i for i, mean in enumerate(means) if mean >= 15)
    expected = {"episodes": len(returns), "return": means[-1], "reached": steps[first + 99]}
    expected["lowest_after"] = min(means[first:])
    assert {name: float(summary[0][name]) for name in expected} == pytest.approx(expected, rel=1e-4)


def test_what_is_finished_is_skipped(done):
    before = {path: path.read_bytes() for path in Path().rglob("*.csv")}
    assert run.main(run.Args(table=Path("table.toml"), out=Path("results"))) == 0
    assert {path: path.read_bytes() for path in Path().rglob("*.csv")} == before
    assert len(list(Path("runs").iterdir())) == 3


def test_store_drops_other_commands():
    e = run.Experiment("a", "ppo", "--gamma 1", 4)
    run.write(Path("a.ppo.csv"), [{"seed": 103, "command": e.command(103)}, {"seed": 102, "command": "python ppo.py"}])
    run.store(run.Outcome(e, 101, [{"seed": 101, "command": e.command(101)}], []), Path())
    assert [row["seed"] for row in run.read(Path("a.ppo.csv"))] == ["101", "103"]


def test_a_run_that_fails_says_why():
    assert run.attempt(run.Experiment("a", "ppo", "--num-minibatches 3", 1), 100).error.startswith("SystemExit")
    error = "ModuleNotFoundError: No module named 'nothing'"
    assert run.attempt(run.Experiment("a", "nothing", "", 1), 100).error == error


def test_numbers_by_hand():
    mean = run.rolling(np.arange(250.0))
    assert len(mean) == 251 and [mean[i] for i in (1, 4, 100, 101, 250)] == [0, 1.5, 49.5, 50.5, 199.5]
    points = run.curve(np.array([4.0, 8.0]), np.array([250, 400]), 1000)  # two episodes, ending there
    assert [points[str(step)] for step in (20, 240, 260, 380, 400, 1000)] == ["", "", "4", "4", "6", "6"]
    returns = np.repeat([0.0, 10.0, 4.0], 100)  # the mean reaches 5 with episode 150, and ends at 4
    row = run.summary(returns, np.arange(1, 301), np.zeros(0), 5)
    assert (row["reached"], row["lowest_after"], row["return"], row["eval_mean"]) == (150, "4", "4", "")
    assert run.summary(returns, np.arange(1, 301), np.zeros(0), 10.5)["reached"] == ""


def start(*arguments, **env):
    Path("table.toml").write_text(LONGER)
    command = [sys.executable, TOOLS / "run.py", "--table", "table.toml", "--out", "results", *arguments]
    return subprocess.Popen(command, env=os.environ | env)


def wait_for(pattern, process, folder=Path()):
    deadline = time.monotonic() + 180
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def worker(process):
    children = " ".join(path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")).split()
    (found,) = [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    return found


@pytest.mark.slow
def test_killed_worker_and_killed_driver():
    """The run whose process is killed is done again, and so is the one under way when all was killed; no other is."""
    process = start("--jobs", "1")
    wait_for("runs/*__100__*", process)
    os.kill(worker(process), signal.SIGKILL)
    wait_for("runs/*__101__*", process)
    orphan = Path(f"/proc/{worker(process)}")
    process.kill()
    process.wait()
    assert [row["seed"] for row in rows("a.ppo")] == ["100"]
    time.sleep(2)
    assert not orphan.exists()
    first = Path("results/a.ppo.csv").read_text()
    assert start().wait(300) == 0
    assert Path("results/a.ppo.csv").read_text().startswith(first)
    assert [row["seed"] for row in rows("a.ppo")] == ["100", "101", "102"]
    assert [len(list(Path("runs").glob(f"*__{seed}__*"))) for seed in (100, 101, 102)] == [2, 2, 1]


@pytest.mark.slow
def test_ray_cluster_that_loses_a_machine():
    """Two nodes of one core each, of which one is killed while it has a run: all rows are there all the same."""
    cluster = pytest.importorskip("ray.cluster_utils").Cluster(True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)
        process, session = start("--ray", RAY_ADDRESS=cluster.address), Path(node.get_session_dir_path())
        for seed in (100, 101):
            wait_for(f"**/runs/*__{seed}__*", process, session)
        cluster.remove_node(node, allow_graceful=False)
        assert process.wait(300) == 0 and len(list(session.glob("**/runs/*__ppo__*"))) == 4
    finally:
        cluster.shutdown()
    assert [row["seed"] for row in rows("a.ppo")] == ["100", "101", "102"]


# ==== What is committed ====
def test_experiments_and_comparisons():
    """Every command parses, rows of results/ are of present commands, and the README's tables are short."""
    experiments = run.experiments(TOOLS / "experiments.toml")
    for e in experiments:
        if "brax" in e.flags and not importlib.util.find_spec("brax"):
            continue
        args = tyro.cli(importlib.import_module(e.script).Args, args=shlex.split(e.command(100))[2:])
        assert (e.shows or e.published) and e.why
        assert e.keep != "play" or (args.eval_episodes and not e.script.endswith("_jax"))
        assert args.target_return is None or e.script.startswith("reinforce")  # table.notes counts on it
        stored = run.read(TOOLS / "results" / f"{e.name}.csv")
        assert run.finished(e, TOOLS / "results") == stored and len(stored) in (0, e.seeds)
    assert 0 < len({e.table for e in experiments if e.best}) <= 10
    pairs = tomllib.loads((TOOLS / "comparisons.toml").read_text())
    words = pairs.pop("flags") | dict.fromkeys(("cleanrl", "leanrl", "purejaxrl"), ".")
    for command in (pair[who].format(**words) for pair in pairs.values() for who in ("ours", "peer")):
        program, *flags = shlex.split(command)
        if program.endswith(".py"):
            tyro.cli(importlib.import_module(program.removesuffix(".py")).Args, args=flags)
        assert program.endswith(".py") or f"\ndef {program}(" in (TOOLS / "peers.py").read_text()
    assert {row["comparison"] for row in run.read(TOOLS / "results/speed.csv")} <= set(pairs)
    assert 0 < sum("headline" in pair for pair in pairs.values()) <= 10
    assert sum(path.stat().st_size for path in (TOOLS / "results").iterdir()) < 1e6


# ==== table.py, plot.py, speed.py, tune.py ====
def test_means_and_intervals():
    """Two values: their resampled mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4. Many: nearly the normal one.
    Curves are drawn where all seeds have a value."""
    assert table.interval(np.array([0.0, 1.0])).tolist() == [0, 1]
    assert np.isnan(table.interval(np.array([3.0]))).all()
    values = np.random.default_rng(1).normal(10, 2, (400, 3))
    error = 1.96 * values.std(0, ddof=1) / 20
    np.testing.assert_allclose(table.interval(values), [values.mean(0) - error, values.mean(0) + error], atol=0.02)
    seeds = [{"seed": "1", "10": "", "20": "10", "30": "30"}, {"seed": "2", "10": "5", "20": "20", "30": "40"}]
    np.testing.assert_allclose(plot.average(seeds, None), [[20, 30], [15, 35], [10, 30], [20, 40]])
    np.testing.assert_allclose(plot.average(seeds, 20)[1], [0.5, 1])


def test_tables(done):
    """Between the marks; a second time, the same; all else as it was."""
    for name in ("RESULTS.md", "README.md"):
        Path(name).write_text(MARKS.format("table.py"))
    for _ in range(2):
        table.main(Path("table.toml"), Path("results"), Path("RESULTS.md"), Path("README.md"))
        text, readme = Path("RESULTS.md").read_text(), Path("README.md").read_text()
        assert all(x.startswith("# A\n") and x.endswith("B\n") and "old" not in x for x in (text, readme))
    walk, pole = rows("walk.ppo"), rows("pole.reinforce_jax")
    low, high = sorted(float(row["return"]) for row in walk)
    margins = [float(row["eval_mean"]) - float(row["eval_std"]) for row in pole]
    expected = [
        "\n## walk\n\nTiny walks. Settings: To be fast.\n",
        walk[0]["command"],
        pole[0]["command"],
        "python 3;\nor with",
    ]
    expected += [f"| `ppo.py` | 2 | {(low + high) / 2:.1f} [{low:.1f}, {high:.1f}] |", "2 of 2 reached 15, at step "]
    expected += [f"success {50 * sum(float(row['success']) for row in walk):.1f} [", ", 0 fell below 1; "]
    expected += [f"mean - std >= 5 on {sum(m >= 5 for m in margins)} of 2, lowest {min(margins):.1f}"]
    assert [x for x in expected if x not in text] == []
    mean = np.mean([float(row["eval_mean"]) for row in pole])
    assert re.search(rf"\| CartPole-v1 \| 3,000 \| evaluation \|  \| {mean:.1f} \[.*\| 12 \(a stick\) \| 2 \|", readme)
    assert "PointTarget" not in readme
    e = run.Experiment("lander", "reinforce", flags="--total-timesteps 1000 --target-return 200", seeds=3)
    found = [{"steps": steps, "episodes": n} for steps, n in {"999": "70", "1003": "9", "400": "30"}.items()]
    assert table.notes(e, found) == "2 of 3 reached 200, after 30, 70 episodes"


def test_figures(done):
    for what in ("curves walk pole", "curves pole --share-above 15", "moving-average pole", "distance walk"):
        words = f"{what} --out a.png --results results --table table.toml".split()
        plot.main(tyro.cli(plot.Args, args=words))
        picture = plot.plt.imread("a.png")
        assert picture.shape[0] > 300 and len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 20


def test_speed_report(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "HERE", tmp_path)
    for name in ("SPEED.md", "README.md"):
        Path(name).write_text(MARKS.format("speed.py"))
    speed.report(TOOLS / "results", ["ppo.py / CleanRL"], Path("README.md"))
    lines = Path("README.md").read_text().splitlines()
    assert lines[5].startswith("| ppo.py / CleanRL | 1 | 14,520 steps/s | 6,772 steps/s | 2.14 [") and len(lines) == 9
    row = run.read(TOOLS / "results/defaults.csv")[0]
    assert f"| {row['command']} | {row['start']} |" in Path("SPEED.md").read_text() and Path("speed.png").exists()


@pytest.mark.slow
def test_speed_measures():
    found = speed.measure("ppo.py --total-timesteps 6144 --eval-episodes 0", 1)
    assert 0 < found["start"] < found["total"] < 120 and 100 < found["speed"] < 1e6 and found["memory"] > 50


@pytest.mark.slow
def test_tune(monkeypatch, capsys):
    """Two trials, then a third one of the same search; the best is told as a command."""
    pytest.importorskip("optuna")
    tune = importlib.import_module("benchmarks.tune")
    for trials in ("2", "3"):
        given = "tune.py reinforce --total-timesteps 1000 --num-envs 2 --seeds 2 --trials"
        monkeypatch.setattr(sys, "argv", [*given.split(), trials])
        tune.main()
    assert len(list(Path("runs").glob("*__reinforce__0__*"))) == 3 and Path("runs/tune.png").exists()
    value, flags = re.search(r"(.*): python reinforce.py (.*)\n$", capsys.readouterr().out).groups()
    assert "--total-timesteps 1000 --num-envs 2 --learning-rate" in flags
    returns = [tune.final_returns("reinforce", flags, seed, 1) for seed in (0, 1)]
    assert float(value) == pytest.approx(np.mean(returns), rel=1e-4)
