"""distributed/: one agent on several processes or devices; the oracle is the script for one, or counting."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import ppo
import ppo_jax
from tests.test_runs import ROOT, TINY, python, scalars
from tests.test_skeleton import changed_lines

TRAIN = TINY | {"norm_obs": True, "norm_reward": True, "total_timesteps": 640, "num_steps": 32, "num_minibatches": 2}
TRAIN |= {"target_kl": 1e-3, "anneal_lr": False}
# An update of one minibatch that moves no weights; a second one sees the statistics that the first one left.
STILL = TRAIN | {"num_minibatches": 1, "update_epochs": 1, "learning_rate": 0.0, "max_grad_norm": 1e9, "ent_coef": 0.1}
HEAD = f"""import dataclasses, functools, os, sys, numpy as np
sys.path.insert(0, {str(ROOT / "distributed")!r})
from tests.test_distributed import STILL, TRAIN, random_batches
"""
TORCH = """import torch, ppo, ppo_torchrun as module
rank, args = int(os.environ["RANK"]), module.Args(**TRAIN)
leaves = lambda agent: [x.numpy() for x in agent.state_dict().values()]
"""
JAX = """os.cpu_count = lambda: {devices}
import jax, ppo_jax, ppo_jax_devices as module
args, leaves = module.Args(**TRAIN, env_id="tests.toy_envs_jax:Fixed"), jax.tree.leaves
"""


def random_batches(module):
    rng, scale, shape = np.random.default_rng(0), np.array([1, 2, 5, 9]), (32, 4)
    for _ in range(2):  # of four environments that differ in scale
        obs, next_obs = (rng.normal(size=(2, *shape, 4)) + 1) * scale[:, None]
        action, reward = rng.integers(2, size=shape), rng.normal(size=shape) * scale
        ends = rng.random((2, *shape)) < 0.1
        yield module.Batch(*map(np.float32, (obs, action, reward, next_obs, *ends, np.zeros((*shape, 2)))))


def two_ranks(code: str) -> str:
    """What they print; AssertionError if one fails, TimeoutExpired after a minute."""
    destroy = "\ntorch.distributed.destroy_process_group()"  # without it a rank may abort at its exit
    Path("program.py").write_text(HEAD + TORCH + code + destroy)
    process = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "program.py", timeout=60)
    assert process.returncode == 0, process.stderr
    return process.stdout


def on_devices(code: str, devices: int = 2) -> str:
    process = python("-c", HEAD + JAX.format(devices=devices) + code)
    assert process.returncode == 0, process.stderr
    return process.stdout


def two_processes(code: str) -> list:
    """Of one device each; TimeoutExpired after two minutes, of which JAX takes one to start and compile."""
    address = f"127.0.0.1:{np.random.default_rng().integers(20_000, 30_000)}"
    flags = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    before = [f"os.environ |= {flags | {'JAX_PROCESS_ID': str(i)}}\n{JAX.format(devices=1)}" for i in (0, 1)]
    return [*ThreadPoolExecutor().map(lambda x: python("-c", HEAD + x + code, timeout=120), before)]


def check_equal(ours: str, theirs: str, rtol=0.0, atol=0.0):
    for x, y in zip(np.load(f"{ours}.npz").values(), np.load(f"{theirs}.npz").values(), strict=True):
        np.testing.assert_allclose(x, y, rtol, atol)


@pytest.mark.parametrize(("name", "base"), [("ppo_torchrun", "ppo"), ("ppo_jax_devices", "ppo_jax")])
def test_at_most_60_lines_of_code_differ(name, base):
    assert 0 < changed_lines(*((ROOT / x).read_text() for x in (f"{base}.py", f"distributed/{name}.py"))) <= 60


@pytest.mark.slow
def test_gradient_of_two_ranks():
    """Gradients and statistics of two ranks with half of the environments each are those of one process with all."""
    two_ranks("""import gymnasium
def learn(module, columns):
    args = module.Args(**STILL | {"num_envs": columns.stop - columns.start})
    torch.manual_seed(0)
    agent = module.Agent(gymnasium.make_vec("CartPole-v1", args.num_envs), args)
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.0)
    for batch in random_batches(module):
        metrics = module.update(agent, optimizer, module.loss_fn, module.Batch(*(x[:, columns] for x in batch)), args)
    return [*(p.grad.numpy() for p in agent.parameters()), *leaves(agent), *metrics.values()]
torch.distributed.init_process_group("gloo")
np.savez(f"rank{rank}", *learn(module, slice(2 * rank, 2 * rank + 2)))
np.savez("whole", *learn(ppo, slice(0, 4))) if rank == 0 else None
""")
    check_equal("rank1", "whole", rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_ranks_agree_and_resume():
    """Equal weights after half a run and the other half, other episodes on each rank, all of them in the log."""
    out = two_ranks("""rollout, seen = module.rollout, []
module.rollout = lambda *words: (seen.append(words[2]), rollout(*words))[1]
half = module.train(dataclasses.replace(args, total_timesteps=300))
torch.distributed.barrier()  # until rank 0 has saved
whole = module.train(dataclasses.replace(module.saved_args(half.run_dir), total_timesteps=640))
assert whole.run_dir == half.run_dir and len(whole.eval_returns) == (2 if rank == 0 else 0)
np.savez(f"rank{rank}", whole.episode_returns, whole.episode_steps, *leaves(half.agent), *leaves(whole.agent))
np.save(f"seen{rank}", np.concatenate(seen))
""")
    check_equal("rank0", "rank1")
    rows = np.concatenate([np.load("seen0.npy"), np.load("seen1.npy")])
    assert len(np.unique(rows, axis=0)) == len(rows) == 20  # five iterations of four environments
    assert out.count("evaluation:") == 2
    (log,) = map(scalars, Path("runs").iterdir())
    assert [step for step, _ in log["losses/policy_loss"]] == [128, 256, 384, 512, 640]
    returns, steps, *_ = np.load("rank0.npz").values()
    assert log["charts/episodic_return"] == list(zip(steps, returns)) and len(returns) > 10


@pytest.mark.slow
def test_a_rank_dies():
    """Within a minute all end, its traceback is shown, and the checkpoint is whole: ppo.py goes on from it."""
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        two_ranks("""update, calls = module.update, []
def dying(*words):
    calls.append(1)
    if rank == 1 and len(calls) == 4:
        1 / 0
    return update(*words)
module.update = dying
module.train(args)
""")
    assert ppo.train(ppo.saved_args(*Path("runs").iterdir())).episode_steps[-1] > 512


@pytest.mark.slow
def test_gradient_of_two_devices():
    on_devices("""args = module.Args(**STILL)
agent, mesh = module.Agent(module.make_jax_env(args).action_space, args), jax.sharding.Mesh(jax.devices(), "devices")
spec = module.State(*[jax.P()] * 10)._replace(running_return=jax.P("devices"), obs=jax.P("devices"))
specs = {"in_specs": (spec, jax.P(None, "devices")), "out_specs": (spec, jax.P()), "check_vma": False}
update = jax.shard_map(functools.partial(module.update, agent=agent, args=args), mesh=mesh, **specs)
whole = functools.partial(ppo_jax.update, agent=agent, args=args)
for name, update, module in ((f"{mesh.size} devices", update, module), ("whole", whole, ppo_jax)):
    state = module.init_state(jax.random.PRNGKey(0), None, np.zeros((4, 4)), agent)._replace(episode=None)
    for batch in random_batches(module):
        state, metrics = jax.jit(update)(state, batch)
    np.savez(name, *leaves((state, metrics)))  # gradients are in Adam's first moment
""")
    check_equal("2 devices", "whole", rtol=1e-6, atol=1e-6)


RUN = """gather, copies = module.process_allgather, []
def watched(tree, tiled):
    copies.extend([np.asarray(y.data) for y in x.addressable_shards] for x in leaves(tree) if x.is_fully_replicated)
    return gather(tree, tiled=tiled)
module.process_allgather = watched
result = module.train(args)
index, count = jax.process_index(), jax.process_count()
assert all(len(x) == 2 // count and np.array_equal(x[0], x[-1]) for x in copies) and result.run_dir.exists()
np.savez(f"process{index}of{count}", result.episode_returns, result.episode_steps, *leaves(result.state))
"""


@pytest.mark.slow
def test_devices_agree_and_resume():
    """Equal copies, other episodes on each; a resumed run is the whole one to the last bit, one device may go on."""
    out = on_devices(f"""{RUN}
half = module.train(dataclasses.replace(args, total_timesteps=300))
again = module.train(dataclasses.replace(module.saved_args(half.run_dir), total_timesteps=640))
np.savez("resumed", again.episode_returns, again.episode_steps, *leaves(again.state))
""")
    check_equal("process0of1", "resumed")
    returns, steps, *_ = np.load("process0of1.npz").values()
    assert np.array_equal(steps, np.repeat(np.arange(16, 641, 16), 4)) and ((returns - 10) % 400 == 0).all()
    assert (np.diff(returns.reshape(-1, 2, 2), axis=1) == 0).mean() < 0.5  # of the two devices, drawn from seven
    on_devices(f"module.train(dataclasses.replace(module.saved_args('{out.split()[-1]}'), total_timesteps=768))", 1)


@pytest.mark.slow
def test_two_processes_are_two_devices():
    """Two processes with a device each get what one with two gets, and process 0 alone writes."""
    on_devices(RUN)
    done = two_processes(RUN)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert ["evaluation:" in process.stdout for process in done] == [True, False]
    check_equal("process0of2", "process1of2")
    check_equal("process0of2", "process0of1", rtol=1e-5, atol=1e-6)
    assert [len(list(run_dir.iterdir())) for run_dir in Path("runs").iterdir()] == [3, 3]  # one log in each


@pytest.mark.slow
def test_a_process_dies():
    """Both end, its traceback is shown, and the checkpoint is whole: ppo_jax.py goes on from it."""
    done = two_processes("""calls = []
def dying(*words):
    calls.append(1)
    if jax.process_index() == 1 and len(calls) == 8:
        1 / 0
module.tqdm.update = dying
module.train(dataclasses.replace(args, total_timesteps=2176))  # 17 iterations, one at a time
""")
    assert all(process.returncode for process in done) and "ZeroDivisionError" in done[1].stderr
    (run_dir,) = (path.parent for path in Path("runs").glob("*/checkpoint.msgpack"))
    assert ppo_jax.train(ppo_jax.saved_args(run_dir)).episode_steps[-1] > 2000
