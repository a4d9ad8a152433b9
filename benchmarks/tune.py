"""Search for the hyper-parameters of a script on an environment, by Optuna.

    python benchmarks/tune.py ppo_jax --env-id Acrobot-v1 --trials 50

Flags that are not of this file go to the script, and are not searched. A trial's value is the mean of the last 100
training returns over seeds 0, 1, ..., which no report uses: experiments.toml begins at 100. JAX trains all of them in
one program. PyTorch trains one after the other, and a trial whose first ones are below the median is pruned.

All trials are kept in a file. The same command goes on from there, also after a crash; started several times, on one
machine or on several that share the file, the processes search together until there are --trials in all.
"""

import importlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optuna
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

SPACE = {  # lists: one of them; a script without one of these flags does without
    "learning_rate": (1e-4, 1e-2),  # between them, logarithmically
    "gamma": [0.9, 0.95, 0.98, 0.99, 0.995, 0.999],
    "gae_lambda": [0.8, 0.9, 0.95, 0.98, 1.0],
    "num_envs": [4, 8, 16],
    "num_steps": [32, 64, 128, 256, 512],
    "num_minibatches": [1, 4, 16],
    "update_epochs": [1, 4, 10],
    "ent_coef": [0.0, 0.001, 0.01],
    "norm_obs": [False, True],
    "norm_reward": [False, True],
    "activation": ["tanh", "relu"],
}


@dataclass(frozen=True)
class Args:
    """Search, print the best flags, and draw the trials; other flags go to the script."""

    script: Annotated[str, tyro.conf.Positional]  # reinforce, ppo_jax, ...
    trials: int = 50  # in all, of all processes
    seeds: int = 3  # agents of a trial
    storage: Path = Path("runs/tune.log")  # file of all trials of all searches, beside it the figure


def as_flag(name: str, value: Any) -> str:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value:.3g}" if isinstance(value, float) else f"--{name} {value}"


def final_returns(script: str, flags: str, seed: int, num_seeds: int) -> list[float]:
    """Means of the last 100 training episodes of seeds `seed`, `seed` + 1, ..., `num_seeds` in one program."""
    module = importlib.import_module(script)
    many = f"--num-seeds {num_seeds}" if num_seeds > 1 else ""
    args = tyro.cli(module.Args, args=shlex.split(f"{flags} --eval-episodes 0 --save-every 0 --seed {seed} {many}"))
    returns = module.train(args).episode_returns
    return [float(x[-100:].mean()) for x in (returns if many else [returns])]


def main() -> None:
    args, rest = tyro.cli(Args, return_unknown_args=True)
    known = importlib.import_module(args.script).Args.__dataclass_fields__
    given = {word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for word in rest}
    space = {name: choices for name, choices in SPACE.items() if name in known and name not in given}

    def objective(trial: optuna.Trial) -> float:
        for name, choices in space.items():
            if isinstance(choices, tuple):
                trial.suggest_float(name, *choices, log=True)
            else:
                trial.suggest_categorical(name, choices)
        flags = " ".join([*rest, *(as_flag(name, value) for name, value in trial.params.items())])
        trial.set_user_attr("command", f"python {args.script}.py {flags}")
        returns, at_once = [], args.seeds if args.script.endswith("_jax") else 1
        while len(returns) < args.seeds:
            returns += final_returns(args.script, flags, len(returns), at_once)
            trial.report(float(np.mean(returns)), len(returns))
            if len(returns) < args.seeds and trial.should_prune():
                raise optuna.TrialPruned
        return float(np.mean(returns))

    args.storage.parent.mkdir(parents=True, exist_ok=True)
    file = optuna.storages.journal.JournalFileBackend(str(args.storage))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(file),
        study_name=" ".join([args.script, *rest, f"(seeds: {args.seeds})"]),
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(constant_liar=True),  # for several processes
    )
    while sum(trial.state.is_finished() for trial in study.trials) < args.trials:
        study.optimize(objective, n_trials=1, catch=FloatingPointError)  # of a loss that is not finite
    panels = np.ravel(optuna.visualization.matplotlib.plot_slice(study, target_name="mean return"))  # one for each flag
    panels[0].figure.savefig(args.storage.with_suffix(".png"), bbox_inches="tight")
    print(f"{study.best_value:.5g}: {study.best_trial.user_attrs['command']}")


if __name__ == "__main__":
    main()
