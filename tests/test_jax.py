"""What only the JAX scripts have: environments in the program, many seeds, one compilation, exact resuming."""

import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import gymnasium as gym
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPTS = ("reinforce_jax", "vpg_advantage_jax", "ppo_jax")
ROOT = Path(__file__).parent.parent
# What takes long and is the same code in all: ppo_jax among the fast tests, the others among the slow ones.
MOSTLY_SLOW = [pytest.param(s, marks=[] if s == "ppo_jax" else pytest.mark.slow) for s in SCRIPTS]


def small_args(module, **flags):
    """A run of some iterations on short episodes; one hidden layer, for the compiler's sake."""
    flags = {"num_envs": 4, "total_timesteps": 640, "hidden_sizes": (8,), "eval_episodes": 2, "save_every": 0} | flags
    if "num_steps" in module.Args.__dataclass_fields__:
        flags = {"num_steps": 16} | flags
    return module.Args(**flags)


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


# The state of each environment: how Gymnasium holds it, from gymnax's fields, and bounds to draw it from.
STATES = {
    "CartPole-v1": (("x", "x_dot", "theta", "theta_dot"), (2.4, 2.0, 0.2, 2.0)),
    "Pendulum-v1": (("theta", "theta_dot"), (3.1, 8.0)),
    "Acrobot-v1": (("joint_angle1", "joint_angle2", "velocity_1", "velocity_2"), (3.1, 3.1, 4.0, 9.0)),
    "MountainCar-v0": (("position", "velocity"), (1.2, 0.07)),
    "MountainCarContinuous-v0": (("position", "velocity"), (1.2, 0.07)),
}


@pytest.mark.parametrize("env_id", STATES)
def test_gymnax_steps_as_gymnasium(env_id):
    """From one state and one action both give one observation, reward and end; to float32 against float64."""
    ppo_jax = importlib.import_module("ppo_jax")
    envs = ppo_jax.GymnaxEnvs(ppo_jax.Args(env_id=env_id), 1)
    host = ppo_jax.make_env(ppo_jax.Args(env_id=env_id))
    host.reset(seed=0)
    names, bounds = STATES[env_id]
    rng = np.random.default_rng(0)
    states, _ = envs.reset(jax.random.PRNGKey(0))
    step = jax.jit(envs.step)
    ends = 0
    for i in range(300):
        x = rng.uniform(-1, 1, len(names)) * bounds
        if env_id == "MountainCarContinuous-v0":  # gymnax stops the car at the goal, and not at the left wall, -1.2
            x = x.clip((-1.1, -0.07), (0.5, 0.07)) * (1, 1 if x[0] < 0.35 else np.sign(x[1]))
        x = x.astype(np.float32)
        action = rng.integers(host.action_space.n) if hasattr(host.action_space, "n") else rng.uniform(-1.5, 1.5, 1)
        action = np.asarray(action, np.int64 if np.ndim(action) == 0 else np.float32)
        inner = states.env_state.replace(**dict(zip(names, x[:, None], strict=True)), time=jnp.array([i % 100]))
        _, _, reward, terminated, truncated, info = step(
            jax.random.PRNGKey(i), states.replace(env_state=inner), jnp.asarray(action[None])
        )
        host.unwrapped.state = x.astype(np.float64)
        if env_id == "CartPole-v1":
            host.unwrapped.steps_beyond_terminated = None
        obs, host_reward, host_terminated, _, _ = host.unwrapped.step(np.asarray(host.func(action)))
        np.testing.assert_allclose(info["final_observation"][0], obs, rtol=1e-4, atol=1e-4)
        inside = env_id != "CartPole-v1" or (abs(x[0]) < 2.4 and abs(x[2]) < 0.2)  # it rewards by the state left
        if inside:
            np.testing.assert_allclose(reward[0], host_reward, rtol=1e-4, atol=1e-4)
        assert bool(terminated[0]) == bool(host_terminated)
        assert not truncated[0]
        ends += bool(host_terminated)
    assert (ends > 0) == (env_id != "Pendulum-v1")


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_gymnax_time_limit(env_id):
    """At the limit truncated alone is set, the last observation is in the info and the next one is a start."""
    ppo_jax = importlib.import_module("ppo_jax")
    envs = ppo_jax.GymnaxEnvs(ppo_jax.Args(env_id=env_id), 2)
    limit = gym.spec(env_id).max_episode_steps
    assert int(envs.params.max_steps_in_episode) == limit
    states, _ = envs.reset(jax.random.PRNGKey(0))
    upright = {"x": 0.0, "x_dot": 0.0, "theta": 0.0, "theta_dot": 0.0} if env_id == "CartPole-v1" else {}
    inner = states.env_state.replace(time=jnp.array([limit - 1, 3]), **{k: jnp.zeros(2) for k in upright})
    action = jnp.zeros(2, jnp.int32) if upright else jnp.zeros((2, 1))
    states, obs, _, terminated, truncated, info = envs.step(
        jax.random.PRNGKey(1), states.replace(env_state=inner), action
    )
    assert truncated.tolist() == [1, 0]
    assert terminated.tolist() == [0, 0]
    np.testing.assert_array_equal(states.env_state.time, [0, 4])
    assert not np.array_equal(obs[0], info["final_observation"][0])
    np.testing.assert_array_equal(obs[1], info["final_observation"][1])


@pytest.mark.parametrize("backend", ["gymnax", "gymnasium"])
@pytest.mark.parametrize("script", MOSTLY_SLOW)
def test_each_program_compiles_once(script, backend, monkeypatch):
    """Every function that a run compiles serves all its iterations, from the first state to the last."""
    import gymnax.wrappers  # noqa: F401, so that it compiles nothing of its own under the recorder

    module, made, jit = importlib.import_module(script), {}, jax.jit

    def recording(function, **kwargs):
        made[str(function)] = jit(lambda *args: function(*args), **kwargs)  # with a cache of its own
        return made[str(function)]

    monkeypatch.setattr(jax, "jit", recording)
    result = module.train(small_args(module, env_backend=backend))
    assert result.episode_steps[-1] > 320  # more than one iteration
    sizes = {name: function._cache_size() for name, function in made.items()}
    assert len(sizes) >= 3 and set(sizes.values()) == {1}, sizes


@pytest.mark.parametrize("script", MOSTLY_SLOW)
def test_seeds_follow_their_single_runs(script):
    """Agent i of --num-seeds starts as the run of seed + i and is where that one is after ten iterations."""
    module = importlib.import_module(script)
    args = small_args(module, seed=5, num_seeds=2, learning_rate=1e-3)
    both = module.train(args)
    singles = [module.train(small_args(module, seed=seed, learning_rate=1e-3)) for seed in (5, 6)]
    for i, single in enumerate(singles):
        for x, y in zip(leaves(both.agent), leaves(single.agent), strict=True):
            np.testing.assert_allclose(x[i], y, atol=1e-5)
        np.testing.assert_array_equal(both.episode_returns[i], single.episode_returns)
        np.testing.assert_array_equal(both.episode_steps[i], single.episode_steps)
    assert not np.array_equal(both.episode_returns[0], both.episode_returns[1])


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_seeds_share_the_devices(script):
    """Four agents on two devices are what they are on one, each device having two of them."""
    module = importlib.import_module(script)
    code = f"""
import os, sys
import jax, numpy as np, {script} as module
os.sched_getaffinity = lambda _: range(int(sys.argv[1]))
args = module.Args(num_seeds=4, num_envs=4, total_timesteps=5120, hidden_sizes=(8,), eval_episodes=2)
state = jax.jit(module.over_seeds(jax.random.PRNGKey, args, module.pick_devices(args)))(np.arange(4, dtype=np.uint32))
assert len(state.sharding.device_set) == int(sys.argv[1])
result = module.train(args)
np.savez(sys.argv[1], *jax.tree.leaves(result.agent), result.eval_returns, *result.episode_steps)
"""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    for devices in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, devices], check=True, env=environ)
    one, two = np.load("1.npz"), np.load("2.npz")
    assert len(one) == len(two) > 5
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-4)
    args = module.Args(num_seeds=8)
    assert [module.even_share(args, n) for n in (1, 2, 3, 6, 64)] == [1, 2, 2, 4, 8]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_seeds_share_the_hosts(script, tmp_path):
    """Two processes, connected by jax.distributed, train the four agents that one trains; the first of them writes the
    one folder and speaks."""
    flags = ["--num-seeds", "4", "--num-envs", "4", "--total-timesteps", "5120", "--hidden-sizes", "8"]
    command = [sys.executable, ROOT / f"{script}.py", *flags, "--eval-episodes", "2"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts, outputs = [], []
    for rank in (0, 1):
        environ = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(rank),
            "TQDM_DISABLE": "",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        hosts.append(subprocess.Popen(command, env=os.environ | environ, cwd=tmp_path, **pipes))
    for host in hosts:
        outputs.append(host.communicate(timeout=200))
        assert host.returncode == 0, outputs[-1][1]
    (run_dir,) = tmp_path.glob("runs/*")
    gloo = ("[Gloo]", "peer ranks")  # whose line may come in two
    spoken = [
        [line for line in out.splitlines() if line and not any(word in line for word in gloo)] for out, _ in outputs
    ]
    assert spoken[0][-1].endswith(run_dir.name) and len(spoken[0]) == 5
    assert not spoken[1] and "steps" in outputs[0][1] and "steps" not in outputs[1][1]

    alone = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()
    assert alone[:4] == spoken[0][:4]
    states = []
    for path in (run_dir, tmp_path / alone[-1]):
        saved = serialization.msgpack_restore((path / "checkpoint.msgpack").read_bytes())
        states.append(serialization.msgpack_restore(saved["state"]))
    for one, two in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_fault_on_one_host(script, tmp_path):
    """A full disk of the first host ends both processes at once, and not after JAX's five minutes."""
    code = f"""
import errno, os, sys
import {script} as module
calls, fsync = [], os.fsync
def full(*args):
    calls.append(args)
    if len(calls) > 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return fsync(*args)
os.fsync = full if os.environ["JAX_PROCESS_ID"] == "0" else fsync
sys.argv[1:] = "--num-seeds 4 --num-envs 4 --total-timesteps 1000000 --hidden-sizes 8 --save-every 2".split()
module.main()
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = []
    for rank in ("0", "1"):
        environ = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": rank}
        words = [sys.executable, "-c", code]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        hosts.append(subprocess.Popen(words, env=environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, **pipes))
    errors = [host.communicate(timeout=120)[1] for host in hosts]
    assert hosts[0].returncode == 1 and hosts[1].returncode != 0
    assert "No space left on device; the last good checkpoint is runs/" in errors[0] and "Traceback" not in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_environments_share_the_devices(script):
    """--shard-envs: one agent with three of its six environments on each of two devices is what it is on one, and its
    program is compiled once. A minibatch takes one round of messages, of one array: with one for each of its weights
    two devices of a CPU were slower than one."""
    code = f"""
import os, sys
import jax, numpy as np, {script} as module
os.sched_getaffinity = lambda _: range(2)
flags = dict(num_envs=6, num_steps=64, num_minibatches=2, total_timesteps=3840, hidden_sizes=(8,), eval_episodes=2)
args = module.Args(**flags, norm_obs=True, norm_reward=True, shard_envs=sys.argv[1] == "2")
steps, make = [], module.make_train_step
module.make_train_step = lambda *args: steps.append(make(*args)) or steps[0]
states, metrics, learn = [], [], module.learn

def learn_and_look(state, recent_returns, train_step, *rest):
    states.append(state)
    program = train_step.lower(state).compile().as_text().splitlines()
    of_minibatches = [line for line in program if "while/body/closed_call" in line]
    talks = (" all-reduce(", " all-gather(", " all-to-all(", " collective-permute(")
    messages = [line for line in of_minibatches if any(talk in line for talk in talks)]
    assert len(messages) == (sys.argv[1] == "2") and all("= f32[" in line for line in messages), messages

    def step(state):
        *outcome, of_iteration = train_step(state)
        metrics.extend(of_iteration.values())  # Adam hides a gradient that is too long
        return *outcome, of_iteration

    return learn(state, recent_returns, step, *rest)

module.learn = learn_and_look
result = module.train(args)
assert {{len(x.sharding.device_set) for x in (states[0].obs, states[0].key)}} == {{int(sys.argv[1])}}
assert states[0].obs.is_deleted() and steps[0]._cache_size() == 1
np.savez(sys.argv[1], *jax.tree.leaves(result.agent), *metrics, result.eval_returns, result.episode_steps)
"""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    for devices in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, devices], check=True, env=environ)
    one, two = np.load("1.npz"), np.load("2.npz")
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-4)


@pytest.mark.parametrize("num_seeds", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_is_exact(script, num_seeds):
    """A run resumed from the checkpoint of its middle ends bit for bit where the uninterrupted one ends."""
    module = importlib.import_module(script)
    args = small_args(module, num_seeds=num_seeds, save_every=1, eval_episodes=0)
    middle, save = Path("middle"), module.save

    def copying_save(state, recent_returns, args, run_dir):
        save(state, recent_returns, args, run_dir)
        if int(np.max(state.iteration)) == 3:
            shutil.copytree(run_dir, middle, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save", copying_save)
        straight = module.train(args)
    resumed = module.train(small_args(module, num_seeds=num_seeds, resume=str(middle), eval_episodes=0))
    for x, y in zip(leaves(straight.agent), leaves(resumed.agent), strict=True):
        np.testing.assert_array_equal(x, y)
    ours = resumed.episode_returns if num_seeds == 1 else resumed.episode_returns[0]
    theirs = straight.episode_returns if num_seeds == 1 else straight.episode_returns[0]
    np.testing.assert_array_equal(ours, theirs[-len(ours) :])


@pytest.mark.parametrize("script", MOSTLY_SLOW)
def test_interrupted_while_the_next_iteration_runs(script, monkeypatch):
    """Ctrl-C while an iteration is logged: no iteration is lost from the log or logged twice, and the run resumed ends
    bit for bit where the uninterrupted one ends."""
    module = importlib.import_module(script)
    straight = module.train(small_args(module, eval_episodes=0))
    log, calls = module.log, []

    def interrupting_log(*args):
        calls.append(args)
        log(*args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "log", interrupting_log)
    with pytest.raises(SystemExit) as stopped:
        module.train(small_args(module, eval_episodes=0, exp_name="stopped"))
    assert stopped.value.code == 130
    (run_dir,) = Path("runs").glob("*__stopped__*")
    resumed = module.train(small_args(module, eval_episodes=0, exp_name="stopped", resume=str(run_dir)))
    assert 0 < len(resumed.episode_returns) < len(straight.episode_returns)
    for x, y in zip(leaves(straight.agent), leaves(resumed.agent), strict=True):
        np.testing.assert_array_equal(x, y)
    logged = []
    for run_dir in (straight.run_dir, resumed.run_dir):
        events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        tags = ("losses/policy_loss", "charts/episodic_return")
        logged.append([(e.step, e.value) for tag in tags for e in events.Scalars(tag)])
    assert logged[0] == logged[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_weights_are_initialised_one_agent_at_a_time(script):
    """The program of many agents decomposes no batch of matrices by QR: there XLA's threads may wait for ever."""
    module = importlib.import_module(script)
    args = small_args(module, num_seeds=3)
    envs = module.make_envs(args)
    agent = module.make_agent(envs, args)
    rest = (agent, args) if script == "reinforce_jax" else (agent, envs, args)
    program = jax.make_jaxpr(jax.vmap(lambda seed: module.init_state(seed, *rest)))(np.arange(3))
    shapes = re.findall(r":f32\[([\d,]+)\] = qr\[", str(program))
    assert shapes and all(len(shape.split(",")) == 2 for shape in shapes), shapes


@pytest.mark.parametrize("script", SCRIPTS)
def test_threads(script, monkeypatch):
    """One per device, or several, of the cores there are, where one device has large work; NPROC overrides. It is set
    while JAX starts, and no longer."""
    module = importlib.import_module(script)
    seen, devices = [], jax.devices()  # started, so that nothing asked for here changes how many there are
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setattr(jax, "devices", lambda platform: seen.append(os.environ["NPROC"]) or devices)
    for cores, flags, threads in (
        (2, {}, "1"),
        (2, {"num_seeds": 3}, "1"),
        (2, {"num_seeds": 8}, "2"),
        (16, {"num_seeds": 8}, "8"),
        (2, {"num_envs": 24}, "1"),
        (2, {"num_envs": 64}, "2"),
        (2, {"num_envs": 4096}, "2" if script == "reinforce_jax" else "1"),  # the others update in parts
        (16, {"num_envs": 4096, "hidden_sizes": (128,)}, "16" if script == "reinforce_jax" else "2"),
        (16, {"num_envs": 64, "hidden_sizes": (8, 128)}, "16" if script == "vpg_advantage_jax" else "8"),
        (16, {"num_envs": 256, "hidden_sizes": (8, 8)}, "1"),
        (16, {"cuda": True}, "16"),
    ):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        with jax.default_matmul_precision("float32"):  # as --cuda would set it, for all that comes after
            module.pick_devices(module.Args(**flags))
        assert seen.pop() == threads and "NPROC" not in os.environ, (cores, flags)
    monkeypatch.setenv("NPROC", "5")
    module.pick_devices(module.Args())
    assert seen.pop() == os.environ["NPROC"] == "5"


@pytest.mark.parametrize("script", MOSTLY_SLOW)
def test_log_and_evaluation_of_many_seeds(script, capsys):
    """Mean and 95 % interval over seeds at every iteration, and the final mean return of each seed under its number;
    --eval-only of that checkpoint: a line for each agent, and the numbers of the run's own evaluation."""
    module = importlib.import_module(script)
    result = module.train(small_args(module, seed=7, num_seeds=3))
    log = EventAccumulator(str(result.run_dir), size_guidance={"scalars": 0}).Reload()
    final = [np.mean(returns[-100:]) for returns in result.episode_returns]
    points = log.Scalars("charts/final_return_of_seed")
    assert [point.step for point in points] == [7, 8, 9]
    np.testing.assert_allclose([point.value for point in points], final, rtol=1e-6)
    last_mean, last_interval = (log.Scalars(f"charts/episodic_return{tag}")[-1].value for tag in ("", "_95"))
    np.testing.assert_allclose(last_mean, np.mean(final), rtol=1e-6)
    np.testing.assert_allclose(last_interval, 1.96 * np.std(final, ddof=1) / np.sqrt(3), rtol=1e-6)

    first = capsys.readouterr().out
    assert [f"seed {seed}: evaluation" in first for seed in (6, 7, 8, 9, 10)] == [False, True, True, True, False]
    again = module.train(small_args(module, seed=7, num_seeds=3, resume=str(result.run_dir), eval_only=True))
    np.testing.assert_array_equal(result.eval_returns, again.eval_returns)
    assert again.eval_returns.shape == (3, 2)
    with pytest.raises(ValueError, match="its seed is 7, this run's is 8"):  # it would take the agents for others
        module.train(small_args(module, seed=8, num_seeds=3, resume=str(result.run_dir), eval_only=True))
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_rollout_in_the_program(script):
    """Every successor is what Gymnasium's CartPole makes of the row, where an episode ends too; the next row goes on
    from it, or from a reset, whose numbers are at most 0.05."""
    module = importlib.import_module(script)
    args = small_args(module, num_steps=40, max_episode_steps=15)
    envs = module.make_envs(args)
    agent = module.make_agent(envs, args)
    state = module.init_state(np.uint32(1), agent, envs, args)
    state, batch = jax.jit(lambda state: module.rollout(state, agent, envs, args))(state)
    batch = module.Batch(*map(np.asarray, batch))
    host, fell = gym.make("CartPole-v1").unwrapped, np.zeros((40, 4))
    length = np.zeros(4)
    for t, n in np.ndindex(40, 4):
        host.reset()
        host.state = batch.obs[t, n].astype(float)
        successor, _, fell[t, n], _, _ = host.step(int(batch.action[t, n]))
        np.testing.assert_allclose(batch.next_obs[t, n], successor, atol=1e-5)
        length[n] += 1
        assert batch.truncated[t, n] == (length[n] == 15)
        if batch.done[t, n]:
            assert batch.episode_return[t, n] == batch.episode_length[t, n] == length[n]
            length[n] = 0
    np.testing.assert_array_equal(batch.terminated, fell)
    assert batch.terminated.any() and batch.truncated.any()
    following = np.concatenate([batch.obs[1:], np.asarray(state.obs)[None]])
    same = (following == batch.next_obs).all(-1)
    np.testing.assert_array_equal(same, batch.done == 0)
    assert (np.abs(following[batch.done > 0]) <= 0.05).all()
    np.testing.assert_array_equal(batch.step, 4 * np.arange(1, 41))


def test_rollout_of_reinforce_stops_with_the_last_episode():
    """The buffer has the length of the time limit, but no step is played once every environment is done."""
    module = importlib.import_module("reinforce_jax")
    args = small_args(module)
    envs = module.make_envs(args)
    agent = module.make_agent(envs, args)
    state = module.init_state(np.uint32(1), agent, args)
    _, batch = jax.jit(lambda state: module.rollout(state, agent, envs, args))(state)
    lengths = np.asarray(batch.mask.sum(0))
    assert batch.obs.shape == (500, 4, 4)
    assert (np.asarray(batch.obs[: int(lengths.max())]) != 0).any(-1).all()
    assert (np.asarray(batch.obs[int(lengths.max()) :]) == 0).all()
    t = lengths.astype(int) - 1
    np.testing.assert_array_equal(batch.done.sum(0), 1)
    np.testing.assert_array_equal(batch.done[t, np.arange(4)], 1)
    np.testing.assert_array_equal(batch.episode_return[t, np.arange(4)], lengths)
    assert int(batch.step[-1]) == lengths.sum()


@pytest.mark.parametrize("script", SCRIPTS)
def test_many_seeds_need_gymnax(script):
    module = importlib.import_module(script)
    with pytest.raises(ValueError, match="--num-seeds 2"):
        module.train(small_args(module, env_id="FrozenLake-v1", num_seeds=2))
    assert not Path("runs").exists()


CHOICES = [("CartPole-v1", True), ("Breakout-MinAtar", True), ("FrozenLake-v1", False), ("tests.toy_envs:X-v0", False)]


@pytest.mark.parametrize(("env_id", "expected"), CHOICES)
def test_backend(env_id, expected):
    """auto takes gymnax where it has the environment; the flag overrides."""
    module = importlib.import_module("ppo_jax")
    assert module.uses_gymnax(module.Args(env_id=env_id)) == expected
    assert module.uses_gymnax(module.Args(env_id=env_id, env_backend="gymnax"))
    assert not module.uses_gymnax(module.Args(env_id=env_id, env_backend="gymnasium"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["gymnax", "auto"])
def test_module_that_registers_with_gymnax(backend):
    """module:Id imports the module first, whichever way gymnax is chosen."""
    Path("mine.py").write_text("from gymnax.registration import *\nregister('Mine-v0', cartpole.CartPole)\n")
    flags = f"--env-id mine:Mine-v0 --env-backend {backend} --total-timesteps 1024 --eval-episodes 1 --hidden-sizes 8"
    command = [sys.executable, ROOT / "ppo_jax.py", *flags.split()]
    process = subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)
    assert "evaluation: " in process.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_time_limit(script):
    """Of an environment whose own is a float."""
    module = importlib.import_module(script)
    args = module.Args(env_id="BernoulliBandit-misc", env_backend="gymnax", max_episode_steps=3)
    envs = module.GymnaxEnvs(args, 2)
    state, _ = envs.reset(jax.random.PRNGKey(0))
    for truncated in (0, 0, 1):
        state, *_, found, _ = envs.step(jax.random.PRNGKey(1), state, jnp.zeros(2, int))
        assert found.tolist() == [truncated] * 2


@pytest.mark.parametrize("script", MOSTLY_SLOW[1:])
def test_minibatch_of_one(script):
    """Keeps its advantage, which standardised would be 0: another learning rate makes another policy."""
    module = importlib.import_module(script)
    flags = {"num_steps": 4, "num_minibatches": 16, "update_epochs": 1, "norm_adv": True, "total_timesteps": 16}
    args = (small_args(module, **flags, learning_rate=rate, eval_episodes=0) for rate in (1e-3, 1e-2))
    one, other = (module.train(a).agent["params"]["actor"]["layers_0"]["kernel"] for a in args)
    assert np.isfinite(one).all() and not np.array_equal(one, other)


@pytest.mark.parametrize("script", SCRIPTS)
def test_discrete_observations(script):
    """One-hot, as Gymnasium flattens them, and the last one of an episode too; an id that gymnax alone knows."""
    module = importlib.import_module(script)
    envs = module.GymnaxEnvs(module.Args(env_id="FrozenLake-misc"), 8)
    assert envs.single_observation_space.shape == (16,)
    step, (state, obs) = jax.jit(envs.step), envs.reset(jax.random.PRNGKey(0))
    assert obs.dtype == jnp.float32 and np.array_equal(obs, np.eye(16)[[0] * 8])
    ended = 0
    for key in jax.random.split(jax.random.PRNGKey(1), 20):
        state, obs, _, terminated, truncated, info = step(key, state, jnp.arange(8) % 4)
        final, done = info["final_observation"].argmax(-1), np.maximum(terminated, truncated)
        assert np.array_equal(info["final_observation"], np.eye(16)[final])
        assert np.array_equal(obs, np.eye(16)[np.where(done, 0, final)])
        ended += done.sum()
    assert ended > 8


BROKEN = """
import jax.numpy as jnp
from gymnax.registration import *

class Broken(cartpole.CartPole):
    def step_env(self, key, state, action, params):
        obs, state, reward, *rest = super().step_env(key, state, action, params)
        bad = (state.time == 5) & (state.x > 0)  # of some environments
        return {}, state, {}, *rest
"""
BROKEN_CODE = {
    "obs": ("jnp.where(bad, jnp.nan, obs)", "reward"),
    "reward": ("obs", "jnp.where(bad, -jnp.inf, reward)"),
}


@pytest.mark.parametrize("script", MOSTLY_SLOW)
@pytest.mark.parametrize("name", [pytest.param("obs", marks=pytest.mark.slow), "reward"])
def test_numbers_that_are_not_finite(script, name, monkeypatch):
    """From within the compiled program too: what, in which environment, at which step, and which checkpoint."""
    module = importlib.import_module(script)
    namespace = {}
    exec(BROKEN.format(*BROKEN_CODE[name]), namespace)
    monkeypatch.setattr(gymnax, "make", lambda env_id: (namespace["Broken"](), namespace["Broken"]().default_params))
    flags = small_args(module, env_backend="gymnax", total_timesteps=4096)
    with pytest.raises(FloatingPointError) as raised:
        module.train(flags)
    assert re.match(rf"(next_)?{name} of environment \d+ not finite by step \d+; ", str(raised.value))
    assert "no checkpoint was saved" in str(raised.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports(script):
    """No torch, no gymnax (it takes seconds) and no started backend on import; no gymnax for others' environments."""
    code = f"""
import sys, {script} as module
assert not {{"torch", "gymnax"}} & set(sys.modules)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
assert not module.uses_gymnax(module.Args(env_id="FrozenLake-v1"))
assert "gymnax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_host_environments_do_not_hang(script):
    """500,000 steps on one core with large observations: host and compiled program never wait for each other."""
    flags = ["--env-id", "tests.toy_envs:Large-v0", "--total-timesteps", "500000", "--num-envs", "16"]
    command = ["taskset", "-c", "0", sys.executable, ROOT / f"{script}.py", *flags, "--hidden-sizes", "8"]
    subprocess.run(command, check=True, timeout=1800, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert len(list(Path("runs").glob("*/checkpoint.msgpack"))) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluation_ends(script):
    """Also where no time limit ends it: one of two episodes goes on for ever, and is cut. Each step's reward is 1."""
    ends = jnp.array([1.0, 0.0])
    envs = Mock(num_envs=2, reset=lambda key: ((), jnp.zeros((2, 1))))
    envs.step = lambda key, states, action: (states, jnp.zeros((2, 1)), jnp.ones(2), ends, jnp.zeros(2), {})
    module, agent = importlib.import_module(script), Mock(apply=lambda *_, method: jnp.zeros(2))
    assert module.evaluate({}, jax.random.key(0), agent, envs, module.Args()).tolist() == [1, 100_000]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_many_agents_do_not_hang(script):
    """128 agents in one program, on one thread: XLA would wait there for other threads to decompose a batch by QR."""
    command = [sys.executable, ROOT / f"{script}.py", "--num-seeds", "128", "--total-timesteps", "10240"]
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"NPROC": "1"}
    process = subprocess.run(command, check=True, timeout=300, env=environ, capture_output=True, text=True)
    assert process.stdout.count("evaluation: ") == 128
