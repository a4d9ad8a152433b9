"""torch.compile, and several processes started by torchrun."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import ppo
import reinforce
import vpg_advantage

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = ["--num-envs", "4", "--num-steps", "16", "--total-timesteps", "640", "--eval-episodes", "3"]

actor_critic = pytest.mark.parametrize("script", [pytest.param("vpg_advantage", marks=pytest.mark.slow), "ppo"])


def run(*command, cwd, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


def checkpoint(folder):
    (path,) = Path(folder).glob("runs/*/checkpoint.pt")
    return torch.load(path, weights_only=True)


# ====================================================== torchrun ======================================================

# `train` on batches that are made up, the same for any number of processes: each is given the columns of its own
# environments. What is played is then no matter of whose random numbers drew the actions.
PLAYED = """
import sys
import numpy as np

script = __import__(sys.argv[1])


def rollout(state, envs, args):
    rank, size = script.processes()
    rng = np.random.default_rng(state.iteration)
    shape = args.num_steps, args.num_envs
    obs, next_obs = rng.normal(size=(2, *shape, 4)).astype(np.float32)
    scalars = rng.normal(size=shape), *(rng.random((2, *shape)) < 0.1), *rng.normal(size=(2, *shape))
    reward, terminated, truncated, episode_return, episode_length = (x.astype(np.float32) for x in scalars)
    step = state.step + args.num_envs * np.arange(1, args.num_steps + 1)
    whole = script.Batch(obs, rng.integers(2, size=shape), reward, next_obs, terminated, truncated, step,
                         episode_return, episode_length)
    own = slice(rank * args.num_envs // size, (rank + 1) * args.num_envs // size)
    return state, script.Batch(*(x[:, own] if x.ndim > 1 else x for x in whole))


script.rollout = rollout
kl = {"target_kl": 0.002} if sys.argv[1] == "ppo" else {}
script.train(script.Args(num_envs=4, num_steps=16, num_minibatches=4, update_epochs=5, total_timesteps=640,
                         norm_adv=True, norm_obs=True, norm_reward=True, learning_rate=1e-3, eval_episodes=0, **kl))
"""


@actor_critic
def test_two_processes_do_what_one_does(script, tmp_path):
    """Half of the environments and half of every minibatch each, but the same run: weights, optimiser, statistics and
    returns. The gradients' halves are summed in another order: a few float32 roundings, and what Adam makes of them."""
    (tmp_path / "played.py").write_text(PLAYED)
    for folder, launcher in (("one", [sys.executable]), ("two", TORCHRUN)):
        (tmp_path / folder).mkdir()
        run(*launcher, "../played.py", script, cwd=tmp_path / folder)
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one["step"] == two["step"] == 640
    assert one["recent_returns"] == two["recent_returns"]
    for name, weight in one["agent"].items():
        torch.testing.assert_close(two["agent"][name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    steps = [[s["step"].item() for s in x["optimizer"]["state"].values()] for x in (one, two)]
    assert steps[0] == steps[1]  # --target-kl ended the same updates after the same epoch
    if script == "ppo":
        assert steps[0][0] < 10 * 5 * 4


@pytest.mark.slow
@actor_critic
def test_torchrun(script, tmp_path):
    """One folder, one evaluation, episodes of all environments, and it resumes."""
    command = [*TORCHRUN, ROOT / f"{script}.py", *SMALL]
    done = run(*command, cwd=tmp_path)
    (run_dir,) = tmp_path.glob("runs/*")
    assert done.stdout.splitlines()[-1].endswith(run_dir.name)
    assert done.stdout.count("evaluation:") == 1
    assert sorted(path.name.split(".")[0] for path in run_dir.iterdir()) == ["args", "checkpoint", "events"]
    assert checkpoint(tmp_path)["step"] == 640
    # 160 steps of each of the 4 environments, in episodes of about 20
    assert len(checkpoint(tmp_path)["recent_returns"]) > 16

    run(*command, "--resume", run_dir, "--total-timesteps", "960", cwd=tmp_path)
    assert checkpoint(tmp_path)["step"] == 960
    assert len(list(tmp_path.glob("runs/*"))) == 1


@pytest.mark.slow
@actor_critic
@pytest.mark.parametrize("save_every", [0, 1])
def test_fault_in_one_process(script, save_every, tmp_path):
    """The second says what happened, the first that it is alone, and which checkpoint is left."""
    toy = ["--env-id", "tests.probe_envs:BrokenReset-v0", "--seed", "1", "--num-envs", "2", "--num-steps", "1"]
    words = [*toy, "--total-timesteps", "640", "--num-minibatches", "1", "--save-every", str(save_every)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, ROOT / f"{script}.py", *words]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    errors = sorted(line for line in done.stderr.splitlines() if line.startswith("error: "))
    (run_dir,) = tmp_path.glob("runs/*")
    left = f"the last good checkpoint is {run_dir.relative_to(tmp_path)}/checkpoint.pt"
    left = left if save_every else "no checkpoint was saved"
    assert errors[0] == f"error: another process has ended; {left}", done.stderr
    fault = r"error: environment 1, its step 3: OSError: the simulator is gone \(probe_envs\.py:\d+\)"
    assert len(errors) == 2 and re.fullmatch(fault, errors[1]), done.stderr
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1  # torchrun's own


@pytest.mark.slow
@actor_critic
def test_process_lost_in_an_update(script, tmp_path):
    """The first process, which waits for gradients then, says so in one line too."""
    (tmp_path / "lose.py").write_text(
        f"import os, sys, {script} as module\n"
        "average, calls = module.average, []\n"
        "def average_or_die(tensors):\n"
        "    calls.append(tensors)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 3:\n"
        "        raise MemoryError('no room')\n"
        "    average(tensors)\n"
        "module.average = average_or_die\n"
        "module.main()\n"
    )
    words = "--num-envs 2 --num-steps 8 --total-timesteps 160 --num-minibatches 1 --update-epochs 1 --save-every 1"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*map(str, TORCHRUN), "lose.py", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    errors = sorted(line for line in done.stderr.splitlines() if line.startswith("error: "))
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    left = f"the last good checkpoint is {path.relative_to(tmp_path)}"
    assert errors == [f"error: another process has ended; {left}", "error: no room"], done.stderr


@pytest.mark.slow
def test_processes_play_different_episodes(tmp_path):
    """Neither the environments nor the actions of one process are those of the other."""
    code = (
        "import ppo, numpy as np\n"
        "rollout = ppo.rollout\n"
        "def recorded(state, envs, args):\n"
        "    state, batch = rollout(state, envs, args)\n"
        "    np.savez(f'rank{ppo.processes()[0]}_{state.iteration}.npz', obs=batch.obs, action=batch.action)\n"
        "    return state, batch\n"
        "ppo.rollout = recorded\n"
        "ppo.train(ppo.Args(num_envs=4, num_steps=64, total_timesteps=256, eval_episodes=0))\n"
    )
    (tmp_path / "record.py").write_text(code)
    run(*TORCHRUN, "record.py", cwd=tmp_path)
    one, two = (np.load(tmp_path / f"rank{rank}_0.npz") for rank in (0, 1))
    assert len(np.unique(np.concatenate([one["obs"][0], two["obs"][0]], 0), axis=0)) == 4
    actions = np.concatenate([one["action"], two["action"]], 1).T
    assert len(np.unique(actions, axis=0)) == 4


@pytest.mark.slow
@actor_critic
def test_a_signal_to_one_process_stops_all(script, tmp_path):
    """No process waits for another for ever: all end the iteration, one saves."""
    command = [*TORCHRUN, str(ROOT / f"{script}.py"), *SMALL, "--total-timesteps", "100000000"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        while not list(tmp_path.glob("runs/*/events*")):
            assert process.poll() is None
            time.sleep(0.2)
        time.sleep(3)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert err.count("go on with these flags and --resume runs/") == 1
    assert 0 < checkpoint(tmp_path)["step"] < 100_000_000


@pytest.mark.parametrize("script", [vpg_advantage, ppo])
@pytest.mark.parametrize("flags", [{"num_envs": 3}, {"num_envs": 2, "num_steps": 3, "num_minibatches": 2}])
def test_processes_that_do_not_divide(script, flags, monkeypatch):
    monkeypatch.setattr(script, "processes", lambda: (0, 2))
    with pytest.raises(ValueError, match="--num-envs"):
        script.check_args(script.Args(**flags))


@pytest.mark.parametrize("script", [vpg_advantage, ppo])
@pytest.mark.parametrize(("cuda", "backend"), [(False, "gloo"), (True, "cpu:gloo,cuda:nccl")])
def test_messages_between_processes(script, cuda, backend, monkeypatch):
    """Batches are gathered in main memory, also where there is a GPU; left to itself, PyTorch would choose NCCL alone
    on every machine that has one."""
    asked = Mock(return_value=None)
    monkeypatch.setattr(script, "processes", lambda: (0, 2))
    monkeypatch.setattr(script.dist, "init_process_group", asked)
    for name, value in {"is_available": True, "device_count": 2, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, Mock(return_value=value))
    assert script.pick_device(script.Args(cuda=cuda)).type == ("cuda" if cuda else "cpu")
    asked.assert_called_once_with(backend)


# ====================================================== --compile =====================================================


@pytest.mark.parametrize(
    "script",
    [ppo, *(pytest.param(script, marks=pytest.mark.slow) for script in (vpg_advantage, reinforce))],
)
@pytest.mark.parametrize("env_id", ["CartPole-v1", pytest.param("Pendulum-v1", marks=pytest.mark.slow)])
def test_compiled_is_eager(script, env_id, tmp_path, monkeypatch):
    """The same actions are drawn and the same weights come out, to the rounding of fused kernels."""
    monkeypatch.chdir(tmp_path)
    sizes = {"num_envs": 2} if script is reinforce else {"num_envs": 2, "num_steps": 32}
    flags = {"env_id": env_id, "total_timesteps": 128, "eval_episodes": 0, "ent_coef": 0.01, **sizes}
    torch._dynamo.utils.counters.clear()
    calls, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kw: calls.append(args) or compile_(*args, **kw))
    eager = script.train(script.Args(**flags))
    assert not calls
    compiled = script.train(script.Args(**flags, compile=True))
    assert [function for (function,) in calls] == [script.backward]
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):  # loss, gradient and clipping are one graph
        assert not torch._dynamo.utils.counters["graph_break"]
    np.testing.assert_array_equal(compiled.episode_returns, eager.episode_returns)
    for ours, theirs in zip(compiled.agent.parameters(), eager.agent.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert json.loads((compiled.run_dir / "args.json").read_text())["compile"]
