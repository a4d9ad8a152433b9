"""The tools of benchmarks/, end to end on tiny experiments, and their numbers against other ways to get them."""

import csv
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import plot, run, speed, table

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "benchmarks"
TABLE = '''
[walk]
shows = "Tiny walks."
why = "To be fast."
scripts = ["ppo"]
flags = """--env-id envs.point_target:PointTarget-v0 --total-timesteps 2560 --num-envs 4 --eval-episodes 12 \\
--hidden-sizes 8"""
seeds = 2
keep = "play"

[pole]
published = "training 12 (a stick)"
scripts = ["reinforce_jax"]
flags = "--env-id CartPole-v1 --total-timesteps 3000 --eval-episodes 3 --hidden-sizes 8"
seeds = 2
one_program = true
threshold = 15
collapse = 1
pass_mark = 5
keep = "episodes"
'''


def tool(name, *arguments, check=True):
    command = [sys.executable, TOOLS / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, check=check, capture_output=True, text=True)


def rows(name):
    with Path("results", f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def logged(run_dir, tag):
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return log.Scalars(tag)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder in which the experiments of TABLE were run."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "table.toml").write_text(TABLE)
    command = [sys.executable, TOOLS / "run.py", "--table", "table.toml", "--out", "results"]
    subprocess.run(command, check=True, cwd=folder)
    return folder


def run_dir(script, seed):
    (path,) = Path("runs").glob(f"*__{script}__{seed}__*")
    return path


# ======================================================= run.py =======================================================


def test_curve_is_what_the_log_says(done, monkeypatch):
    """Mean of the last 100 episodes by a plain loop over the log of the run folder, and the time of that step."""
    monkeypatch.chdir(done)
    for seed in (100, 101):
        events = logged(run_dir("ppo", seed), "charts/episodic_return")
        points = [row for row in rows("walk.ppo.curve") if row["seed"] == str(seed)]
        assert 50 < len(points) <= 100 and int(points[-1]["step"]) == 2560
        for row in points:
            until = [e.value for e in events if e.step <= int(row["step"])]
            assert int(row["episodes"]) == len(until)
            assert float(row["return"]) == pytest.approx(sum(until[-100:]) / len(until[-100:]), rel=1e-4)
        clock = logged(run_dir("ppo", seed), "charts/SPS")
        took = clock[-1].wall_time - clock[0].wall_time  # of all iterations but the first
        assert took <= float(points[-1]["seconds"]) + 0.1
        (summary,) = (row for row in rows("walk.ppo") if row["seed"] == str(seed))
        assert float(summary["return"]) == pytest.approx(np.mean([e.value for e in events][-100:]), rel=1e-5)
        assert (int(summary["episodes"]), int(summary["steps"])) == (len(events), 2560)


def test_evaluation(done, monkeypatch):
    """`play` plays the evaluation's very episodes, and its last rewards are counted."""
    monkeypatch.chdir(done)
    rewards = np.array([float(row["reward"]) for row in rows("walk.ppo.play")]).reshape(12, 20)
    summary = rows("walk.ppo")[0]
    assert float(summary["eval_mean"]) == pytest.approx(rewards.sum(1).mean(), rel=1e-4)
    assert float(summary["eval_std"]) == pytest.approx(rewards.sum(1).std(), rel=1e-4)
    assert float(summary["last_reward"]) == pytest.approx(rewards[:, -1].mean(), rel=1e-4)
    assert float(summary["success"]) == pytest.approx(np.mean(rewards[:, -1] == 0), rel=1e-4)
    assert {row["seed"] for row in rows("walk.ppo.play")} == {"100"}


def test_many_seeds_in_one_program(done, monkeypatch):
    """A row per agent, with the means that the log has of them; all from one run folder."""
    monkeypatch.chdir(done)
    summary = rows("pole.reinforce_jax")
    final = logged(run_dir("reinforce_jax", 100), "charts/final_return_of_seed")
    assert [int(row["seed"]) for row in summary] == [e.step for e in final] == [100, 101]
    np.testing.assert_allclose([float(row["return"]) for row in summary], [e.value for e in final], rtol=1e-4)
    assert summary[0]["command"] == summary[1]["command"]
    assert summary[0]["command"].endswith("--hidden-sizes 8 --seed 100 --num-seeds 2")
    kept = rows("pole.reinforce_jax.episodes")
    returns = np.array([float(row["return"]) for row in kept])
    assert len(returns) == int(summary[0]["episodes"]) and {row["seed"] for row in kept} == {"100"}
    assert returns[-100:].mean() == pytest.approx(float(summary[0]["return"]), rel=1e-4)
    means = [returns[i - 100 : i].mean() for i in range(100, len(returns) + 1)]
    first = next(i for i, mean in enumerate(means) if mean >= 15)
    assert summary[0]["reached"] == kept[first + 99]["step"]
    assert float(summary[0]["lowest_after"]) == pytest.approx(min(means[first:]), rel=1e-4)


def test_what_is_finished_is_skipped(done, monkeypatch):
    monkeypatch.chdir(done)
    before = {path: path.read_bytes() for path in Path("results").iterdir()}
    tool("run", "--table", "table.toml", "--out", "results")
    assert {path: path.read_bytes() for path in Path("results").iterdir()} == before
    assert len(list(Path("runs").iterdir())) == 3


def test_another_command_is_not_finished(done, monkeypatch):
    monkeypatch.chdir(done)
    (walk, _) = run.experiments(Path("table.toml"))
    assert run.finished(walk, Path("results")) == {100, 101}
    other = run.Experiment(**{**walk.__dict__, "flags": walk.flags + " --gamma 0.5"})
    assert run.finished(other, Path("results")) == set()


def test_store_drops_what_is_not_finished():
    """Rows of another command go, also those of a curve whose summary never came; others stay, by seed."""
    e, out = run.Experiment("a", "ppo", "--gamma 1", 4), Path()
    curve = [{"seed": seed, "return": 5} for seed in (100, 100, 102, 103)]
    summary = [{"seed": 100, "command": e.command(100)}, {"seed": 102, "command": "python ppo.py"}]
    run.write(Path("a.ppo.curve.csv"), curve)
    run.write(Path("a.ppo.csv"), summary)
    new = [{"seed": 101, "command": e.command(101)}]
    run.store(e, {"": new, ".curve": [{"seed": 101, "return": 6}]}, out)
    assert [row["seed"] for row in run.read(Path("a.ppo.csv"))] == ["100", "101"]
    assert [row["seed"] for row in run.read(Path("a.ppo.curve.csv"))] == ["100", "100", "101"]
    assert run.finished(e, out) == {100, 101}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interruption(number):
    """Killed in the second of two runs: that one is run again, the first is not."""
    flags = "--env-id envs.point_target:PointTarget-v0 --total-timesteps 20480 --eval-episodes 0 --hidden-sizes 8"
    Path("table.toml").write_text(f'[a]\nscripts = ["ppo"]\nflags = "{flags}"\nseeds = 2')
    command = [sys.executable, TOOLS / "run.py", "--table", "table.toml", "--out", "results", "--jobs", "1"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(Path("runs").glob("*__101__*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL), stderr
    assert [row["seed"] for row in rows("a.ppo")] == ["100"]
    first = Path("results", "a.ppo.csv").read_text()
    if number == signal.SIGTERM:
        with suppress(KeyError):  # told to stop before its first iteration was over
            assert logged(run_dir("ppo", 101), "charts/SPS")[-1].step < 20480  # the run was told to stop, too
    tool("run", "--table", "table.toml", "--out", "results")
    assert Path("results", "a.ppo.csv").read_text().startswith(first)
    assert [row["seed"] for row in rows("a.ppo")] == ["100", "101"]
    points = rows("a.ppo.curve")
    assert len({(row["seed"], row["step"]) for row in points}) == len(points)
    assert [len(list(Path("runs").glob(f"*__{seed}__*"))) for seed in (100, 101)] == [1, 2]


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other():
    Path("table.toml").write_text("""
[bad]
scripts = ["ppo"]
flags = "--env-id Nothing-v0"
seeds = 1
[good]
scripts = ["ppo"]
flags = "--total-timesteps 512 --num-envs 4 --eval-episodes 0 --hidden-sizes 8"
seeds = 1
""")
    process = tool("run", "--table", "table.toml", "--out", "results", check=False)
    assert process.returncode == 1 and "bad.ppo, seed 100: ValueError: --env-id Nothing-v0" in process.stderr
    assert len(rows("good.ppo")) == 1 and not Path("results", "bad.ppo.csv").exists()


def test_rolling_mean():
    returns = np.arange(250.0)
    mean = run.rolling(returns)
    assert len(mean) == 251 and mean[1] == 0 and mean[4] == 1.5
    assert mean[100] == 49.5 and mean[101] == 50.5 and mean[250] == 199.5


def test_curve_by_hand():
    """Ten points up to 1000; two episodes at steps 250 and 400; the run stopped at 500, half a second per 100 steps."""
    clock = np.array([[0, 500], [0, 2.5]])
    rows = run.curve(np.array([4.0, 8.0]), np.array([250, 400]), clock, 1000)
    assert [row["step"] for row in rows] == list(range(250, 501, 10))
    assert rows[0] == {"step": 250, "episodes": 1, "seconds": "1.2", "return": "4"}
    assert rows[15] == {"step": 400, "episodes": 2, "seconds": "2.0", "return": "6"}


def test_threshold_by_hand():
    """100 episodes of 0, 100 of 10, 100 of 4: the mean reaches 5 with episode 150, and ends at 4."""
    returns = np.repeat([0.0, 10.0, 4.0], 100)
    arguments = (returns, np.arange(1, 301), np.zeros((2, 1)), np.zeros(0))
    row = run.summary(*arguments, 5)
    assert (row["reached"], row["lowest_after"], row["return"], row["eval_mean"]) == (150, "4", "4", "")
    assert run.summary(*arguments, 10.5)["reached"] == run.summary(*arguments, None)["reached"] == ""


EXPERIMENTS = run.experiments(TOOLS / "experiments.toml")


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=[e.name for e in EXPERIMENTS])
def test_experiments_have_valid_flags(experiment):
    module = importlib.import_module(experiment.script)
    args = tyro.cli(module.Args, args=shlex.split(experiment.command(100))[2:])
    module.check_args(args)
    env_module, _, env_id = args.env_id.rpartition(":")
    if env_module:
        importlib.import_module(env_module)
    assert env_id in gym.registry
    assert (experiment.shows or experiment.published) and experiment.why
    assert experiment.keep != "play" or (args.eval_episodes and not experiment.script.endswith("_jax"))
    assert args.num_seeds == experiment.seeds if experiment.seeds_per_process > 1 else args.seed == 100


# ================================================= table.py and plot.py ===============================================


def test_interval():
    """Two values: their resampled mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4. Many: nearly the normal one."""
    assert table.interval(np.array([0.0, 1.0])) == (0, 1)
    assert table.interval(np.array([3.0, 3.0, 3.0])) == (3, 3)
    assert np.isnan(table.interval(np.array([3.0]))).all()
    values = np.random.default_rng(0).normal(10, 2, 400)
    error = 1.96 * values.std(ddof=1) / 20
    np.testing.assert_allclose(table.interval(values), [values.mean() - error, values.mean() + error], atol=0.02)


def test_results_table(done, monkeypatch):
    monkeypatch.chdir(done)
    table.main(Path("table.toml"), Path("results"), Path("RESULTS.md"))
    text = Path("RESULTS.md").read_text()
    walk, pole = rows("walk.ppo"), rows("pole.reinforce_jax")
    assert "\n## walk\n\nTiny walks. Settings: To be fast.\n" in text
    values = sorted(float(row["return"]) for row in walk)
    assert f"| `ppo.py` | 2 | {np.mean(values):.1f} [{values[0]:.1f}, {values[1]:.1f}] |" in text
    assert walk[0]["command"] in text and pole[0]["command"] in text
    assert f"success {50 * sum(float(row['success']) for row in walk):.1f} [" in text
    told = r"2 of 2 reached 15, at step [\d,]+ \(median\), after that the lowest was \d+, 0 fell below 1"
    assert re.search(told, text)
    margins = [float(row["eval_mean"]) - float(row["eval_std"]) for row in pole]
    assert f"mean - std >= 5 on {sum(m >= 5 for m in margins)} of 2, lowest {min(margins):.1f}" in text
    assert f"python {sys.version.split()[0]}" in text and "cores" in text
    assert "\n## pole\n\nPublished: training 12 (a stick). Settings: \n" in text


def test_note_of_a_target():
    """Only those that stopped before their last step reached it."""
    e = run.Experiment("lander", "reinforce", flags="--total-timesteps 1000 --target-return 200", seeds=3)
    ends = {"999": "70", "1003": "9", "400": "30"}
    rows = [{"steps": steps, "episodes": n, "success": "", "reached": ""} for steps, n in ends.items()]
    assert table.notes(e, rows) == "2 of 3 reached 200, after 30, 70 episodes"


def test_readme_table(done, monkeypatch):
    """What has a published result, between the marks; a second time, the same; all else as it was."""
    monkeypatch.chdir(done)
    begin, end = "# A\n<!-- written by benchmarks/table.py -->\n", "<!-- until here -->\nB\n"
    Path("README.md").write_text(f"{begin}old{end}")
    for _ in range(2):
        table.main(Path("table.toml"), Path("results"), Path("RESULTS.md"), Path("README.md"))
        text = Path("README.md").read_text()
        assert text.startswith(begin) and text.endswith(end) and "old" not in text
        row, command = rows("pole.reinforce_jax")[0]["steps"], rows("pole.reinforce_jax")[0]["command"]
        assert text.count(f"| CartPole-v1, {int(row):,} | `reinforce_jax.py` | ") == 1
        assert text.count("| training 12 (a stick) | 2 |\n") == 1 and "walk" not in text and "ppo.py" not in text
        assert f"\n```\n{command}\n```\n" in text


def test_readme_table_tells_two_experiments_apart():
    """Tables with one environment are named, others not."""
    row = {"steps": "1000", "return": "1", "eval_mean": "2", "command": "python ppo.py"}
    made = [("a", "ppo", "CartPole-v1"), ("b", "ppo_jax", "CartPole-v1"), ("c", "ppo", "Acrobot-v1")]
    made += [("c", "ppo_jax", "Acrobot-v1")]
    made = [run.Experiment(name, script, f"--env-id {env}", 1, published="9") for name, script, env in made]
    cells = [line.split(" | ")[0] for line in table.short([[(e, [row])] for e in made]).splitlines()[2:6]]
    assert cells == [f"| {x}" for x in ("CartPole-v1, 1,000 (a)", "CartPole-v1, 1,000 (b)", *["Acrobot-v1, 1,000"] * 2)]


def test_panels_with_one_title_are_told_apart(tmp_path):
    """Two experiments with one environment show their names as well."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.ppo.csv").write_text("seed,command\n1,python ppo.py --env-id CartPole-v1 --seed 1\n")
    assert plot.titles(["a", "b"], tmp_path) == {"a": "CartPole-v1 (a)", "b": "CartPole-v1 (b)"}
    assert plot.titles(["a", "Acrobot-v1"], tmp_path) == {"a": "CartPole-v1", "Acrobot-v1": "Acrobot-v1"}


def test_average():
    """Two runs, of which one starts later and one stops earlier: drawn where both have a value."""
    a = [{"step": s, "seconds": s / 10, "return": 10} for s in (10, 20, 30)]
    b = [{"step": s, "seconds": s / 5, "return": 20} for s in (20, 30, 40)]
    runs = [plot.Run("", "", points) for points in (a, b)]
    np.testing.assert_allclose(plot.average(runs, "seconds", None), [[3, 4.5], [15, 15], [10, 10], [20, 20]])
    np.testing.assert_allclose(plot.average(runs, "step", 20)[:2], [[20, 30], [0.5, 0.5]])


FIGURES = [
    ["curves", "walk", "pole"],
    ["curves", "walk.ppo", "pole", "--one-panel", "--x", "seconds"],
    ["curves", "pole", "--share-above", "15", "--x", "episodes"],
    ["curves", "RUN"],
    ["moving-average", "pole.reinforce_jax", "RUN"],
    ["distance", "walk"],
]


@pytest.mark.parametrize("arguments", FIGURES, ids=" ".join)
def test_figures(done, monkeypatch, arguments):
    monkeypatch.chdir(done)
    arguments = [str(run_dir("ppo", 100)) if a == "RUN" else a for a in arguments]
    plot.main([*arguments, "--out", "figure.png", "--results", "results"])
    picture = plot.plt.imread("figure.png")
    assert picture.shape[0] > 300 and len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 20
    Path("figure.png").unlink()


def test_run_folder_and_csv_give_the_same_curve(done, monkeypatch):
    monkeypatch.chdir(done)
    (of_folder,) = plot.load(str(run_dir("ppo", 101)), Path("results"))
    of_csv = plot.load("walk", Path("results"))[1]
    titles = plot.titles(["walk", "pole", "Acrobot-v1"], Path("results"))
    assert list(titles.values()) == ["envs.point_target:PointTarget-v0", "CartPole-v1", "Acrobot-v1"]
    assert (of_folder.panel, of_folder.label, of_csv.label) == ("envs.point_target:PointTarget-v0", "ppo", "ppo")
    assert [{k: str(v) for k, v in p.items()} for p in of_folder.points] == [
        {k: v for k, v in p.items() if k != "seed"} for p in of_csv.points
    ]


def test_unknown_source():
    with pytest.raises(SystemExit, match="nothing is no run folder"):
        plot.main(["curves", "nothing", "--out", "figure.png"])


@pytest.mark.slow
def test_programs_take_turns():
    """Each trains on from where its last turn ended; the first one, to warm up, does not count."""
    flags = {"script": "reinforce", "num_envs": 2, "total_timesteps": 10**9}
    turns = speed.in_turns({f"seed {seed}": (speed.ours, flags | {"seed": seed}) for seed in (1, 2)}, 2, seconds=0.2)
    assert [len(of_program) for of_program in turns.values()] == [2, 2]
    assert all(0 < turn["speed"] < 10**6 for of_program in turns.values() for turn in of_program)


@pytest.mark.parametrize("name", ["run", "table", "plot", "speed"])
def test_help(name):
    assert "usage" in tool(name, "--help").stdout
