"""What a user can get wrong: status 2 and one line on stderr that names the flag, no traceback, nothing left behind."""

import importlib
import os
import pickle
import re
import resource
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

SCRIPTS = ("reinforce", "vpg_advantage", "ppo", "reinforce_jax", "vpg_advantage_jax", "ppo_jax")
ACTOR_CRITIC = tuple(script for script in SCRIPTS if not script.startswith("reinforce"))
JAX_ACTOR_CRITIC = tuple(script for script in ACTOR_CRITIC if script.endswith("_jax"))
REINFORCE = tuple(script for script in SCRIPTS if script.startswith("reinforce"))
JAX = tuple(script for script in SCRIPTS if script.endswith("_jax"))
PPO = tuple(script for script in SCRIPTS if script.startswith("ppo"))
SLOW = {script: [pytest.mark.slow] if script.endswith("_jax") else [] for script in SCRIPTS}  # what has to compile
JAX_LATER = [pytest.param(script, marks=marks) for script, marks in SLOW.items()]
PPO_FIRST = [pytest.param(script, marks=[] if script == "ppo" else pytest.mark.slow) for script in SCRIPTS]
ROOT = Path(__file__).parents[1]
SMALL = "--num-envs 2 --hidden-sizes 8 --eval-episodes 1 --total-timesteps 64 "
TINY = {script: SMALL + "--num-steps 16 --num-minibatches 2 --save-every 1" for script in ACTOR_CRITIC}
TINY |= {script: SMALL + "--max-episode-steps 16 --save-every 1" for script in REINFORCE}


def toy(name: str) -> str:
    return f"--env-id tests.probe_envs:{name}-v0"


# (scripts, command line, what the line on stderr has to say besides the flag and its value)
NUMBERS = [
    (SCRIPTS, "--seed -1", "[0, 4294967295]"),
    (SCRIPTS, "--seed 4294967296", "[0, 4294967295]"),
    (SCRIPTS, "--total-timesteps 0", "must lie in [1, "),
    (SCRIPTS, "--total-timesteps -5", "must lie in [1, "),
    (SCRIPTS, "--save-every -1", "[0, inf)"),
    (SCRIPTS, "--eval-episodes -1", "[0, inf)"),
    (SCRIPTS, "--return-window 0", "[1, inf)"),
    (SCRIPTS, "--target-return nan", "(-inf, inf)"),
    (SCRIPTS, "--target-return inf", "(-inf, inf)"),
    (SCRIPTS, "--learning-rate 0", "(0, inf)"),
    (SCRIPTS, "--learning-rate -0.001", "(0, inf)"),
    (SCRIPTS, "--learning-rate nan", "(0, inf)"),
    (SCRIPTS, "--learning-rate inf", "(0, inf)"),
    (SCRIPTS, "--num-envs 0", "[1, inf)"),
    (SCRIPTS, "--num-envs -2", "[1, inf)"),
    (SCRIPTS, "--gamma -0.1", "[0, 1]"),
    (SCRIPTS, "--gamma 1.01", "[0, 1]"),
    (SCRIPTS, "--gamma nan", "[0, 1]"),
    (SCRIPTS, "--ent-coef -0.01", "[0, inf)"),
    (SCRIPTS, "--ent-coef inf", "[0, inf)"),
    (SCRIPTS, "--max-grad-norm 0", "(0, inf)"),
    (SCRIPTS, "--max-grad-norm nan", "(0, inf)"),
    (SCRIPTS, "--hidden-sizes 0", "[1, inf)"),
    (SCRIPTS, "--hidden-sizes 64 -1", "[1, inf)"),
    (SCRIPTS, "--max-episode-steps 0", "must lie in [1, "),
    (JAX, "--max-episode-steps 2147483648", "[1, 100000000]"),  # JAX counts in 32 bits
    (REINFORCE, "--temperature 0", "(0, inf)"),
    (REINFORCE, "--temperature inf", "(0, inf)"),
    (ACTOR_CRITIC, "--num-steps 0", "[1, inf)"),
    (ACTOR_CRITIC, "--gae-lambda 1.5", "[0, 1]"),
    (ACTOR_CRITIC, "--gae-lambda nan", "[0, 1]"),
    (ACTOR_CRITIC, "--num-minibatches 0", "[1, inf)"),
    (ACTOR_CRITIC, "--update-epochs 0", "[1, inf)"),
    (ACTOR_CRITIC, "--vf-coef -1", "[0, inf)"),
    (ACTOR_CRITIC, "--vf-coef nan", "[0, inf)"),
    (PPO, "--clip-coef 0", "(0, inf)"),
    (PPO, "--clip-coef nan", "(0, inf)"),
    (PPO, "--target-kl 0", "(0, inf)"),
    (PPO, "--target-kl inf", "(0, inf)"),
]
COMBINATIONS = [
    (ACTOR_CRITIC, "--num-minibatches 3", "must divide the batch of 32"),
    (ACTOR_CRITIC, "--num-minibatches 64", "must divide the batch of 32"),
    (ACTOR_CRITIC, "--total-timesteps 31", "one batch of 32"),
    (SCRIPTS, "--eval-only", "--resume"),
    (JAX_ACTOR_CRITIC, "--shard-envs --num-seeds 2", "without --shard-envs"),
    (JAX_ACTOR_CRITIC, "--shard-envs --env-backend gymnasium", "needs gymnax"),
]
ENVIRONMENTS = [
    (SCRIPTS, "--env-id NoSuchThing-v0", "doesn't exist"),
    (SCRIPTS, "--env-id CartPol-v1", "CartPole"),
    (SCRIPTS, "--env-id CartPole-v99", "v1"),
    (SCRIPTS, "--env-id no_such_module:CartPole-v1", "no_such_module"),
    (SCRIPTS, toy("NoSuchToy"), "doesn't exist"),
    (SCRIPTS, "--env-id=", "ID"),
    (JAX, "--env-id CartPol-v1 --env-backend gymnax", "did you mean `CartPole-v1`"),
    (JAX, "--env-id Breakout-MinAtr", "did you mean `Breakout-MinAtar`"),
    (JAX, "--env-id NoSuchThing-v0 --env-backend gymnax", "not in registered gymnax environments"),
    (SCRIPTS, f"--exp-name {'é' * 51}", "longer than 100 bytes"),
    (SCRIPTS, f"--env-id {'x' * 5000}", "doesn't exist"),
    (SCRIPTS, toy("Image"), "Box(0, 255, (8, 8, 3), uint8) need a convolutional network"),
    (SCRIPTS, toy("SequenceObs"), "Sequence("),
    (SCRIPTS, toy("GraphObs"), "Graph("),
    (SCRIPTS, toy("MultiDiscreteAction"), "MultiDiscrete([2 3])"),
    (SCRIPTS, toy("IntegerBoxAction"), "Box(0, 5, (1,), int64)"),
    (REINFORCE, "--temperature 2.0 --env-id Pendulum-v1", "softmax"),
]
TYRO = [  # its own message, of several lines
    (SCRIPTS, "--num-envs two", "two"),
    (SCRIPTS, "--learning-rate", "argument"),
    (SCRIPTS, "--activation gelu", "relu"),
    (SCRIPTS, "--no-such-flag 1", "no-such-flag"),
]


def rows(*tables, jax_later=False):
    """One case for each script that a row names."""
    cases = [(script, words, text) for table in tables for scripts, words, text in table for script in scripts]
    cases = [pytest.param(*case, marks=SLOW[case[0]] if jax_later else []) for case in cases]
    return pytest.mark.parametrize(("script", "words", "text"), cases)


@pytest.fixture
def main(monkeypatch, capsys, recwarn):
    """(script, command line) -> (status, stderr) of a run in this process."""

    def call(script: str, words: str) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words.split()])
        try:
            importlib.import_module(script).main()
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        err = capsys.readouterr().err
        # JAX, which other tests have imported, warns of the forks of PyTorch's --async-envs; deprecations within
        # libraries are not shown to users
        shown = [w for w in recwarn.list if "os.fork() was called" not in str(w.message)]
        shown = [w for w in shown if not issubclass(w.category, DeprecationWarning)]
        assert not shown, "a warning is one more line on stderr"
        return status, err

    return call


def check(status: int, err: str, flag: str, text: str) -> None:
    """Status 2 and one line."""
    assert status == 2, err
    assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err
    assert flag in err and text in err, err


@rows(NUMBERS, COMBINATIONS, ENVIRONMENTS)
def test_one_line(script, words, text, main, tmp_path):
    status, err = main(script, f"{TINY[script]} {words}")
    flag, _, values = words.replace("=", " ").partition(" ")
    check(status, err, flag, text)
    wrong = values.split()[-1:]  # of several hidden sizes the last
    assert not wrong or flag == "--temperature" or wrong[0] in err or repr(wrong[0]) in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("content", "text"),
    [("def f(:", "line 1"), ("raise RuntimeError('no licence')", "no licence"), ("import nothing", "nothing")],
)
def test_module_that_cannot_be_imported(script, content, text, main, monkeypatch):
    """Whatever it raises: one line."""
    Path("mine.py").write_text(content)
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    status, err = main(script, f"{TINY[script]} --env-id mine:CartPole-v1")
    check(status, err, "--env-id mine:CartPole-v1", text)


@rows(TYRO)
def test_words_that_make_no_arguments(script, words, text, main, tmp_path):
    status, err = main(script, f"{TINY[script]} {words}")
    assert status == 2 and words.split()[0] in err and text in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


WRONG_TYPES = [
    ("activation", "Tanh", "['tanh', 'relu']"),
    ("capture_video", "False", "bool"),
    ("anneal_lr", 0, "bool"),
    ("learning_rate", "3e-4", "float"),  # as YAML reads it
    ("target_return", "500", "float | None"),
    ("num_envs", 8.0, "int"),
    ("seed", None, "int"),
    ("hidden_sizes", (64, 32.5), "tuple[int, ...]"),
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("name", "value", "kind"), WRONG_TYPES)
def test_wrong_types_from_python(script, name, value, kind, tmp_path):
    """They do not come from the command line, where tyro sees to it, but from a notebook or a sweep."""
    module = importlib.import_module(script)
    with pytest.raises(ValueError, match=re.escape(f"--{name.replace('_', '-')} {value!r}: must be ")) as error:
        module.train(module.Args(**{name: value}))
    assert kind in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", REINFORCE)
def test_no_time_limit(script, main, tmp_path):
    words = TINY[script].replace("--max-episode-steps 16", toy("NoTimeLimit"))
    check(*main(script, words), "--env-id tests.probe_envs:NoTimeLimit-v0", "--max-episode-steps")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("script", ACTOR_CRITIC)
def test_evaluation_ends(script):
    """Also in an environment that goes on for ever: each step's reward is 1, and its episode is cut."""
    module = importlib.import_module(script)
    args = module.tyro.cli(module.Args, args=f"{TINY[script]} {toy('Endless')}".split())
    assert module.train(args).eval_returns.tolist() == [100_000]


@pytest.mark.parametrize("variable", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
@pytest.mark.parametrize("script", JAX)
def test_incomplete_address_of_hosts(script, variable, main, monkeypatch, tmp_path):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.setenv(name, "1" if name != variable else "x")
    check(*main(script, TINY[script]), "JAX_COORDINATOR_ADDRESS", variable)
    assert not list(tmp_path.iterdir())


def test_torchrun_of_one_process_alone(main, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(*main("reinforce", TINY["reinforce"]), "torchrun", "one process")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_video_of_what_cannot_be_rendered(script, main, tmp_path):
    """Said at the start, not after hours of training."""
    check(*main(script, f"{TINY[script]} --capture-video {toy('DictObs')}"), "--capture-video", "DictObs")
    assert not list(tmp_path.iterdir())


@rows(
    [(SCRIPTS, "--gamma 2", "[0, 1]"), (PPO, "--env-id CartPol-v1", "CartPole"), (PPO, "--eval-only", "")],
    jax_later=True,
)
def test_as_a_program(script, words, text, tmp_path):
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(ROOT / f"{script}.py"), *words.split()]
    process = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100)
    check(process.returncode, process.stderr, words.split()[0], text)
    assert not process.stdout and not list(tmp_path.iterdir())


# ===================================================== Checkpoints ====================================================


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """script -> the checkpoint of a short run. Not to be written to."""
    paths = {}

    def get(script: str) -> Path:
        if script not in paths:
            module = importlib.import_module(script)
            words = TINY[script].split()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp(script))
                patch.setattr(sys, "argv", [script, *words])
                module.main()
                (paths[script],) = Path.cwd().glob("runs/*/checkpoint.*")
        return paths[script]

    return get


OTHER_RUNS = [
    (SCRIPTS, "--env-id Acrobot-v1", "env_id is CartPole-v1, this run's is Acrobot-v1"),
    (SCRIPTS, "--hidden-sizes 8 8", "hidden_sizes"),
    (SCRIPTS, "--hidden-sizes 16", "hidden_sizes"),
    (SCRIPTS, "--activation relu", "activation is tanh, this run's is relu"),
    (ACTOR_CRITIC, "--norm-obs", "norm_obs is False, this run's is True"),
    (REINFORCE, "--temperature 2.0", "temperature is 1.0, this run's is 2.0"),
]


@rows(OTHER_RUNS, jax_later=True)
@pytest.mark.parametrize("eval_only", ["", "--eval-only"])
def test_checkpoint_of_another_run(script, words, text, eval_only, main, saved, tmp_path):
    path = saved(script)
    before = {p: p.stat().st_mtime_ns for p in path.parent.iterdir()}
    check(*main(script, f"{TINY[script]} {words} {eval_only} --resume {path}"), f"--resume {path}", text)
    assert {p: p.stat().st_mtime_ns for p in path.parent.iterdir()} == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", JAX_LATER)
def test_checkpoint_of_another_script(script, main, saved, tmp_path):
    other = next(s for s in SCRIPTS if s != script and s.endswith("_jax") == script.endswith("_jax"))
    check(*main(script, f"{TINY[script]} --resume {saved(other)}"), "--resume", f"{other}.py")
    assert not list(tmp_path.iterdir())


def structures(script: str) -> list[bytes]:
    """Files that can be read and are no checkpoints."""
    values = [3, [1, 2], {}, {"identity": 3}, {"identity": {}}, {"identity": ["ppo.py"]}, {"meta": "{}"}]
    if script.endswith("_jax"):
        from flax.serialization import msgpack_serialize

        return [msgpack_serialize(value) for value in values]
    import io

    import torch

    files = [io.BytesIO() for _ in values]
    for file, value in zip(files, values, strict=True):
        torch.save(value, file)
    return [file.getvalue() for file in files]


@pytest.mark.parametrize("script", JAX_LATER)
def test_unreadable_checkpoint(script, main, saved, tmp_path):
    good, bad = saved(script).read_bytes(), tmp_path / saved(script).name
    noise = np.random.default_rng(0).bytes(5_000)
    # cut off at each kB, no content at all, text, noise, and a good start with noise after it
    damaged = [good[:i] for i in range(0, len(good), 1_024)] + [good[:-1], b"hello\n", noise, good[:2_000] + noise]
    for content in damaged + structures(script):
        bad.write_bytes(content)
        check(*main(script, f"{TINY[script]} --resume {bad}"), "--resume", str(bad))
    assert list(tmp_path.iterdir()) == [bad]


@pytest.mark.parametrize("script", JAX_LATER)
def test_missing_checkpoint(script, main, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "nowhere/checkpoint.pt", "empty", ""):
        check(*main(script, f"{TINY[script]} --resume={path}"), "--resume", path)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


class Payload:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return Path.mkdir, (Path("pwned"),)


@pytest.mark.parametrize("script", JAX_LATER)
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("as_torch_file", [False, True])
def test_checkpoint_cannot_run_code(script, as_torch_file, protocol, main, saved, tmp_path):
    bad = tmp_path / saved(script).name
    bad.write_bytes(pickle.dumps(Payload(), protocol=protocol))
    pickle.loads(bad.read_bytes())
    Path("pwned").rmdir()  # which was there: the payload works
    if as_torch_file:
        import torch

        good = torch.load(saved(script), weights_only=True) if bad.suffix == ".pt" else {}
        torch.save(good | {"rng": Payload()}, bad, pickle_protocol=protocol)
        torch.load(bad, weights_only=False)
        Path("pwned").rmdir()
    check(*main(script, f"{TINY[script]} --resume {bad}"), "--resume", "not a readable checkpoint")
    assert not Path("pwned").exists()


@pytest.mark.parametrize("script", JAX_LATER)
def test_flipped_bits(script, main, saved, tmp_path):
    """One bit anywhere: refused in one line, or in a part of the file that carries nothing."""
    good, bad = saved(script).read_bytes(), tmp_path / saved(script).name
    module, rng = importlib.import_module(script), np.random.default_rng(0)
    words = f"{TINY[script]} --eval-only --eval-episodes 0 --resume"
    agents, refused = [], 0
    for i, bit in zip(rng.integers(len(good), size=60), rng.integers(8, size=60), strict=True):
        bad.write_bytes(good[:i] + bytes([good[i] ^ 1 << bit]) + good[i + 1 :])
        status, err = main(script, f"{words} {bad}")
        if status:
            check(status, err, "--resume", str(bad))
            refused += 1
        else:
            args = [module.tyro.cli(module.Args, args=[*words.split(), str(path)]) for path in (bad, saved(script))]
            agents.append([module.train(x).agent for x in args])
    assert refused > (55 if script.endswith("_jax") else 20)  # a zip file is padded
    for pair in agents:
        ours, theirs = (
            agent.state_dict().values() if hasattr(agent, "state_dict") else module.jax.tree.leaves(agent)
            for agent in pair
        )
        assert all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(ours, theirs, strict=True))


def hostile(script: str, path: Path) -> list[bytes]:
    """Files of the right structure that declare 10^12 numbers, hold wrong types or are packed."""
    if script.endswith("_jax"):
        import msgpack
        from flax.serialization import msgpack_restore

        saved = msgpack_restore(path.read_bytes())
        meta, state = saved["meta"], msgpack_restore(saved["state"])
        huge = msgpack.ExtType(1, msgpack.packb(((10**6, 10**6), "float32", b"0000")))
        parts = [{"step": huge}, {"variables": huge}, {"key": huge}, {"step": "3"}]
        contents = [(meta, state | part) for part in parts]
        contents += [(meta, {}), (re.sub(r'"recent_returns": \[\[', '"recent_returns": [["a", ', meta), state)]
        # what is no array goes through msgpack alone, with flax's code for arrays
        from flax.serialization import _msgpack_ext_pack as pack

        packed = [(meta, msgpack.packb(content, default=pack, strict_types=True)) for meta, content in contents]
        return [msgpack.packb({"meta": m, "state": x, "crc32": zlib.crc32(m.encode() + x)}) for m, x in packed]
    import io

    import torch

    saved = torch.load(path, weights_only=True)
    huge = torch.zeros(1).expand(10**6, 10**6)
    name = next(iter(saved["agent"]))
    moments = saved["optimizer"]["state"]
    contents = [
        saved | {"agent": saved["agent"] | {name: huge}},
        saved | {"rng": torch.zeros(1, dtype=torch.uint8).expand(10**12)},
        saved
        | {
            "optimizer": saved["optimizer"]
            | {"state": moments | {0: moments[0] | {"exp_avg": torch.zeros(1).double().expand(10**6, 10**6)}}}
        },
        saved | {"recent_returns": ["a"]},
        saved | {"step": "three"},
        saved | {"identity": saved["identity"] | {"format": 2}},
    ]
    files = [io.BytesIO() for _ in contents]
    for file, content in zip(files, contents, strict=True):
        torch.save(content, file)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(files[0], "w", zipfile.ZIP_DEFLATED) as packed:
        for part in source.infolist():
            packed.writestr(part.filename, source.read(part))
    return [file.getvalue() for file in files]


@pytest.mark.parametrize("script", JAX_LATER)
def test_huge_shapes_and_wrong_types(script, main, saved, tmp_path):
    """Refused in one line, without the memory that the file declares: the peak grows by less than 1 GB."""
    bad, before = tmp_path / saved(script).name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in hostile(script, saved(script)):
        bad.write_bytes(content)
        check(*main(script, f"{TINY[script]} --resume {bad}"), "--resume", str(bad))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**6  # kB


# ================================================ Environments that fail ==============================================


@pytest.mark.parametrize("script", PPO_FIRST)
@pytest.mark.parametrize(("name", "step"), [("BrokenStart", 0), ("BrokenStep", 3)])
def test_fault_in_an_environment_process(script, name, step):
    """A process of its own, as for every user: one line still."""
    words = f"{TINY[script]} {toy(name)} --seed 1 --async-envs".split()
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(ROOT / f"{script}.py"), *words]
    process = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100)
    assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
    assert f"error: environment 1, its step {step}: " in process.stderr
    assert Path("runs").exists() == (step > 0)


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {blocked!r} else find_spec(name, *rest)
sys.argv = {argv!r}
import {script}
{script}.main()
"""
EXTRAS = [
    ("Box2D", "--env-id LunarLander-v3", "gymnasium[box2d]"),
    ("mujoco", "--env-id HalfCheetah-v5", "gymnasium[mujoco]"),
    ("moviepy", "--capture-video", "pip install moviepy"),
    ("pygame", "--capture-video", "gymnasium[classic-control]"),
]


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in JAX])
def test_no_compiler(script, main, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    check(*main(script, f"{TINY[script]} --compile"), "--compile", "C++ compiler")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", PPO_FIRST)
@pytest.mark.parametrize(("blocked", "words", "text"), EXTRAS)
def test_missing_extras(script, blocked, words, text, tmp_path):
    """A package that is not there: the line names the command that installs it, before anything is written."""
    argv = [f"{script}.py", *TINY[script].split(), *words.split()]
    code = BLOCKED.format(blocked=[blocked], argv=argv, script=script)
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=100)
    check(process.returncode, process.stderr, "error: --", text)
    assert "pip install" in process.stderr
    assert not list(tmp_path.iterdir())


# ==================================================== Not a number ====================================================


@pytest.mark.parametrize("script", JAX_LATER)
def test_nan_stops_the_run(script, main):
    """The fifth reward, in the second iteration, is NaN; the checkpoint of the first one is whole."""
    words = TINY[script].replace("--num-envs 2", "--num-envs 1").replace("--num-steps 16", "--num-steps 4")
    status, err = main(script, f"{words} {toy('NanReward')}")
    (path,) = Path("runs").iterdir()
    assert status == 1 and err.count("\n") == 1 and "Traceback" not in err
    assert "reward of environment 0 not finite by step" in err and f"last good checkpoint is {path}" in err
    assert not [p for p in path.iterdir() if "partial" in p.name]
    status, err = main(script, f"{words} {toy('NanReward')} --eval-only --resume {path}")
    assert status == 0 and not err  # it loads; below: its parameters are finite
    module = importlib.import_module(script)
    args = module.tyro.cli(module.Args, args=f"{words} {toy('NanReward')} --eval-only --resume {path}".split())
    agent = module.train(args).agent
    leaves = agent.state_dict().values() if hasattr(agent, "state_dict") else module.jax.tree.leaves(agent)
    assert all(np.isfinite(np.asarray(x)).all() for x in leaves)


@pytest.mark.parametrize("script", JAX_LATER)
@pytest.mark.parametrize("save_every", ["", "--save-every 0"])
def test_nan_at_once_names_no_checkpoint(script, save_every, main):
    status, err = main(script, f"{TINY[script]} {toy('NanAtOnce')} {save_every}")
    assert status == 1 and err.count("\n") == 1 and "Traceback" not in err
    assert "of environment 0 not finite by step" in err and "no checkpoint was saved" in err
    assert not list(Path("runs").glob("*/checkpoint*"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_out_of_memory(script, main, monkeypatch):
    """As a GPU reports it; in JAX, a lost host and much else too."""
    module = importlib.import_module(script)
    error = module.jax.errors.JaxRuntimeError if script in JAX else module.torch.OutOfMemoryError
    monkeypatch.setattr(module, "update", Mock(side_effect=error("no room")))
    assert main(script, TINY[script]) == (1, "error: no room; no checkpoint was saved\n")
    monkeypatch.setattr(module, "learn", lambda *_: np.empty(2**50))  # NumPy's error cannot be made from a message
    status, err = main(script, TINY[script])
    assert status == 1 and re.fullmatch("error: Unable to allocate .*; no checkpoint was saved\n", err)


@pytest.mark.parametrize("script", SCRIPTS)
def test_fault_in_the_script_keeps_its_traceback(script, monkeypatch):
    """NumPy's error for shapes that do not fit is a ValueError too: whoever changes a script is to see the line."""
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "learn", lambda *_: np.zeros(2) + np.zeros(3))
    monkeypatch.setattr(sys, "argv", [script, *TINY[script].split()])
    with pytest.raises(RuntimeError, match="an error in the script") as raised:
        module.main()
    assert "could not be broadcast" in str(raised.value.__cause__)


@pytest.mark.filterwarnings("ignore:overflow")  # float32 ends at 3.4e38
@pytest.mark.parametrize("script", JAX_LATER)
def test_checkpoint_of_finite_weights(script):
    """A step of 1e39 makes weights that are not finite, and no later loss would show it: it is not saved."""
    words = f"{TINY[script]} --learning-rate 1e39 --total-timesteps 32 --save-every 0"
    if script in ACTOR_CRITIC:
        words += " --num-minibatches 1 --update-epochs 1"
    module = importlib.import_module(script)
    with pytest.raises(FloatingPointError, match=r"^iteration \d+: .*actor.* not finite; no checkpoint was saved$"):
        module.train(module.tyro.cli(module.Args, args=words.split()))
    assert not list(Path("runs").glob("*/*.pt")) and not list(Path("runs").glob("*/*.msgpack"))


# ===================================================== Environments ===================================================

BROKEN = {
    "start": "environment 1, its step 0: OSError: the simulator is gone",
    "reset": "environment 1, its step 3: OSError: the simulator is gone",
    "step": "environment 1, its step 3: ZeroDivisionError: a mass of zero",
    "shape": "environment 1, its step 3: ValueError: observation of shape (4,), not (3,)",
    "nan": "obs of environment 1 not finite by step 6",
    "reward": "reward of environment 1 not finite by step 6",
    "evaluation": "environment of the evaluation, its step 3: ZeroDivisionError: a mass of zero",
    "evaluation-reward": "a return of the evaluation is not finite",
}


@pytest.mark.parametrize("script", JAX_LATER)
@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("envs", ["", pytest.param("--async-envs", marks=pytest.mark.slow)])
def test_environment_that_breaks(script, how, envs, main):
    """Its own message, which environment and which step; nothing stays of one that cannot start."""
    status, err = main(script, f"{TINY[script]} --seed 1 {envs} {toy(f'Broken{how.title()}')}")
    assert status == 1 and err.count("\n") == 1 and "Traceback" not in err, err
    assert err.startswith(f"error: {BROKEN[how]}"), err
    assert ("(probe_envs.py:" in err) == (how in ("start", "reset", "step", "evaluation"))
    if how == "start":
        assert not Path("runs").exists()
    else:
        (run_dir,) = Path("runs").iterdir()
        left = str(run_dir / "checkpoint.") if "evaluation" in how else "no checkpoint was saved"
        assert left in err


@pytest.mark.parametrize("script", PPO_FIRST)
def test_environment_process_killed(script, tmp_path):
    """As by a system short of memory: an error at once, where Gymnasium would wait for that process for ever."""
    command = [sys.executable, ROOT / f"{script}.py", *TINY[script].split(), "--seed", "1", "--async-envs"]
    command += ["--env-id", "tests.probe_envs:BrokenKilled-v0"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1
    assert process.stderr == "error: the process of an environment has ended; no checkpoint was saved\n"
