"""The scripts are one file written six times: short, flat, alone, and the same but for the idea."""

import ast
import difflib
import re
import sys
import tokenize
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CEILINGS = {  # lines, characters
    "reinforce": (360, 19_000),
    "vpg_advantage": (430, 23_000),
    "ppo": (450, 24_500),
    "reinforce_jax": (480, 26_000),
    "vpg_advantage_jax": (560, 30_000),
    "ppo_jax": (580, 31_500),
}
CHANGED = {  # lines that diff marks, docstrings apart
    ("vpg_advantage", "ppo"): 60,
    ("vpg_advantage_jax", "ppo_jax"): 60,
    ("reinforce", "vpg_advantage"): 220,
    ("reinforce_jax", "vpg_advantage_jax"): 331,
    ("ppo", "ppo_jax"): 600,
}
SCRIPTS = tuple(CEILINGS)
PAIRS = [(a, b) for i, a in enumerate(SCRIPTS) for b in SCRIPTS[i + 1 :]]
SOURCE = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
TREE = {script: ast.parse(source) for script, source in SOURCE.items()}

# Flags of one framework alone, and flags whose default or help differs between scripts; all else agrees.
JAX_ONLY, TORCH_ONLY = {"num_seeds", "env_backend"}, {"compile"}
OWN_DEFAULT = {"total_timesteps", "learning_rate", "num_steps", "gamma", "gae_lambda"}
OWN_DEFAULT |= {"num_minibatches", "update_epochs", "norm_adv", "norm_reward"}
OWN_HELP = {"env_id", "num_envs"}
SECTIONS = ["Environment", "Networks", "Data", "Math", "Rollout", "Update", "Training"]

each_script = pytest.mark.parametrize("script", SCRIPTS)


def definitions(script: str) -> list[str]:
    """Names of the functions and classes of a script, and of the methods and fields within its classes, in order."""
    names = []
    for node in TREE[script].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        for child in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(child, ast.FunctionDef):
                names.append(f"{node.name}.{child.name}()")
            elif isinstance(child, ast.AnnAssign):
                names.append(f"{node.name}.{child.target.id}")
    return names


def flags(script: str) -> dict[str, tuple[str, str, str]]:
    """Annotation, default and help, which is the comment behind it, of each flag."""
    (args,) = (node for node in TREE[script].body if isinstance(node, ast.ClassDef) and node.name == "Args")
    lines = iter(SOURCE[script].splitlines(keepends=True))
    comments = {t.start[0]: t.string for t in tokenize.generate_tokens(lines.__next__) if t.type == tokenize.COMMENT}
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    return {x.target.id: (ast.unparse(x.annotation), ast.unparse(x.value), comments[x.lineno]) for x in fields}


def imports(script: str) -> set[str]:
    """The first word of every module that a script imports, wherever in it."""
    nodes = list(ast.walk(TREE[script]))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {"tensorboard" if name == "torch.utils.tensorboard" else name for name in names}
    return {name.split(".")[0] for name in names}


# ==== Short ====


@each_script
def test_ceilings(script):
    lines, characters = CEILINGS[script]
    assert SOURCE[script].count("\n") <= lines
    assert len(SOURCE[script]) <= characters
    top = [node for node in TREE[script].body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(top) <= 30


def changed_lines(ours: str, theirs: str) -> int:
    """Lines of code that differ; docstrings of the modules do not count."""
    ours, theirs = (re.sub(r'""".*?"""', "", x, count=1, flags=re.DOTALL).splitlines() for x in (ours, theirs))
    blocks = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    return len(ours) + len(theirs) - 2 * sum(block.size for block in blocks)


@pytest.mark.parametrize(("a", "b"), CHANGED)
def test_diffs_are_small(a, b):
    assert 0 < changed_lines(SOURCE[a], SOURCE[b]) <= CHANGED[a, b]


@each_script
def test_calls_are_at_most_five_deep(script):
    """From `train` down to an equation, counting both."""
    top = {node.name: node for node in TREE[script].body if isinstance(node, ast.FunctionDef)}

    def depth(name):
        calls = {node.id for node in ast.walk(top[name]) if isinstance(node, ast.Name)} & top.keys() - {name}
        return 1 + max(map(depth, calls), default=0)

    assert depth("train") <= 5


def nesting(node: ast.AST) -> int:
    """How many functions stand within one another; a lambda is an expression."""
    return max(map(nesting, ast.iter_child_nodes(node)), default=0) + isinstance(node, ast.FunctionDef)


@each_script
def test_flat(script):
    assert nesting(TREE[script]) <= 2


# ==== The same ====


@each_script
def test_sections(script):
    assert re.findall(r"^# ==== (.+) ====$", SOURCE[script], re.MULTILINE) == SECTIONS


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_order(a, b):
    """Functions, classes, their methods and fields, flags among them, stand in one order."""
    ours, theirs = definitions(a), definitions(b)
    common = [name for name in ours if name in theirs]
    assert common == [name for name in theirs if name in ours]
    assert {"Args", "Agent", "Batch", "rollout", "loss_fn", "update", "evaluate", "Result", "train"} <= {*common}


def test_shared_flags():
    """One flag, one type, one default and one help text, but for the differences listed above; twins have the same."""
    seen = defaultdict(set)
    for script in SCRIPTS:
        for name, (annotation, default, text) in flags(script).items():
            seen[name].add((annotation, name in OWN_DEFAULT or default, name in OWN_HELP or text))
    assert not {name: found for name, found in seen.items() if len(found) > 1}
    for script in SCRIPTS[:3]:
        ours, theirs = flags(script), flags(f"{script}_jax")
        assert [n for n in ours if n not in TORCH_ONLY] == [n for n in theirs if n not in JAX_ONLY]
        assert {n: ours[n][1] for n in ours.keys() & theirs} == {n: theirs[n][1] for n in ours.keys() & theirs}
        assert not JAX_ONLY & ours.keys() and not TORCH_ONLY & theirs.keys()


# ==== Alone ====


@each_script
def test_imports_and_dependencies(script):
    """No script imports another; the PEP 723 block asks for what it imports and nothing else, as pyproject does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", SOURCE[script]).group(1)
    metadata = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") + "\n" for line in block.splitlines()))
    needed = imports(script) - sys.stdlib_module_names
    needed |= {"six"} if "gymnax" in needed else set()  # which imports it without asking for it
    assert [re.match(r"[\w.-]+", x).group() for x in metadata["dependencies"]] == sorted(needed, key=str.lower)
    assert set(metadata["dependencies"]) <= {x.split(";")[0].strip() for x in project["dependencies"]}
    assert metadata["requires-python"] == project["requires-python"]


@each_script
def test_nothing_happens_at_the_top(script):
    """Only imports, definitions and the guard; in JAX one optimizer, which is two functions."""
    docstring, *body, guard = TREE[script].body
    assert isinstance(docstring.value, ast.Constant) and ast.unparse(guard.test) == "__name__ == '__main__'"
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    others = [ast.unparse(node) for node in body if not isinstance(node, allowed)]
    assert others in ([], ["optimizer = optax.scale_by_adam(eps=1e-05)"])
