"""Short runs of whole scripts: every kind of space, what a run leaves, resuming, wrong input, crashes.

Nothing here depends on how well an agent learns; what is expected follows from counting or from a second run.
"""

import dataclasses
import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPTS = ("reinforce", "vpg_advantage", "ppo", "reinforce_jax", "vpg_advantage_jax", "ppo_jax")
ROOT = Path(__file__).parents[1]
TINY = {"num_envs": 4, "hidden_sizes": (16,), "eval_episodes": 2, "save_every": 2}
BATCHES = TINY | {"total_timesteps": 640, "num_steps": 32, "num_minibatches": 2}  # 5 iterations
SETTINGS = {
    "reinforce": TINY | {"total_timesteps": 600, "max_episode_steps": 50},
    "vpg_advantage": BATCHES,
    "ppo": BATCHES | {"update_epochs": 2},
}
LOSSES = {
    "reinforce": {"policy_loss", "entropy", "grad_norm"},
    "vpg_advantage": {"policy_loss", "entropy", "grad_norm", "value_loss", "explained_variance"},
    "ppo": {"policy_loss", "entropy", "grad_norm", "value_loss", "explained_variance", "approx_kl", "clipfrac"},
}


def each(fast, of=SCRIPTS):
    """A test of each script, with -m slow where it is not `fast`: compiling takes seconds."""
    params = [pytest.param(script, marks=[] if script in fast else [pytest.mark.slow]) for script in of]
    return pytest.mark.parametrize("script", params)


each_script, one_of_each, ppo_first = each(SCRIPTS[:3]), each(["ppo", "ppo_jax"]), each(["ppo"])


def algorithm(script: str) -> str:
    return script.removesuffix("_jax")


def make_args(script: str, **flags):
    """Flags of a run of a second or so."""
    return importlib.import_module(script).Args(**SETTINGS[algorithm(script)] | flags)


def run(script: str, **flags):
    return importlib.import_module(script).train(make_args(script, **flags))


def toy(name: str) -> str:
    return f"tests.toy_envs:{name}-v0"


def python(*words: str, **options) -> subprocess.CompletedProcess:
    """A new Python in the current folder, with the repository's modules."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *map(str, words)], env=environ, capture_output=True, text=True, **options)


def params(agent) -> list[np.ndarray]:
    """Every parameter and statistic of a torch Module or a pytree."""
    if hasattr(agent, "state_dict"):
        return [x.numpy() for x in agent.state_dict().values()]
    return [np.asarray(x) for x in importlib.import_module("jax").tree.leaves(agent)]


def same(a, b) -> bool:
    """Whether two agents are equal to the last bit."""
    return all(np.array_equal(x, y) for x, y in zip(params(a), params(b), strict=True))


def checkpoint(script: str) -> str:
    return "checkpoint.msgpack" if script.endswith("_jax") else "checkpoint.pt"


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every point of a TensorBoard log, by tag."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(point.step, point.value) for point in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


# ==== Environments ====


ENVS = ["Acrobot-v1", "Pendulum-v1", "FrozenLake-v1", "Blackjack-v1"]
ENVS += map(toy, ["DictObs", "TupleObs", "UnequalBox", "UnboundedBox", "HalfBoundedBox", "DiscreteStart"])


@each_script
@pytest.mark.parametrize("env_id", ENVS)
def test_runs_on(script, env_id):
    result = run(script, env_id=env_id)
    assert all(np.isfinite(x).all() for x in params(result.agent))
    total = 640 if algorithm(script) != "reinforce" else 600 + 4 * 50  # the last episodes are played to their ends
    assert len(result.episode_returns) == len(result.episode_steps)
    assert (np.diff(result.episode_steps) >= 0).all()
    assert ((result.episode_steps > 0) & (result.episode_steps <= total)).all()
    assert np.issubdtype(result.episode_steps.dtype, np.integer)
    assert result.eval_returns.shape == (2,) and np.isfinite(result.eval_returns).all()


@each_script
def test_time_limits(script):
    """One where there is none, or in place of another; without any the evaluation still ends, and REINFORCE refuses."""
    assert set(run(script, env_id=toy("NoTimeLimit"), max_episode_steps=7).episode_returns) == {7}
    assert set(run(script, env_id="Pendulum-v1", max_episode_steps=30).episode_steps % 120) == {0}
    if algorithm(script) != "reinforce":
        assert set(run(script, env_id=toy("NoTimeLimit")).eval_returns) == {20}
    else:
        with pytest.raises(ValueError, match="--max-episode-steps"):
            run(script, env_id=toy("NoTimeLimit"), max_episode_steps=None)


# ==== What a run leaves ====


@ppo_first
def test_command_line(script, tmp_path):
    """The script as a program does what `train` does with the same flags, and shows and leaves what it should."""
    flags = SETTINGS[algorithm(script)]
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", *np.ravel(value))]
    process = python(ROOT / f"{script}.py", *words)
    assert process.returncode == 0, process.stderr
    line, path = process.stdout.splitlines()
    assert re.fullmatch(rf"runs/CartPole-v1__{script}__1__[\d.]+", path)
    assert [p.name for p in tmp_path.iterdir()] == ["runs"] and [p.name for p in Path("runs").iterdir()] == [path[5:]]
    names = {p.name for p in Path(path).iterdir()}
    assert {"args.json", checkpoint(script)} < names and len(names) == 3
    saved = json.loads(Path(path, "args.json").read_text())
    assert saved == dataclasses.asdict(make_args(script)) | {"hidden_sizes": [16]}

    expected = run(script)
    returns = expected.eval_returns
    assert line.endswith(f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over 2 episodes")
    assert expected.run_dir != Path(path)
    log = scalars(Path(path))
    wanted = {f"charts/{tag}" for tag in ("episodic_return", "episodic_length", "SPS", "learning_rate")}
    wanted |= {f"losses/{tag}" for tag in LOSSES[algorithm(script)]} | {"eval/episodic_return"}
    assert log.keys() == wanted
    assert all(np.isfinite(value) for points in log.values() for _, value in points)
    assert [value for _, value in log["eval/episodic_return"]] == [pytest.approx(returns.mean())]


@each_script
def test_one_seed_one_result(script):
    """Whatever is saved, evaluated or logged; another seed is another run."""
    first, again, other = run(script), run(script, save_every=0, eval_episodes=0), run(script, seed=2)
    assert same(first.agent, again.agent) and not same(first.agent, other.agent)
    for field in ("episode_returns", "episode_steps"):
        assert np.array_equal(getattr(first, field), getattr(again, field))
    assert len({result.run_dir for result in (first, again, other)}) == 3


@ppo_first
def test_async_envs_change_nothing(script):
    """In a process of its own: one in which JAX runs threads had better not fork."""
    backend = ', env_backend="gymnasium"' if script.endswith("_jax") else ""
    code = f"""
import numpy as np
from tests.test_runs import params, run
if __name__ == "__main__":
    a, b = (params(run("{script}", async_envs=x{backend}).agent) for x in (False, True))
    assert all(np.array_equal(x, y) for x, y in zip(a, b))
"""
    Path("program.py").write_text(code)
    process = python("program.py")
    assert process.returncode == 0, process.stderr


@one_of_each
def test_capture_video(script, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    videos = list((run(script, capture_video=True, total_timesteps=128).run_dir / "videos").glob("*.mp4"))
    assert videos and all(b"ftyp" in video.read_bytes()[:12] for video in videos)
    shutil.rmtree("runs")
    with pytest.raises(Exception):  # noqa: B017, which one is Gymnasium's business
        run(script, env_id=toy("DictObs"), capture_video=True)
    assert not list(Path().rglob("checkpoint*"))  # refused before training


@one_of_each
def test_cuda_without_a_gpu(script, capsys):
    if importlib.import_module("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    run(script, cuda=True)
    assert "--cuda: no GPU found" in capsys.readouterr().out


@one_of_each
def test_not_finite(script):
    """A reward that is NaN ends the run, which names the iteration and the folder of the last good checkpoint."""
    with pytest.raises(FloatingPointError, match=r"iteration \d+.*the last checkpoint is in runs/"):
        run(script, env_id=toy("NanReward"), num_envs=1)


# ==== Resuming ====


@each_script
def test_resume(script):
    """From the checkpoint in the middle of a run: the same folder and log; where the environments are in the checkpoint
    or every iteration begins new episodes, bit for bit the agent of the uninterrupted run."""
    module = importlib.import_module(script)
    whole, half = (run(script, anneal_lr=False, total_timesteps=steps) for steps in (640, 300))
    result = module.train(dataclasses.replace(module.saved_args(half.run_dir), total_timesteps=640))
    assert result.run_dir == half.run_dir and len(list(Path("runs").iterdir())) == 2
    assert len(result.episode_steps) >= len(half.episode_steps)
    assert np.array_equal(result.episode_returns[: len(half.episode_returns)], half.episode_returns)
    if algorithm(script) == "reinforce" or script.endswith("_jax"):
        assert same(result.agent, whole.agent)
        assert np.array_equal(result.episode_returns, whole.episode_returns)
    steps = [step for step, _ in scalars(half.run_dir)["losses/policy_loss"]]
    assert steps == sorted(set(steps)) and steps[-1] >= 640


@ppo_first
def test_resume_of_a_finished_run(script, tmp_path):
    """By the command line with the flags of the run: it is only evaluated, with other episodes where that is asked for.
    So is a run that --target-return stopped."""
    first = run(script, learning_rate=1e-3, target_return=1.0, return_window=10)
    assert first.episode_steps[-1] < 640 and len(first.episode_returns) >= 10
    files = {p.name: p.read_bytes() for p in first.run_dir.iterdir() if not p.name.startswith("events")}
    process = python(ROOT / f"{script}.py", "--resume", first.run_dir, "--eval-episodes", 3)
    assert process.returncode == 0, process.stderr
    assert "over 3 episodes" in process.stdout and process.stdout.endswith(f"{first.run_dir}\n")
    assert files == {p.name: p.read_bytes() for p in first.run_dir.iterdir() if not p.name.startswith("events")}
    module = importlib.import_module(script)
    again = module.train(module.saved_args(first.run_dir))
    assert np.array_equal(again.eval_returns, first.eval_returns) and same(again.agent, first.agent)


@each_script
def test_another_batch(script):
    """Progress is counted in environment steps: --num-steps, or REINFORCE's --num-envs, may change."""
    half, module = run(script, total_timesteps=300), importlib.import_module(script)
    change = {"num_envs": 2} if algorithm(script) == "reinforce" else {"num_steps": 16}
    result = module.train(dataclasses.replace(module.saved_args(half.run_dir), total_timesteps=704, **change))
    steps = [step for step, _ in scalars(half.run_dir)["losses/policy_loss"]]
    assert result.episode_steps[-1] <= steps[-1]
    # 256 in batches of 128, then 448 in batches of 64; REINFORCE plays its last episodes to their ends
    assert 704 <= steps[-1] <= 704 + (2 * 50 if algorithm(script) == "reinforce" else 0)


@pytest.mark.parametrize("script", ["ppo", "ppo_jax"])
def test_other_sizes(script):
    """A checkpoint of other networks is refused."""
    half = run(script, total_timesteps=300)
    with pytest.raises((ValueError, RuntimeError)):
        run(script, resume=half.run_dir, hidden_sizes=(8,))


KILLED = """
import os, signal
from pathlib import Path
from tqdm import tqdm
import {script} as module
from tests.test_runs import make_args
owner, name, last = {{"training": (tqdm, "update", 4), "writing": (Path, "replace", 2)}}["{moment}"]
function, calls = getattr(owner, name), []
def killed(*args):
    calls.append(args)
    if len(calls) == last:
        if owner is Path:
            os.truncate(args[0], args[0].stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)
setattr(owner, name, killed)
module.train(make_args("{script}", total_timesteps=2176))  # 17 iterations, which JAX has to take one by one
"""


@one_of_each
@pytest.mark.parametrize("moment", ["training", "writing"])
def test_kill(script, moment):
    """`kill -9` in the fourth iteration, or with half of the second checkpoint written: the first is whole, and from it
    the run goes on."""
    process = python("-c", KILLED.format(script=script, moment=moment))
    assert process.returncode == -9, process.stderr
    (run_dir,) = Path("runs").iterdir()
    module = importlib.import_module(script)
    result = module.train(module.saved_args(run_dir))
    assert result.run_dir == run_dir and 2176 - 500 <= result.episode_steps[-1] <= 2176 + 200


class Malice:
    def __reduce__(self):
        return os.mkdir, ("malice",)


@one_of_each
def test_a_checkpoint_runs_no_code(script):
    Path(checkpoint(script)).write_bytes(pickle.dumps(Malice()))
    with pytest.raises(Exception, match=r"weights_only|msgpack|unpack|extra|Unpack"):
        run(script, resume=Path())
    assert not Path("malice").exists()


# ==== Wrong input ====


WRONG = [
    ("--num-envs 0", "--num-envs 0: must lie in [1, inf]"),
    ("--num-steps -1", "--num-steps -1"),
    ("--num-minibatches 3 --num-steps 128", "--num-minibatches 3: must divide the batch of 1024"),
    ("--total-timesteps 100 --num-steps 128", "--total-timesteps 100: less than one batch of 1024"),
    ("--gamma 1.01", "--gamma 1.01: must lie in [0, 1]"),
    ("--gae-lambda nan", "--gae-lambda nan"),
    ("--learning-rate -1e-3", "--learning-rate -0.001"),
    ("--max-episode-steps 0", "--max-episode-steps 0"),
    ("--resume nowhere", "--resume nowhere: no checkpoint"),
    ("--env-id Cartpole-v1", "--env-id Cartpole-v1"),
    ("--env-id no_such_module:CartPole-v1", "--env-id no_such_module:CartPole-v1"),
    ("--activation sigmoid", "--activation"),
]


@pytest.mark.parametrize("script", ["ppo", "ppo_jax"])
@pytest.mark.parametrize(("words", "message"), WRONG)
def test_wrong_input(script, words, message, capsys):
    """A message that names the flag, no traceback, exit status 2, before anything is written."""
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(importlib.import_module(script).Args, args=words.split())
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert message.replace(" ", "") in re.sub(r"[\s│]", "", out + err)  # a box, whose lines are broken
    assert not Path("runs").exists()


@each_script
def test_wrong_space(script):
    """A space that the networks are not for: a ValueError that names it, and no folder."""
    with pytest.raises(ValueError, match=r"--env-id.*MultiDiscrete"):
        run(script, env_id=toy("MultiDiscreteAction"))
    assert not Path("runs").exists()


# ==== Alone ====


@pytest.mark.parametrize("scripts", [SCRIPTS[:3], SCRIPTS[3:]])
def test_import_has_no_effect(scripts, tmp_path):
    """It starts no backend, sets no variable, prints and writes nothing."""
    code = f"""
import os, sys
before = dict(os.environ)
import {", ".join(scripts)}
for name in os.environ:  # some libraries set their own
    assert os.environ[name] == before.get(name) or not name.startswith(("JAX", "XLA", "OMP", "CUDA"))
if "jax" in sys.modules:
    from jax._src import xla_bridge
    assert not xla_bridge._backends and "gymnax" not in sys.modules
else:
    assert not __import__("torch").cuda.is_initialized()
"""
    process = python("-c", code)
    assert process.returncode == 0 and not process.stdout + process.stderr, process.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["ppo", "ppo_jax"])
def test_readme_snippets(script, monkeypatch):
    """The Python of the README, with a tiny run in place of its flags and a real folder in place of runs/..."""
    result = run(script)
    module, names = importlib.import_module(script), {}
    real_args = module.Args
    text = (ROOT / "README.md").read_text()
    (code,) = [x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"import {script}\n" in x]
    monkeypatch.setattr(module, "Args", lambda **flags: real_args(**flags | SETTINGS[algorithm(script)]))
    exec(code.replace("runs/...", str(result.run_dir)), names)
    assert names["action"] in (0, 1)
