#!/usr/bin/env bash
# The fast tests at the lowest and highest versions that pyproject.toml allows, on Python 3.11 to 3.13. Needs uv.
#
# PyTorch comes from TORCH_INDEX, by default its CPU index, whose builds bring no CUDA packages; or, where TORCH_LINKS
# names a folder of wheels, from there, and then only for the Python they are made for: elsewhere the JAX scripts alone
# train and resume, in an environment without PyTorch.
set -uo pipefail
cd "$(dirname "$0")/.."
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
failed=0
for python in ${PYTHONS:-3.11 3.12 3.13}; do
    for resolution in ${RESOLUTIONS:-lowest-direct highest}; do
        venv=$(mktemp -d)
        uv venv -q --python "$python" "$venv"
        torch=(--index "$index" --index-strategy unsafe-best-match)
        if [[ -n ${TORCH_LINKS:-} ]]; then # one version: the lowest is not to be had, and no other build wanted
            wheel=$(find "$TORCH_LINKS" -name "torch-*-cp${python/./}-*.whl" | head -1)
            torch=()
            [[ -n $wheel ]] && torch=("torch @ file://$(realpath "$wheel")")
        fi
        if [[ -n ${TORCH_LINKS:-} && -z ${wheel:-} ]]; then # JAX alone: all dependencies but PyTorch's
            requirements=$(mktemp --suffix .txt)
            "$venv/bin/python" - > "$requirements" <<'PYTHON'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = project["dependencies"] + project["optional-dependencies"]["test"]
print("\n".join(x for x in wanted if not x.startswith("torch>")))
PYTHON
            uv pip install -q --python "$venv/bin/python" --resolution "$resolution" -r "$requirements"
            tests='from pathlib import Path; import sys
for name in ("reinforce_jax", "vpg_advantage_jax", "ppo_jax"):
    module = __import__(name)
    flags = {} if name == "reinforce_jax" else {"num_steps": 32, "num_minibatches": 1}
    for backend in ("gymnax", "gymnasium"):
        args = module.Args(total_timesteps=1024, num_envs=4, env_backend=backend, **flags)
        result = module.train(args)
        module.train(module.Args(**vars(args) | {"resume": str(result.run_dir), "eval_only": True}))'
            (cd "$(mktemp -d)" && PYTHONPATH="$OLDPWD" "$venv/bin/python" -c "$tests" > /dev/null)
        else
            uv pip install -q --python "$venv/bin/python" --resolution "$resolution" "${torch[@]}" -e '.[test]' &&
                "$venv/bin/python" -m pytest -q
        fi
        status=$?
        [[ $status == 0 ]] || failed=1
        echo "Python $python, $resolution${wheel:+, torch from ${wheel##*/}}: $([[ $status == 0 ]] && echo passed || echo FAILED)"
        rm -rf "$venv"
    done
done
exit $failed
