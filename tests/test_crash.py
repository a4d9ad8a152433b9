"""Runs that are killed, or whose disk fails: the last checkpoint is whole, and from it a run goes on."""

import errno
import importlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = ("reinforce", "vpg_advantage", "ppo", "reinforce_jax", "vpg_advantage_jax", "ppo_jax")
ROOT = Path(__file__).parents[1]
SMALL = "--num-envs 2 --hidden-sizes 8 --eval-episodes 0 --save-every 2 --total-timesteps 100000"
TINY = {script: f"{SMALL} --num-steps 16 --num-minibatches 2" for script in SCRIPTS}
TINY |= {script: f"{SMALL} --max-episode-steps 16" for script in SCRIPTS if script.startswith("reinforce")}
# Runs a script whose checkpoints are written a piece at a time, and notes each iteration before it is saved.
SLOW_WRITER = """
import sys, time
from pathlib import Path
import numpy as np
script, journal = sys.argv[1:3]
module = __import__(script)
class Slow:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def fileno(self): return self.file.fileno()
    def write(self, content):
        for i in range(0, len(content), 2048):
            self.file.write(content[i : i + 2048])
            self.file.flush()
            time.sleep(0.01)
open_file, save = Path.open, module.save
def open_slowly(path, *args, **options):
    file = open_file(path, *args, **options)
    return Slow(file) if path.name.startswith("partial") else file
def noted_save(state, *args):
    with open(journal, "a") as file:
        print(int(np.max(state.iteration)), file=file)
    save(state, *args)
Path.open, module.save = open_slowly, noted_save
sys.argv = [script, *sys.argv[3:]]
module.main()
"""


def iteration(script: str, path: Path) -> int:
    """Of the checkpoint at `path`."""
    if script.endswith("_jax"):
        from flax.serialization import msgpack_restore

        return int(np.max(msgpack_restore(msgpack_restore(path.read_bytes())["state"])["iteration"]))
    import torch

    return torch.load(path, weights_only=True)["iteration"]


def resume(script: str, path: Path, words: str = ""):
    module = importlib.import_module(script)
    return module.train(
        module.tyro.cli(module.Args, args=[*TINY[script].split(), "--resume", str(path), *words.split()])
    )


def kill_often(script: str, kills: int) -> Path:
    """Kill a run, resume it, kill it, ... at random moments, half of which are in a write. Returns its folder."""
    rng, journal, checkpoint, torn = random.Random(0), Path("journal"), None, 0
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    for _ in range(kills):
        words = TINY[script].split() + (["--resume", str(checkpoint.parent)] if checkpoint else [])
        before = iteration(script, checkpoint) if checkpoint else 0
        journal.write_text("")
        command = [sys.executable, "-c", SLOW_WRITER, script, str(journal), *words]
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 100
        while len(journal.read_text().split()) < 2:  # the first save is over: in the first run there is none before
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        checkpoint = checkpoint or next(Path("runs").glob("*/checkpoint.*"))
        partial = checkpoint.with_name(checkpoint.name.replace("checkpoint", "partial"))
        torn += partial.exists() and partial.stat().st_size < checkpoint.stat().st_size
        began = int(journal.read_text().split()[-1])  # to save this iteration
        saved = iteration(script, checkpoint)
        assert saved in (began, began - 2) and saved > before, "more than one interval of --save-every lost"
        assert sum(path.stat().st_size for path in checkpoint.parent.glob("partial*")) <= 2 * checkpoint.stat().st_size
    assert torn or kills < 10, "no write was interrupted"
    return checkpoint.parent


def ends_as_the_uninterrupted_run(script: str, run_dir: Path) -> None:
    """Ten iterations on, a folder that was killed and one that was not."""
    jax, module = importlib.import_module("jax"), importlib.import_module(script)
    total = 2 * 16 * (iteration(script, run_dir / "checkpoint.msgpack") + 10)
    words = f"--total-timesteps {total} --no-anneal-lr"
    killed = resume(script, run_dir, words)
    whole = module.train(module.tyro.cli(module.Args, args=[*TINY[script].split(), *words.split()]))
    leaves = [jax.tree.leaves(result.agent) for result in (killed, whole)]
    assert all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


@pytest.mark.parametrize("script", ["ppo", pytest.param("ppo_jax", marks=pytest.mark.slow)])
def test_killed_twice(script):
    run_dir = kill_often(script, 2)
    step = 32 * (iteration(script, next(run_dir.glob("checkpoint*"))) + 2)
    assert (resume(script, run_dir, f"--total-timesteps {step}").episode_steps <= step).all()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ppo", "reinforce", "vpg_advantage_jax", "ppo_jax"])
def test_killed_fifty_times(script, monkeypatch):
    monkeypatch.setitem(TINY, script, TINY[script] + " --no-anneal-lr")  # the length of the run is not known before
    run_dir = kill_often(script, 50)
    if script.endswith("_jax"):
        ends_as_the_uninterrupted_run(script, run_dir)
    else:
        last = 32 * (iteration(script, run_dir / "checkpoint.pt") + 2)
        resume(script, run_dir, f"--total-timesteps {last}")


@pytest.mark.parametrize(
    "script", [pytest.param(s, marks=[] if s.startswith("ppo") else [pytest.mark.slow]) for s in SCRIPTS]
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_disk_fails(script, number, capsys):
    """The disk full in the middle of the second save, or the folder read-only: one line, and the first one is whole."""
    module, calls, fsync, open_file = importlib.import_module(script), [], os.fsync, Path.open

    def failing(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(number, os.strerror(number))
        return fsync(*args)

    def opening(path, *args, **options):
        if path.name.startswith("partial") and number == errno.EROFS and calls:
            raise OSError(number, os.strerror(number), str(path))
        return open_file(path, *args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(os, "fsync", failing)
        patch.setattr(Path, "open", opening)
        patch.setattr(sys, "argv", [script, *TINY[script].split()])
        module.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and err.count("\n") == 1 and os.strerror(number) in err, err
    (path,) = Path("runs").glob("*/checkpoint.*")
    assert not list(path.parent.glob("partial.*"))  # the log needs the room
    assert f"the last good checkpoint is {path}" in err and iteration(script, path) == 2
    resume(script, path, "--eval-only")
