"""Parts of the scripts by themselves, where a whole run would be slow or has to be compiled."""

import importlib
import json
import sys
import zlib

import gymnasium as gym
import numpy as np
import pytest

from tests.probe_envs import UNLUCKY_SEEDS

SCRIPTS = ("reinforce", "vpg_advantage", "ppo", "reinforce_jax", "vpg_advantage_jax", "ppo_jax")
JAX_SCRIPTS = SCRIPTS[3:]
each_script = pytest.mark.parametrize("script", SCRIPTS)
each_jax_script = pytest.mark.parametrize("script", JAX_SCRIPTS)


@each_script
@pytest.mark.parametrize(
    ("how", "steps", "says"),
    [
        ("Start", 0, "environment 7, its step 0: OSError: the simulator is gone"),
        ("Step", 3, "environment 7, its step 3: ZeroDivisionError: a mass of zero"),
        ("Shape", 3, r"environment 7, its step 3: ValueError: observation of shape \(4,\), not \(3,\)"),
        ("Old", 0, "environment 7, its step 0: ValueError: reset must return obs, info, and step obs, reward, .*"),
    ],
)
def test_named(script, how, steps, says):
    """An exception says where it is from, on one line; its cause is kept."""
    module = importlib.import_module(script)
    env = module.make_env(module.Args(env_id=f"tests.probe_envs:Broken{how}-v0"), index=7)
    with pytest.raises(gym.error.Error, match=rf"^{says} \((probe_envs|{script}).py:\d+\)$") as raised:
        env.reset(seed=int(UNLUCKY_SEEDS[0]))
        for _ in range(steps):
            env.step(0)
    assert raised.value.__cause__ is not None


@each_script
def test_make_env_keeps_gymnasiums_types(script):
    """One's own loop may ask `terminated is True` or `~truncated`, whatever numbers the environment gave."""
    module = importlib.import_module(script)
    env = module.make_env(module.Args(env_id="CartPole-v1", max_episode_steps=1))
    obs, info = env.reset(seed=0)
    assert isinstance(obs, np.ndarray) and info == {}
    _, reward, terminated, truncated, _ = env.step(0)
    assert isinstance(reward, float) and terminated is False and truncated is True


@each_script
@pytest.mark.parametrize("name", ["obs", "reward"])
def test_check_finite(script, name):
    """The first number that is none, of the batch [T = 3, N = 2]: its quantity, environment and step."""
    module = importlib.import_module(script)
    agents = (1,) if script in JAX_SCRIPTS else ()
    fields = dict.fromkeys(module.Batch._fields, np.zeros((*agents, 3, 2)))
    fields |= {"step": np.array([2, 4, 6]).reshape(*agents, 3)}
    module.check_finite(module.Batch(**fields))
    wrong = np.zeros((*agents, 3, 2))
    wrong[..., 1, 1] = wrong[..., 2, 0] = np.nan
    with pytest.raises(FloatingPointError, match=f"{name} of environment 1 not finite by step 4"):
        module.check_finite(module.Batch(**(fields | {name: wrong})))


@pytest.mark.parametrize("script", JAX_SCRIPTS[1:])
@pytest.mark.parametrize(
    ("size", "backend", "parts"),
    [(1, "cpu", 1), (4096, "cpu", 1), (5120, "cpu", 10), (4099, "cpu", 1), (5120, "gpu", 1)],  # 4,099 is prime
)
def test_in_parts(script, size, backend, parts, monkeypatch):
    """Every row once, in order or averaged, in parts of 256 to 512; all at once where they are few, or on a GPU."""
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    module, rows = importlib.import_module(script), np.arange(2 * size).reshape(size, 2)
    seen = []

    def function(data):
        seen.append(data["a"].shape)
        return data["a"].sum(1), data["b"]

    data = {"a": rows, "b": rows[:, 0]}
    total, first = module.in_parts(function, data, mean=False)
    assert seen == [(size // parts, 2)]  # traced once
    assert np.array_equal(total, rows.sum(1)) and np.array_equal(first, rows[:, 0])
    mean = module.in_parts(lambda data: data["a"].mean(0), data, mean=True)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-6)


@each_jax_script
@pytest.mark.parametrize("flags", [{"seed": 2**32 - 1, "num_seeds": 2}, {"num_seeds": 2, "capture_video": True}])
def test_many_seeds_have_limits(script, flags):
    module = importlib.import_module(script)
    with pytest.raises(ValueError, match="--num-seeds"):
        module.check_args(module.Args(**flags))


@each_jax_script
def test_load_refuses(script, tmp_path):
    """A checkpoint is read if it is whole, and of this script, environment and network; else a line says why."""
    import jax.numpy as jnp
    from flax import serialization

    module, path = importlib.import_module(script), tmp_path / "checkpoint.msgpack"
    args, state = module.Args(resume=str(path)), {"x": jnp.zeros(3)}

    def write(identity, content, damage=0):
        meta, packed = json.dumps({"identity": identity, "recent_returns": [[1.5]]}), serialization.to_bytes(content)
        crc32 = zlib.crc32(meta.encode() + packed) + damage
        path.write_bytes(serialization.msgpack_serialize({"meta": meta, "state": packed, "crc32": crc32}))

    def refused(message):
        with pytest.raises(ValueError, match=f"--resume {path}: {message}"):
            module.load(state, [[]], args)

    ours = module.identity(args)
    refused("does not exist")
    path.write_bytes(b"\x93not a checkpoint")
    refused("not a readable checkpoint")
    write(ours, {"x": np.ones(3, np.float32)}, damage=1)
    refused("not a readable checkpoint")
    write(ours | {"script": "other.py"}, {"x": np.ones(3, np.float32)})
    refused("its script is other.py, this run's is ")
    write(ours | {"format": 2}, {"x": np.ones(3, np.float32)})
    refused("its format is 2, this run's is 1")
    for other in ({"x": np.ones(4, np.float32)}, {"x": np.ones(3, np.float64)}, {"y": np.ones(3, np.float32)}):
        write(ours, other)
        refused("does not fit this run")
    write(ours, {"x": np.ones(3, np.float32)})
    returns = []
    loaded, folder = module.load(state, [returns], args)
    assert np.array_equal(loaded["x"], np.ones(3)) and returns == [1.5] and folder == tmp_path


@each_script
def test_main_says_one_line(script, monkeypatch, capsys):
    """Status 2 for what the user got wrong, 1 for a failure during the run, 130 for Ctrl-C."""
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [script])
    failures = {ValueError("--x"): 2, gym.error.Error("x"): 1, FloatingPointError("x"): 1, OSError("x"): 1}
    for failure, status in (failures | {KeyboardInterrupt(): 130}).items():

        def fail(_, failure=failure):
            raise failure

        monkeypatch.setattr(module, "train", fail)
        with pytest.raises(SystemExit) as stopped:
            module.main()
        assert stopped.value.code == status
        assert capsys.readouterr().err == (f"error: {failure}\n" if status != 130 else "")
