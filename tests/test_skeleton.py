"""The scripts are one file written several times: what they have in common must not drift apart."""

import ast
import re
import sys
import tokenize
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

SCRIPTS = ("reinforce", "vpg_advantage", "ppo", "reinforce_jax", "vpg_advantage_jax", "ppo_jax")
PAIRS = [(a, b) for i, a in enumerate(SCRIPTS) for b in SCRIPTS[i + 1 :]]
TWINS = [(a, b) for a, b in PAIRS if b == f"{a}_jax"]
ROOT = Path(__file__).parents[1]
SOURCE = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
TREE = {script: ast.parse(source) for script, source in SOURCE.items()}

# Flags of one framework alone, and what is meant to differ in a flag that several scripts have: (flag, property) ->
# part of a script's name -> what it is there. The rest have to agree among themselves.
JAX_ONLY = {"num_seeds", "env_backend", "shard_envs"}
TORCH_ONLY = {"compile"}
DIFFERENCES = {
    ("env_id", "help"): {"_jax": "any gymnax or Gymnasium id; module:Id imports the module first"},
    ("num_envs", "help"): {"reinforce": "parallel environments, one episode of each per update (N)"},
    ("total_timesteps", "interval"): {"_jax": "[1, 2000000000]"},  # steps are counted in 32 bits
    ("max_episode_steps", "interval"): {"_jax": "[1, 100000000]"},
    # tuned for each algorithm
    ("total_timesteps", "default"): {"ppo": 200_000},
    ("learning_rate", "default"): {"ppo": 2e-3},
    ("num_steps", "default"): {"ppo": 128},
    ("gamma", "default"): {"ppo": 0.98},
    ("gae_lambda", "default"): {"ppo": 0.9},
    ("num_minibatches", "default"): {"ppo": 4},
    ("update_epochs", "default"): {"ppo": 6},
    ("norm_adv", "default"): {"ppo": True},
    ("norm_reward", "default"): {"ppo": False},
}
SECTIONS = ["Arguments", "Environment", "Networks", "Data", "Math", "Rollout", "Update", "Checkpoint and evaluation"]
SECTIONS += ["Training"]
GAE = ["reward", "value", "next_value", "terminated", "done", "gamma", "gae_lambda"]
SIGNATURES = {  # which programs beyond this repository may call
    "reinforce": {"discounted_returns": ["reward", "done", "gamma"], "policy_loss": ["logp", "ret", "mask"]},
    "vpg_advantage": {"gae": GAE, "policy_loss": ["logp", "adv"], "value_loss": ["value", "ret"]},
    "ppo": {
        "gae": GAE,
        "policy_loss": ["logp", "logp_old", "adv", "clip_coef"],
        "value_loss": ["value", "value_old", "ret", "clip_coef"],
        "approx_kl": ["logp", "logp_old"],
    },
}
DISTRIBUTION = {"torch.utils.tensorboard": "tensorboard"}  # of a module whose distribution is not its first word
UNDECLARED = {"gymnax": {"six"}}  # what a distribution imports without asking for it

each_script = pytest.mark.parametrize("script", SCRIPTS)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def definitions(script: str) -> list[str]:
    """Names of the functions and classes of a script, and of the methods and fields within its classes, in order."""
    names = []
    for node in TREE[script].body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            names.append(node.name)
        for child in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(child, FUNCTION):
                names.append(f"{node.name}.{child.name}()")
            elif isinstance(child, ast.AnnAssign):
                names.append(f"{node.name}.{child.target.id}")
    return names


def flags(script: str) -> dict[str, dict]:
    """Annotation, default, interval and help of each flag. Help is the comment behind it."""
    (args,) = (node for node in TREE[script].body if isinstance(node, ast.ClassDef) and node.name == "Args")
    lines = iter(SOURCE[script].splitlines(keepends=True))
    comments = {t.start[0]: t for t in tokenize.generate_tokens(lambda: next(lines)) if t.type == tokenize.COMMENT}
    found = {}
    for node in args.body:
        if isinstance(node, ast.AnnAssign):
            values = node.value.args if isinstance(node.value, ast.Call) else [node.value, ast.Constant(None)]
            name = node.target.id
            found[name] = {
                "annotation": ast.unparse(node.annotation),
                "default": ast.unparse(values[0]) if name == "exp_name" else ast.literal_eval(values[0]),
                "interval": ast.literal_eval(values[1]),
                "help": comments[node.lineno].string.removeprefix("# "),
            }
    return found


def imports(script: str) -> set[str]:
    """Every module that a script imports, wherever in it."""
    nodes = list(ast.walk(TREE[script]))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not any(node.level for node in nodes if isinstance(node, ast.ImportFrom)), "a relative import"
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


# ===================================================== One skeleton ===================================================


@each_script
def test_sections(script):
    banners = [line for line in SOURCE[script].splitlines() if line.startswith("# ==")]
    assert [re.fullmatch(r"# =+ (.+?) =+", line).group(1) for line in banners] == SECTIONS
    assert {len(line) for line in banners} == {120}


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_order(a, b):
    """Functions, classes, their methods and fields, flags among them, stand in one order."""
    ours, theirs = definitions(a), definitions(b)
    common = [name for name in ours if name in theirs]
    assert common == [name for name in theirs if name in ours]
    assert {"Args", "check_args", "make_env", "Agent", "State", "Result", "rollout", "update", "train"} <= {*common}


def test_shared_flags():
    """One flag, one type, one help text and one default, but for the differences listed above."""
    seen = defaultdict(set)
    for script in SCRIPTS:
        for name, properties in flags(script).items():
            for key, value in properties.items():
                stated = [x for part, x in DIFFERENCES.get((name, key), {}).items() if part in script]
                assert not stated or value == stated[0], f"--{name} of {script} is not what is stated"
                if not stated:
                    seen[name, key].add(value)
    assert not {key: values for key, values in seen.items() if len(values) > 1}
    names = [set(flags(script)) for script in SCRIPTS]
    assert set.intersection(*names) >= {"env_id", "seed", "total_timesteps", "learning_rate", "resume", "eval_only"}


@pytest.mark.parametrize(("torch_script", "jax_script"), TWINS)
def test_twins_have_the_same_flags(torch_script, jax_script):
    ours, theirs = list(flags(torch_script)), list(flags(jax_script))
    assert [n for n in ours if n not in TORCH_ONLY] == [n for n in theirs if n not in JAX_ONLY]
    assert not JAX_ONLY & set(ours) and not TORCH_ONLY & set(theirs)


@each_script
def test_signatures(script):
    functions = {node.name: [a.arg for a in node.args.args] for node in TREE[script].body if isinstance(node, FUNCTION)}
    expected = SIGNATURES[script.removesuffix("_jax")]
    assert {name: functions.get(name) for name in expected} == expected
    assert functions["train"] == ["args"] and functions["main"] == []
    (result,) = (node for node in TREE[script].body if isinstance(node, ast.ClassDef) and node.name == "Result")
    names = [node.target.id for node in result.body if isinstance(node, ast.AnnAssign)]
    assert names[:3] == ["agent", "episode_returns", "episode_steps"]


@each_script
def test_alone(script):
    """No script imports another, nor anything else of this repository, nor itself under the guard."""
    ours = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set(SCRIPTS) | {"tests"} <= ours
    assert not {name.split(".")[0] for name in imports(script)} & ours
    assert ast.unparse(TREE[script].body[-1]) == "if __name__ == '__main__':\n    main()"


@each_script
def test_nothing_happens_at_the_top(script):
    """Only imports, definitions, constants and the guard."""
    allowed = (ast.Import, ast.ImportFrom, *FUNCTION, ast.ClassDef, ast.Assign, ast.AnnAssign)
    docstring, *body, _ = TREE[script].body
    assert isinstance(docstring.value, ast.Constant)
    assert not [ast.unparse(node) for node in body if not isinstance(node, allowed)]
    constants = [node.value for node in body if isinstance(node, ast.Assign | ast.AnnAssign)]
    assert not [node for value in constants for node in ast.walk(value) if isinstance(node, ast.Call)]


def depth(node: ast.AST) -> int:
    """How many functions stand within one another; a lambda is an expression."""
    return max(map(depth, ast.iter_child_nodes(node)), default=0) + isinstance(node, FUNCTION)


@each_script
def test_flat(script):
    assert depth(TREE[script]) <= 2
    assert depth(ast.parse("def f():\n def g():\n  def h(): pass")) == 3  # the ruler


# ==================================================== Dependencies ====================================================


def bounds(requirements: list[str]) -> dict[str, str]:
    """Distribution -> its bounds."""
    return {re.match(r"[\w.-]+", r).group(): re.sub(r"^[\w.-]+", "", r) for r in requirements}


@each_script
def test_dependencies(script):
    """The PEP 723 block asks for what the script imports and nothing else, within pyproject's bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", SOURCE[script]).group(1)
    metadata = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") + "\n" for line in block.splitlines()))
    ours, theirs = bounds(metadata["dependencies"]), bounds(project["dependencies"])

    foreign = {name for name in imports(script) if name.split(".")[0] not in sys.stdlib_module_names}
    needed = {DISTRIBUTION.get(name, name.split(".")[0]) for name in foreign}
    needed |= {extra for name in needed for extra in UNDECLARED.get(name, ())}
    assert ours.keys() == needed
    assert ours == {name: theirs[name] for name in ours}
    assert list(ours) == sorted(ours)
    assert metadata["requires-python"] == project["requires-python"]


def test_pyproject_names_the_scripts():
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
    assert set(SCRIPTS) <= set(modules)
    assert all((ROOT / f"{module}.py").exists() for module in modules)


# ======================================================= The diff =====================================================


def without_stated(script: str) -> list[str]:
    """Lines of a script without its docstring and the flags that are known to differ."""
    text = re.sub(r'^""".*?^"""$', "", SOURCE[script], count=1, flags=re.MULTILINE | re.DOTALL)
    assert len(text) < len(SOURCE[script])
    flag = re.compile(rf"    ({'|'.join(name for name, _ in DIFFERENCES)}): ")
    return [line for line in text.splitlines() if not flag.match(line)]


def changed_lines(ours: list[str], theirs: list[str]) -> int:
    """Lines that `diff` marks: all but the longest common subsequence."""
    common = [0] * (len(theirs) + 1)  # lengths for the lines of `ours` so far and the first j of `theirs`
    for line in ours:
        diagonal = 0
        for j, other in enumerate(theirs, 1):
            diagonal, common[j] = common[j], diagonal + 1 if line == other else max(common[j], common[j - 1])
    return len(ours) + len(theirs) - 2 * common[-1]


@pytest.mark.parametrize(
    ("suffix", "limit"),
    # with fixed shapes, stopping at --target-kl takes more lines than a break
    [("", 60), ("_jax", 80)],
)
def test_ppo_is_a_small_step_from_vpg(suffix, limit):
    assert 0 < changed_lines(without_stated(f"vpg_advantage{suffix}"), without_stated(f"ppo{suffix}")) < limit
    assert changed_lines(["a", "b", "c"], ["b", "x", "c", "d"]) == 3  # the ruler
