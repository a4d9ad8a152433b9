"""Short runs of whole scripts: every kind of space, what a run leaves, resuming, wrong input, crashes."""

import dataclasses
import importlib
import json
import os
import pickle
import re
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
    """A test of each script, with -m slow unless it is `fast`: compiling takes seconds."""
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


def readme_code(words: str) -> str:
    """The Python of the README that contains these words."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(code for code in snippets if words in code)


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
    assert len(result.episode_returns) == len(result.episode_steps)
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
def test_command_line(script):
    """The script as a program, its environments in processes of their own, does what `train` does with the same flags,
    and shows and leaves what it should."""
    words = ["--async-envs"]
    for name, value in SETTINGS[algorithm(script)].items():
        words += [f"--{name.replace('_', '-')}", *np.ravel(value)]
    backend = {"env_backend": "gymnasium"} if script.endswith("_jax") else {}
    process = python(ROOT / f"{script}.py", *words, *(["--env-backend", "gymnasium"] if backend else []))
    assert process.returncode == 0, process.stderr
    line, path = process.stdout.splitlines()
    assert re.fullmatch(rf"runs/CartPole-v1__{script}__1__[\d.]+", path)
    names = {p.name for p in Path(path).iterdir()}
    assert {"args.json", checkpoint(script)} < names and len(names) == 3
    saved = json.loads(Path(path, "args.json").read_text())
    flags = dataclasses.asdict(make_args(script, async_envs=True, **backend))
    assert saved == flags | {"hidden_sizes": [16]}

    returns = run(script, **backend).eval_returns
    assert line.endswith(f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over 2 episodes")
    log = scalars(Path(path))
    wanted = {f"charts/{tag}" for tag in ("episodic_return", "episodic_length", "SPS", "learning_rate")}
    wanted |= {f"losses/{tag}" for tag in LOSSES[algorithm(script)]} | {"eval/episodic_return"}
    assert log.keys() == wanted
    assert [value for _, value in log["eval/episodic_return"]] == [pytest.approx(returns.mean())]


@each_script
def test_one_seed_one_result(script):
    """Whatever is saved, evaluated or logged; another seed is another run."""
    first, again, other = run(script), run(script, save_every=0, eval_episodes=0), run(script, seed=2)
    assert same(first.agent, again.agent) and not same(first.agent, other.agent)
    for field in ("episode_returns", "episode_steps"):
        assert np.array_equal(getattr(first, field), getattr(again, field))
    assert len({result.run_dir for result in (first, again, other)}) == 3


@one_of_each
def test_capture_video(script, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    videos = list((run(script, capture_video=True, total_timesteps=128).run_dir / "videos").glob("*.mp4"))
    assert videos and all(b"ftyp" in video.read_bytes()[:12] for video in videos)


@one_of_each
def test_not_finite(script):
    """A reward that is NaN ends the run, which names the iteration and the folder of the last good checkpoint."""
    with pytest.raises(FloatingPointError, match=r"iteration \d+.*last checkpoint in runs/"):
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
    """One that --target-return stopped is only evaluated, by the command line with the flags of the run."""
    first = run(script, target_return=1.0, return_window=10, total_timesteps=2176)
    assert first.episode_steps[-1] < 1000 and len(first.episode_returns) >= 10
    process = python(ROOT / f"{script}.py", "--resume", first.run_dir, "--eval-episodes", 3)
    assert "over 3 episodes" in process.stdout and process.stdout.endswith(f"{first.run_dir}\n"), process.stderr
    module = importlib.import_module(script)
    again = module.train(module.saved_args(first.run_dir))
    assert np.array_equal(again.eval_returns, first.eval_returns) and same(again.agent, first.agent)


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
    """`kill -9` in the fourth iteration, or with half of the second checkpoint written: from the first the run goes on
    to its end."""
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
def test_import_has_no_effect(scripts):
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
    assert not list(Path().iterdir())


@pytest.mark.parametrize("script", ["ppo", "ppo_jax"])
def test_readme_snippets(script, monkeypatch):
    """The Python of the README, with a tiny run in place of its flags and a real folder in place of runs/..."""
    result, module, names = run(script), importlib.import_module(script), {}
    real_args = module.Args
    monkeypatch.setattr(module, "Args", lambda **flags: real_args(**flags | SETTINGS[algorithm(script)]))
    exec(readme_code(f"import {script}\n").replace("runs/...", str(result.run_dir)), names)
    assert names["action"] in (0, 1)
