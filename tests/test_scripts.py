"""Short runs of whole scripts: environments of every kind, the command line, what a run leaves, resuming, signals.

Nothing here depends on how well an agent learns; what is expected follows from counting or from a second run.
"""

import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.probe_envs import ACTIONS, RESETS

SCRIPTS = ("reinforce", "vpg_advantage", "ppo", "reinforce_jax", "vpg_advantage_jax", "ppo_jax")
ROOT = Path(__file__).parents[1]
TINY = {"num_envs": 4, "hidden_sizes": (16,), "eval_episodes": 2, "save_every": 2}
BATCHES = TINY | {"total_timesteps": 640, "num_steps": 32, "num_minibatches": 2}  # 5 iterations
SETTINGS = {
    "reinforce": TINY | {"total_timesteps": 600, "max_episode_steps": 50},
    "vpg_advantage": BATCHES,
    "ppo": BATCHES | {"update_epochs": 2},
}
TAGS = {
    "reinforce": {"policy_loss", "entropy"},
    "vpg_advantage": {"policy_loss", "entropy", "value_loss", "explained_variance"},
    "ppo": {"policy_loss", "entropy", "value_loss", "explained_variance", "approx_kl", "clipfrac"},
}
CHARTS = {"episodic_return", "episodic_length", "SPS", "learning_rate"}

JAX_LATER = [pytest.param(s, marks=[pytest.mark.slow] if s.endswith("_jax") else []) for s in SCRIPTS]
each_script = pytest.mark.parametrize("script", JAX_LATER)  # compiling takes seconds: with -m slow
ppo_first = pytest.mark.parametrize(
    "script", [pytest.param(s, marks=[] if s == "ppo" else [pytest.mark.slow]) for s in SCRIPTS]
)
each_script_now = pytest.mark.parametrize("script", SCRIPTS)


def algorithm(script: str) -> str:
    return script.removesuffix("_jax")


def settings(script: str, **flags) -> dict:
    """Flags of a run of a second or less."""
    return SETTINGS[algorithm(script)] | flags


def run(script: str, **flags):
    module = importlib.import_module(script)
    return module.train(module.Args(**settings(script, **flags)))


def toy(name: str) -> str:
    return f"tests.probe_envs:{name}-v0"


def argv(flags: dict) -> list[str]:
    """The command line that gives these flags."""
    words = []
    for name, value in flags.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{name}" if value else f"--no-{name}"]
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def start(*words: str, **options) -> subprocess.Popen:
    """A new Python in the current folder, with progress bars, one thread and the repository's modules."""
    environ = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], env=environ, stdout=pipe, stderr=pipe, text=True, **options)


def params(agent) -> dict[str, np.ndarray]:
    """Every parameter and statistic of a torch Module or a pytree, by its name."""
    if hasattr(agent, "state_dict"):
        return {name: x.detach().cpu().numpy() for name, x in agent.state_dict().items()}
    tree = importlib.import_module("jax").tree_util
    return {tree.keystr(path): np.asarray(x) for path, x in tree.tree_flatten_with_path(agent)[0]}


def same(a, b) -> bool:
    """Whether two agents are equal to the last bit."""
    a, b = params(a), params(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def checkpoint(script: str, folder: Path) -> Path:
    return folder / ("checkpoint.msgpack" if script.endswith("_jax") else "checkpoint.pt")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every point of a TensorBoard log, by tag."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    log.Reload()
    return {tag: [(point.step, point.value) for point in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file below a folder."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


class Finished(NamedTuple):
    result: NamedTuple
    folder: Path  # of the run
    half: Path  # of the same run, stopped in iteration 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """script -> finished and stopped runs on CartPole, made when first asked for. Not to be written to."""
    runs = {}

    def get(script: str) -> Finished:
        if script not in runs:
            here, module = tmp_path_factory.mktemp(script), importlib.import_module(script)
            write = module.save

            def save_and_stop(*args):
                write(*args)
                signal.raise_signal(signal.SIGTERM)
                patch.setattr(module, "save", write)

            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(here)
                result = run(script)
                patch.setattr(module, "save", save_and_stop)
                with pytest.raises(SystemExit):
                    run(script, exp_name="half")
            time.sleep(1)  # a resumed run's log is read after this one by its name, which begins with the second
            runs[script] = Finished(result, here / result.run_dir, next(here.glob("runs/*__half__*")))
        return runs[script]

    return get


# ==================================================== Environments ====================================================


GYMNASIUM = ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCarContinuous-v0", "FrozenLake-v1", "Blackjack-v1"]
TOYS = ["DictObs", "TupleObs", "UnequalBox", "UnboundedBox", "HalfBoundedBox", "DiscreteStart", "Talks"]


@each_script
@pytest.mark.parametrize("env_id", [*GYMNASIUM, *map(toy, TOYS)])
def test_runs_on(script, env_id):
    # FrozenLake rewards one episode in 70 of a random policy, and without a reward REINFORCE has nothing to learn from
    flags = {"total_timesteps": 3_000} if env_id == "FrozenLake-v1" else {}
    result = run(script, env_id=env_id, **flags)

    agent = params(result.agent)
    assert all(np.isfinite(x).all() for x in agent.values())
    zeros = {name: x for name, x in agent.items() if "bias" in name or "log_std" in name}  # which they were at first
    assert zeros and all(x.any() for x in zeros.values()), "untrained parameters"

    total = flags.get("total_timesteps", settings(script)["total_timesteps"])
    total += 4 * 50 if algorithm(script) == "reinforce" else 0  # the last episodes are played to their ends
    assert len(result.episode_returns) == len(result.episode_steps)
    assert (np.diff(result.episode_steps) >= 0).all()
    assert ((result.episode_steps > 0) & (result.episode_steps <= total)).all()
    assert np.isfinite(result.episode_returns).all()
    assert result.eval_returns.shape == (2,) and np.isfinite(result.eval_returns).all()


@each_script_now
def test_counts_every_episode(script):
    """Four environments, episodes of 20 steps with reward 1 each: return 20 four times at steps 80, 160, ..."""
    result = run(script, env_id=toy("TupleObs"))
    episodes = 600 // 20 + 2 if algorithm(script) == "reinforce" else 640 // 4 // 20 * 4  # 600 is 7.5 iterations of 80
    assert result.episode_returns.tolist() == [20] * episodes
    assert result.episode_steps.tolist() == [80 * (i // 4 + 1) for i in range(episodes)]
    assert result.eval_returns.tolist() == [20, 20]


@each_script
def test_no_time_limit(script):
    flags = {"max_episode_steps": 7} if algorithm(script) == "reinforce" else {}
    result = run(script, env_id=toy("NoTimeLimit"), **flags)
    assert set(result.episode_returns) == set(result.eval_returns) == {flags.get("max_episode_steps", 20)}


@each_script
def test_no_hidden_layer(script):
    """--hidden-sizes without a number: a linear policy."""
    assert np.isfinite(run(script, hidden_sizes=(), eval_episodes=1).eval_returns).all()


@each_script
@pytest.mark.parametrize(
    ("name", "bounds", "middle", "share"),
    # An untrained Gaussian (mean 0, deviation 1) sees two bounds as -1 and 1 and passes each in 15.9 % of the draws;
    # where one bound is 0 it passes that in half of them.
    [
        ("UnequalBox", [(-2, 1), (0, 10)], [-0.5, 5], 0.159),
        ("HalfBoundedBox", [(0, np.inf)], [0], 0.5),
        ("UnboundedBox", [(-np.inf, np.inf)], [0], 0),
    ],
)
def test_box_actions(script, name, bounds, middle, share):
    ACTIONS[f"{name}-v0"].clear()
    run(script, env_id=toy(name), learning_rate=1e-9, eval_episodes=0)
    actions = np.array(ACTIONS[f"{name}-v0"])
    assert len(actions) >= 600
    for x, (low, high), m in zip(actions.T, bounds, middle, strict=True):
        for bound in (low, high):
            expected = share if np.isfinite(bound) else 0
            error = 4 * np.sqrt(expected * (1 - expected) / len(x))  # four standard errors
            assert abs((x == bound).mean() - expected) <= error
        # the median's standard error is 1.25 / sqrt(600) = 0.05 of half the range, or of the deviation
        assert abs(np.median(x) - m) < 0.2 * ((high - low) / 2 if np.isfinite(high) else 1)
        assert np.isfinite(high) or x.max() > 2  # no bound, no clipping


@each_script
def test_discrete_actions_start_where_the_space_does(script):
    ACTIONS["DiscreteStart-v0"].clear()
    run(script, env_id=toy("DiscreteStart"))
    assert set(map(int, ACTIONS["DiscreteStart-v0"])) == {3, 4, 5}


@each_script
@pytest.mark.parametrize(("name", "flags"), [("DictObs", {}), ("OneStepToy", {"num_envs": 1, "total_timesteps": 64})])
def test_no_two_resets_share_a_seed(script, name, flags):
    """Neither environments side by side, nor iterations, nor training and evaluation. Other seeds, other starts."""
    RESETS[f"{name}-v0"].clear()
    run(script, env_id=toy(name), **flags)
    seeds = [seed for seed, _ in RESETS[f"{name}-v0"]]
    assert len(seeds) >= flags.get("num_envs", 4) + 2
    assert len(set(seeds)) == len(seeds)
    first = {repr(obs) for _, obs in RESETS[f"{name}-v0"]}
    assert len(first) == len(seeds)
    RESETS[f"{name}-v0"].clear()
    run(script, env_id=toy(name), seed=2, **flags)
    assert not {seed for seed, _ in RESETS[f"{name}-v0"]} & set(seeds)


@each_script
def test_faulty_environment(script):
    """What an environment raises comes out with its place and cause, and the signal handlers are put back."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for fault in ("reset", "step"):
        with pytest.raises(gym.error.Error, match=f"environment 0, .*RuntimeError: fault in {fault}") as raised:
            run(script, env_id=toy(f"{fault.title()}Fault"))
        assert "RuntimeError" in repr(raised.value.__cause__)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# ================================================= Seeds, flags, import ===============================================


@each_script
def test_one_seed_one_result(script, finished):
    first, again, other = finished(script).result, run(script), run(script, seed=2)
    assert same(first.agent, again.agent)
    for field in ("episode_returns", "episode_steps", "eval_returns"):
        assert np.array_equal(getattr(first, field), getattr(again, field))
    assert not same(first.agent, other.agent)
    assert again.run_dir != other.run_dir


@each_script
def test_one_seed_for_global_generators(script):
    """Environments that draw from `random` and numpy.random are seeded too, each with a seed of its own."""
    first, again = (run(script, env_id=toy("GlobalDice"), total_timesteps=128, eval_episodes=1) for _ in range(2))
    assert same(first.agent, again.agent)
    module = importlib.import_module(script)
    env = module.make_env(module.Args(env_id=toy("GlobalDice")))
    one, two, other = (env.reset(seed=seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(one, two) and not np.isclose(one, other).any()


@each_script
def test_generators_of_the_caller(script):
    """A search that draws its settings from a global generator gets new ones after each run, however that ends."""
    flags = {"env_backend": "gymnasium"} if script.endswith("_jax") else {}
    generators = (random.random, np.random.random, lambda: torch.rand(()).item())
    for env_id in ("CartPole-v1", toy("BrokenStep")):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        expected = [[draw() for draw in generators] for _ in range(2)]
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        drawn = [[draw() for draw in generators]]
        with suppress(gym.error.Error):
            run(script, env_id=env_id, **flags)
        assert [*drawn, [draw() for draw in generators]] == expected


@each_script
def test_id_without_a_version(script, monkeypatch):
    monkeypatch.setattr(gym.logger, "min_level", gym.logger.WARN)  # a run with --async-envs raises it
    flags = {"env_backend": "gymnasium"} if script.endswith("_jax") else {}
    with pytest.warns(UserWarning, match="latest version"):
        result = run(script, env_id="Acrobot", total_timesteps=128, max_episode_steps=20, eval_episodes=1, **flags)
    assert len(result.eval_returns) == 1


@each_script
def test_plumbing_changes_nothing(script, finished, monkeypatch):
    """Nor do the numbers depend on how often is saved, on the evaluation, on the progress bar or on the log."""
    expected = finished(script).result.agent
    for flags in (
        {"save_every": 1},
        {"save_every": 0},
        {"eval_episodes": 0},
        {"eval_episodes": 5, "eval_sample": True},
    ):
        assert same(run(script, **flags).agent, expected), flags
    monkeypatch.setenv("TQDM_DISABLE", "0" if os.environ.get("TQDM_DISABLE") == "1" else "1")
    assert same(run(script).agent, expected)
    writer = "EventFileWriter" if script.endswith("_jax") else "SummaryWriter"
    monkeypatch.setattr(importlib.import_module(script), writer, MagicMock())
    assert same(run(script).agent, expected)


@ppo_first
def test_async_envs_change_nothing(script, finished):
    flags = {"env_backend": "gymnasium"} if script.endswith("_jax") else {}
    expected = run(script, **flags).agent if flags else finished(script).result.agent
    # a process of its own: one in which JAX runs threads had better not fork
    process = start(str(ROOT / f"{script}.py"), *argv(settings(script, exp_name="async", async_envs=True, **flags)))
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    (run_dir,) = Path("runs").glob("*__async__*")
    assert same(run(script, resume=str(run_dir), eval_only=True, **flags).agent, expected)


@pytest.mark.slow
@ppo_first
def test_async_envs_whose_infos_do_not_fit_together(script):
    """They once hung: an answer was taken from a process and then waited for."""
    flags = settings(script, env_id=toy("Talks"), async_envs=True)
    flags |= {"env_backend": "gymnasium"} if script.endswith("_jax") else {}
    _, err = (process := start(str(ROOT / f"{script}.py"), *argv(flags))).communicate(timeout=200)
    assert process.returncode == 0, err


PLUMBING = {"exp_name", "env_id", "cuda", "async_envs", "capture_video", "save_every", "resume", "eval_only"}
PLUMBING |= {"eval_episodes", "eval_sample", "return_window", "target_return", "env_backend", "num_seeds"}
PLUMBING |= {"compile", "shard_envs"}  # which change the rounding at most
OTHER_VALUES = {  # of flags that are no switches
    "seed": 2,
    "total_timesteps": 300,
    "learning_rate": 2e-3,
    "num_envs": 2,
    "max_episode_steps": 9,
    "gamma": 0.5,
    "temperature": 2.0,
    "ent_coef": 0.1,
    "max_grad_norm": 1e-6,  # Adam rescales gradients, but not below its eps
    "hidden_sizes": (),
    "activation": "relu",
    "num_steps": 16,
    "gae_lambda": 0.1,
    "num_minibatches": 4,
    "update_epochs": 3,
    "vf_coef": 2.0,
    "clip_coef": 1e-4,
    "target_kl": 1e-9,
}


@each_script
def test_every_flag_has_an_effect(script):
    """Each flag of the algorithm, set to another value, gives another agent."""
    flags = {f.name: f.default for f in fields(importlib.import_module(script).Args) if f.name not in PLUMBING}
    others = {name: not x if isinstance(x, bool) else OTHER_VALUES[name] for name, x in flags.items()}
    base = {"learning_rate": 0.05}  # leaves the clip range within two epochs
    agent = run(script, **base).agent
    assert not [name for name, x in others.items() if same(agent, run(script, **base | {name: x}).agent)]


@each_script_now
def test_import_does_nothing(script, tmp_path):
    foreign = "torch, torch.utils.tensorboard" if not script.endswith("_jax") else "jax, flax.linen, optax"
    code = f"""
import os, random, signal, sys
import gymnasium, numpy, tqdm, tyro, {foreign}
def state():
    yield dict(os.environ), os.getcwd(), random.getstate(), repr(numpy.random.get_state())
    yield signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    if "torch" in sys.modules:
        yield torch.initial_seed(), torch.get_rng_state().tolist(), torch.cuda.is_initialized()
        yield torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    else:
        yield dict(jax._src.xla_bridge._backends), dict(jax.config.values)
before = list(state())
import {script}
assert list(state()) == before
assert ("torch" in sys.modules) == ({script!r}[-4:] != "_jax")
"""
    process = start("-c", code)
    assert process.communicate(timeout=200) == ("", "") and process.returncode == 0
    assert not list(tmp_path.iterdir())


# ==================================================== A run's outcome =================================================


@each_script
def test_command_line(script, finished, tmp_path):
    """The script as a program does what `train` does with the same flags, and shows and leaves what it should."""
    process = start(str(ROOT / f"{script}.py"), *argv(settings(script)))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    expected = finished(script).result

    returns = expected.eval_returns
    line, path = out.splitlines()
    assert line == f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over 2 episodes"
    assert re.fullmatch(rf"runs/CartPole-v1__{script}__1__\d+", path)
    assert re.search(r"100%.*steps/s, return \d+\.\d", err)
    assert "warning" not in err.lower()
    assert [p.name for p in tmp_path.iterdir()] == ["runs"] and [p.name for p in Path("runs").iterdir()] == [path[5:]]

    names = {p.name for p in Path(path).iterdir()}
    assert {"args.json", checkpoint(script, Path(path)).name} < names
    assert len(names) == 3 and sum(name.startswith("events.out.tfevents") for name in names) == 1
    args = importlib.import_module(script).Args(**settings(script))
    assert json.loads(Path(path, "args.json").read_text()) == json.loads(json.dumps(asdict(args)))

    log = scalars(Path(path))
    wanted = {f"charts/{tag}" for tag in CHARTS} | {f"losses/{tag}" for tag in TAGS[algorithm(script)]}
    assert wanted <= log.keys() and log.keys() - wanted <= {"losses/grad_norm"}
    assert all(np.isfinite(value) for points in log.values() for _, value in points)
    episodes = list(zip(expected.episode_steps, expected.episode_returns, strict=True))
    assert log["charts/episodic_return"] == episodes
    assert log["charts/episodic_length"] == episodes  # CartPole rewards every step with 1
    rates = log["charts/learning_rate"]
    assert rates[0][1] == pytest.approx(args.learning_rate) and rates[-1][1] > 0  # float32 in the log
    assert np.all(np.diff([rate for _, rate in rates]) < 0)
    for tag in wanted - {"charts/episodic_return", "charts/episodic_length"}:
        assert [step for step, _ in log[tag]] == [step for step, _ in rates]


@each_script
def test_run_folder(script):
    """Never an existing folder, also within one second; a slash or colon of an id opens no folder."""
    folders = [run(script, env_id=toy("DictObs"), exp_name="a/b:c", total_timesteps=128).run_dir for _ in range(2)]
    assert folders[0] != folders[1]
    assert sorted(Path("runs").iterdir()) == sorted(folders)
    assert all(folder.name.startswith("tests.probe_envs-DictObs-v0__a-b-c__1__") for folder in folders)
    assert all(checkpoint(script, folder).exists() for folder in folders)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if not script.endswith("_jax")])
def test_checkpoint_is_data(script, finished):
    import torch

    saved = torch.load(checkpoint(script, finished(script).folder), weights_only=True)
    agent = params(finished(script).result.agent)
    assert saved["agent"].keys() == agent.keys()
    assert all(np.array_equal(saved["agent"][name].numpy(), x) for name, x in agent.items())


@each_script
def test_target_return(script):
    """CartPole's returns are above 1: the run ends with the iteration that fills the window of 10 episodes."""
    result = run(script, target_return=1.0, return_window=10)
    iterations = [step for step, _ in scalars(result.run_dir)["losses/policy_loss"]]
    assert len(iterations) > 1 and iterations[-1] < settings(script)["total_timesteps"]
    assert len(result.episode_returns) >= 10
    assert (result.episode_steps <= iterations[-2]).sum() < 10
    assert checkpoint(script, result.run_dir).exists()
    before = contents(result.run_dir)
    resumed = run(script, target_return=1.0, return_window=10, resume=str(result.run_dir))
    assert not len(resumed.episode_steps) and contents(result.run_dir) == before


@each_script
def test_target_return_out_of_reach(script, finished):
    for flags in ({"target_return": 1000.0, "return_window": 10}, {"target_return": 1.0, "return_window": 10_000}):
        assert same(run(script, **flags).agent, finished(script).result.agent)


@each_script
def test_capture_video(script, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    result = run(script, capture_video=True, total_timesteps=128, eval_episodes=2)
    assert same(result.agent, run(script, total_timesteps=128).agent)
    videos = list((result.run_dir / "videos").glob("*.mp4"))
    assert len(videos) == 2 and all(b"ftyp" in video.read_bytes()[:12] for video in videos)


@each_script
def test_cuda_without_a_gpu(script, finished, capsys):
    if script.endswith("_jax"):
        gpu = importlib.import_module("jax").default_backend() == "gpu"
    else:
        gpu = importlib.import_module("torch").cuda.is_available()
    if gpu:
        pytest.skip("there is a GPU")
    result = run(script, cuda=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: --cuda")
    assert same(result.agent, finished(script).result.agent)


# ================================================= Resuming and evaluating ============================================


@each_script
@pytest.mark.parametrize("crashed", [False, True])
def test_resume(script, crashed, finished, tmp_path):
    """From the folder as it was when saved; or from a file in one with a longer log, as a crash later on leaves it."""
    whole, half = finished(script).folder, finished(script).half
    run_dir = shutil.copytree(whole if crashed else half, tmp_path / "run")
    if crashed:
        shutil.copy(checkpoint(script, half), run_dir)
    before = scalars(half)["charts/learning_rate"]
    uninterrupted = scalars(whole)
    assert 0 < len(before) < len(uninterrupted["charts/learning_rate"])  # not a resume at either end

    result = run(script, resume=str(checkpoint(script, run_dir) if crashed else run_dir))
    assert result.run_dir == run_dir and not Path("runs").exists()
    assert result.episode_steps.min() > before[-1][0]
    log = scalars(run_dir)
    # Nothing is lost between two iterations that play whole episodes, or where the environments are in the checkpoint.
    if algorithm(script) == "reinforce" or script.endswith("_jax"):
        assert same(result.agent, finished(script).result.agent)
        del log["charts/SPS"], uninterrupted["charts/SPS"]
        assert log == uninterrupted
    else:
        assert log["charts/learning_rate"] == uninterrupted["charts/learning_rate"]  # steps and values
        steps = [step for step, _ in log["charts/episodic_return"]]
        assert steps == sorted(steps)
        for tag in TAGS[algorithm(script)]:
            assert log[f"losses/{tag}"][: len(before)] == uninterrupted[f"losses/{tag}"][: len(before)]
            assert [step for step, _ in log[f"losses/{tag}"]] == [step for step, _ in log["charts/learning_rate"]]


@each_script
def test_resumed_run_saves_when_the_whole_one_would(script, finished, tmp_path, monkeypatch):
    """The number of iterations is part of the state: with --save-every 2, resumed at 2, the next ones are 4, 6, ..."""
    run_dir, saved = shutil.copytree(finished(script).half, tmp_path / "run"), []
    module = importlib.import_module(script)
    write = module.save

    def save(state, *args):
        saved.append(int(np.max(state.iteration)))
        write(state, *args)

    monkeypatch.setattr(module, "save", save)
    run(script, resume=str(run_dir))
    iterations = len(scalars(run_dir)["charts/learning_rate"])
    assert saved == [*range(4, iterations + 1, 2), iterations]


@each_script
def test_resume_with_more_steps(script, finished, tmp_path):
    run_dir = shutil.copytree(finished(script).folder, tmp_path / "run")
    total = 2 * settings(script)["total_timesteps"]
    result = run(script, resume=str(run_dir), total_timesteps=total)
    steps = [step for step, _ in scalars(run_dir)["losses/policy_loss"]]
    assert steps[-1] >= total and np.all(np.diff(steps) > 0)
    assert result.episode_steps.min() > settings(script)["total_timesteps"]


@each_script
def test_called_with_a_path_and_numpy_numbers(script, finished, tmp_path):
    run_dir = shutil.copytree(finished(script).folder, tmp_path / "run")
    more = np.int64(settings(script)["total_timesteps"] + 256)
    result = run(script, resume=run_dir, total_timesteps=more, learning_rate=np.float32(1e-3))
    assert result.run_dir == run_dir and len(result.episode_steps)
    assert json.loads((run_dir / "args.json").read_text())["total_timesteps"] == more
    run(script, resume=str(run_dir), eval_only=True)  # what it saved can be read
    fresh = run(script, seed=np.arange(3)[2], hidden_sizes=(np.int64(8),))
    flags = json.loads((fresh.run_dir / "args.json").read_text())
    assert (flags["seed"], flags["hidden_sizes"]) == (2, [8])
    for same_sizes in ([8], np.array([8])):  # a list, as in args.json
        assert same(run(script, seed=2, hidden_sizes=same_sizes).agent, fresh.agent)


@pytest.mark.parametrize("script", ["ppo", pytest.param("ppo_jax", marks=pytest.mark.slow)])
def test_readme_uses_a_trained_agent(script, finished):
    """Its code, with the folder of a run in place of "runs/..."."""
    text = (ROOT / "README.md").read_text().split("**Use the trained agent**")[1]
    code = text.split("```")[1].removeprefix("python").replace("runs/...", str(finished(script).folder))
    in_torch, in_jax = code.split("\n\n")
    names = {"Path": Path, "json": json, "np": np, "obs": np.zeros(4, np.float32)}
    names |= {name: importlib.import_module(name) for name in (script, "jax" if script == "ppo_jax" else "torch")}
    exec("\n".join([*in_torch.splitlines()[:3], in_jax]) if script == "ppo_jax" else in_torch, names)
    assert names["action"] in (0, 1)
    if script == "ppo":
        assert names["env"].step(names["action"])[1] == 1


@each_script
def test_resume_of_a_finished_run(script, finished, tmp_path, monkeypatch, capsys):
    run_dir = shutil.copytree(finished(script).folder, tmp_path / "run")
    before = contents(tmp_path)
    capsys.readouterr()  # what the finished run printed, where this test is the first to ask for it
    monkeypatch.setattr(sys, "argv", [script, *argv(settings(script, resume=str(run_dir)))])
    importlib.import_module(script).main()  # returns: status 0
    out, err = capsys.readouterr()
    assert str(run_dir) in out and "nothing to train" in out and not err
    assert contents(tmp_path) == before


@each_script
@pytest.mark.parametrize("norm_obs", [False, True])
def test_eval_only(script, norm_obs, finished, tmp_path):
    """A saved agent evaluates as it did at the end of its run, greedily or not, and nothing is written."""
    flags = {"norm_obs": True} if norm_obs and algorithm(script) != "reinforce" else {}
    sampled = run(script, eval_sample=True, **flags)
    before = contents(tmp_path)
    flags |= {"resume": str(sampled.run_dir), "eval_only": True}
    again = run(script, eval_sample=True, **flags)
    assert np.array_equal(again.eval_returns, sampled.eval_returns)
    assert same(again.agent, sampled.agent)
    assert len(again.episode_returns) == len(again.episode_steps) == 0

    assert same(run(script, eval_episodes=0, **flags).agent, sampled.agent)  # evaluating changed nothing

    greedy = run(script, **flags)
    assert not np.array_equal(greedy.eval_returns, sampled.eval_returns)
    if not flags.get("norm_obs"):
        assert np.array_equal(greedy.eval_returns, finished(script).result.eval_returns)
    assert contents(tmp_path) == before


# ======================================================== Signals =====================================================


@each_script
@pytest.mark.parametrize(("name", "status"), [("Interrupted", 130), ("Terminated", 143)])
def test_signal_in_a_step(script, name, status, capsys):
    """The iteration is played to its end and saved, and the handlers are put back."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stopped:
        run(script, env_id=toy(name), num_envs=1)
    assert stopped.value.code == status
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    out, err = capsys.readouterr()
    step, path = re.fullmatch(r"stopped at step (\d+), go on with these flags and --resume (\S+)\n", err).groups()
    assert int(step) == (20 if algorithm(script) == "reinforce" else 32)
    assert checkpoint(script, Path(path)).exists() and not out


@each_script
def test_second_interrupt_stops_at_once(script):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background lacks
    with pytest.raises(KeyboardInterrupt):
        run(script, env_id=toy("InterruptedTwice"), num_envs=1)
    signal.signal(signal.SIGINT, previous)


BACKEND = {"_jax": ("--env-backend", "gymnasium")}


def interrupt(script: str, *flags: str, group: bool, number=signal.SIGINT) -> tuple[int, str, str]:
    """Start a run that would take days, send a signal at its progress bar. Returns its status, stdout and stderr.

    A terminal sends Ctrl-C to all processes of the foreground group, as `timeout` does SIGTERM.
    """
    words = argv(settings(script, total_timesteps=10**9))
    process = start(str(ROOT / f"{script}.py"), *words, *flags, start_new_session=True)
    err = ""
    while "steps/s" not in err:
        assert process.poll() is None, err
        err += os.read(process.stderr.fileno(), 4096).decode()
    (os.killpg if group else os.kill)(process.pid, number)
    out, rest = process.communicate(timeout=200)
    return process.returncode, out, err + rest


@ppo_first
def test_ctrl_c(script):
    status, out, err = interrupt(script, group=False)
    assert status == 130 and not out and "Traceback" not in err
    stopped = re.search(r"^stopped at step (\d+), go on with these flags and --resume (\S+)$", err, re.MULTILINE)
    step, path = stopped.groups()
    result = run(script, resume=path, total_timesteps=int(step) + 640)  # what it printed can be used
    assert result.episode_steps.min() > int(step)


@ppo_first
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_environment_processes_too(script, number):
    status, _, err = interrupt(script, "--async-envs", *BACKEND.get(script[-4:], ()), group=True, number=number)
    assert "Traceback" not in err and "error" not in err, err
    path = re.search(r"^stopped at step \d+, go on with these flags and --resume (\S+)$", err, re.MULTILINE).group(1)
    flags = {"env_backend": "gymnasium"} if script.endswith("_jax") else {}
    assert status == 128 + number and run(script, resume=path, eval_only=True, **flags).run_dir == Path(path)
