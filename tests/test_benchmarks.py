"""The tools of benchmarks/, on tiny experiments, and their numbers against other ways to get them."""

import importlib
import os
import re
import shlex
import shutil
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

from benchmarks import peers, plot, run, speed, table

TOOLS = Path(run.__file__).parent
TARGET = "--env-id envs.point_target:PointTarget-v0"
WALK = run.Experiment("walk", "ppo", f"{TARGET} --total-timesteps 2560 --num-envs 4 --eval-episodes 12", 2, keep="play")
POLE = run.Experiment("p", "reinforce_jax", "--total-timesteps 3000", 2, one_program=True, keep="episodes", threshold=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """In it the two experiments were run."""
    path = tmp_path_factory.mktemp("done")
    (path / "results").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for e, seed in ((WALK, 101), (WALK, 100), (POLE, 100)):
            run.store(e, *run.run(e, seed), path)
    return path


# ==== run.py ====
def test_curve_is_what_the_log_says(folder):
    """Mean of the last 100 episodes by a plain loop over the log of the run folder."""
    _, row = run.read(folder / "results/walk.ppo.csv")
    (run_dir,) = folder.glob("runs/*__ppo__101__*")
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload().Scalars("charts/episodic_return")
    points = {int(name): x for name, x in row.items() if name.isdigit()}
    assert len(points) == 50 and max(points) == 2560 and row["seed"] == "101"
    for step, x in points.items():
        until = [event.value for event in log if event.step <= step][-100:]
        assert float(x) == pytest.approx(np.mean(until), rel=1e-4) if until else x == ""
    assert float(row["return"]) == pytest.approx(np.mean([event.value for event in log][-100:]), rel=1e-5)
    assert (int(row["episodes"]), int(row["steps"])) == (len(log), 2560)


def test_evaluation(folder):
    """`play` plays the evaluation's very episodes, and its last rewards are counted."""
    row = run.read(folder / "results/walk.ppo.csv")[0]
    rewards = np.loadtxt(folder / "results/walk.ppo.play.csv", delimiter=",")
    assert rewards.shape == (12, 20)
    expected = {"eval_mean": rewards.sum(1).mean(), "eval_std": rewards.sum(1).std()}
    expected |= {"last_reward": rewards[:, -1].mean(), "success": np.mean(rewards[:, -1] == 0)}
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4)


def test_many_seeds_in_one_program(folder):
    """A row for each agent, with one command; the episodes are of the first one."""
    first, second = run.read(folder / "results/p.reinforce_jax.csv")
    steps, returns = np.loadtxt(folder / "results/p.reinforce_jax.episodes.csv", delimiter=",").T
    assert (first["seed"], second["seed"]) == ("100", "101") and first["return"] != second["return"]
    assert first["command"] == second["command"] and first["command"].endswith(" --seed 100 --num-seeds 2")
    expected = run.summary(returns, steps, np.zeros(0), 9)
    for name in ("steps", "episodes", "return", "reached", "lowest_after"):
        assert first[name] == str(expected[name])


def test_what_is_finished_is_skipped(monkeypatch):
    monkeypatch.setattr(run, "in_process", None)  # or all runs fail
    assert run.main(run.Args(words=("acrobot-all",), folder=TOOLS)) == 0


def test_rows_of_other_commands_go(tmp_path):
    e, file = run.Experiment("a", "ppo", "--gamma 1", 3), tmp_path / "results/a.ppo.csv"
    file.parent.mkdir()
    run.write(file, [{"seed": 102, "command": e.command(102)}, {"seed": 101, "command": "python ppo.py"}])
    run.store(e, [{"seed": 100, "command": e.command(100)}], np.zeros(0), tmp_path)
    assert [row["seed"] for row in run.read(file)] == ["100", "102"]


def test_a_run_that_fails_is_told():
    e = run.Experiment("a", "ppo", "--num-envs 0", 1)
    assert isinstance(run.attempt(run.run, e, 100)[2], SystemExit)


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
    flags = f"{TARGET} --total-timesteps 40960 --eval-episodes 0"
    Path("experiments.toml").write_text(f'[a]\nscripts = ["ppo"]\nseeds = 3\nflags = "{flags}"\n')
    return subprocess.Popen([sys.executable, TOOLS / "run.py", "--folder", ".", *arguments], env=os.environ | env)


def seeds():
    return [row["seed"] for row in run.read(Path("results/a.ppo.csv"))]


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
    assert seeds() == ["100"]
    time.sleep(2)
    assert not orphan.exists()
    assert start().wait(300) == 0
    assert seeds() == ["100", "101", "102"]
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
    assert seeds() == ["100", "101", "102"]


def parse(command):
    script, *flags = shlex.split(command)
    return tyro.cli(importlib.import_module(script.removesuffix(".py").replace("/", ".")).Args, args=flags)


@pytest.mark.parametrize("e", run.experiments(TOOLS), ids=lambda e: e.name)
def test_experiments(e):
    """The command parses, and the rows in results/ are all of it."""
    if "brax" in e.flags:
        pytest.importorskip("brax")
    assert parse(e.command(100).removeprefix("python ")) and e.why
    stored = run.read(TOOLS / f"results/{e.name}.csv")
    assert run.finished(e, TOOLS) == stored and len(stored) in (0, e.seeds)


def test_comparisons():
    pairs = tomllib.loads((TOOLS / "comparisons.toml").read_text())
    words = pairs.pop("flags") | dict.fromkeys(("cleanrl", "leanrl", "purejaxrl"), ".")
    for command in (pair[who].format(**words) for pair in pairs.values() for who in ("ours", "peer")):
        program = command.split()[0]
        assert parse(command) if program.endswith(".py") else hasattr(peers, program)
    assert {row["comparison"] for row in run.read(TOOLS / "results/speed.csv")} <= set(pairs)


# ==== table.py, plot.py, speed.py, tune.py ====
def test_means_and_intervals():
    """Two values: their resampled mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4. Many: nearly the normal one."""
    assert table.interval(np.array([0.0, 1.0])).tolist() == [0, 1]
    assert [table.with_interval(np.array(x)) for x in ([], [3.0], [0, 1.0])] == ["", "3.0", "0.5 [0.0, 1.0]"]
    values = np.random.default_rng(1).normal(10, 2, (400, 3))
    error = 1.96 * values.std(0, ddof=1) / 20
    np.testing.assert_allclose(table.interval(values), [values.mean(0) - error, values.mean(0) + error], atol=0.02)


def test_curves_are_drawn_where_all_seeds_have_a_value():
    seeds = [{"seed": "1", "10": "", "20": "10", "30": "30"}, {"seed": "2", "10": "5", "20": "20", "30": "40"}]
    np.testing.assert_allclose(plot.average(seeds, None), [[20, 30], [15, 35], [10, 30], [20, 40]])
    np.testing.assert_allclose(plot.average(seeds, 20)[1], [0.5, 1])


def test_table_is_written_between_the_marks():
    text = "# A\n<!-- written by benchmarks/x.py -->\n{}<!-- until here -->\nB\n<!-- until here -->\n"
    Path("a.md").write_text(text.format("old\n"))
    for _ in range(2):
        table.put_into(Path("a.md"), "x.py", "new\n")
        assert Path("a.md").read_text() == text.format("\nnew\n\n")


def test_reports_are_the_committed_ones(monkeypatch, tmp_path):
    folder, readme = shutil.copytree(TOOLS, tmp_path / "benchmarks"), tmp_path / "README.md"
    shutil.copy(TOOLS.parent / "README.md", readme)
    table.main(folder, readme)
    monkeypatch.setattr(speed, "HERE", folder)
    speed.main(speed.Args(words=("nothing",), readme=readme))  # measures nothing
    for name in ("README.md", "benchmarks/RESULTS.md", "benchmarks/SPEED.md"):
        assert (tmp_path / name).read_text() == (TOOLS.parent / name).read_text()


def test_figures():
    for what in ("curves pendulum", "distance point-target-ppo-4e-3", "moving-average lunarlander-reinforce-long"):
        kind, source = what.split()
        plot.main(kind, [source], Path("a.png"))
        picture = plot.plt.imread("a.png")
        assert picture.shape[0] > 300 and len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 20


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
    means = [tune.final_returns("reinforce", flags, seed, 1)[0] for seed in (0, 1)]
    assert float(value) == pytest.approx(np.mean(means), rel=1e-4)
