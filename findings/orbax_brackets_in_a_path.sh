#!/usr/bin/env bash
# Orbax 0.12.8: with a bracket in its path, a checkpoint loses its arrays and still counts as finished.
#
# Each process writes its arrays into a folder of its own (ocdbt.process_N). At the end, Orbax looks for these folders
# with a glob of the whole path, in which a bracket that the user wrote is a pattern. It finds none, merges nothing, and
# commits the checkpoint. Saving raises no error, and the step is listed. Sweeps name folders so: runs/lr=[1e-6].
#
# Expected: the arrays, or an error when saving. Seen: the save succeeds, and loading says that the arrays are missing.
#
# The script exits with 0 as long as the versions below behave so. It needs Python 3.11 or newer and a package index.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$python" --version
"$python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(jax|jaxlib|numpy|orbax-checkpoint) '

cat > "$folder/save.py" <<'EOF'
import sys

import jax.numpy as jnp
from orbax.checkpoint import v1

path = sys.argv[1]
with v1.training.Checkpointer(path) as checkpointer:
    checkpointer.save_checkpointables(1, {"state": {"x": jnp.ones(5)}})
    print("steps", [checkpoint.step for checkpoint in checkpointer.checkpoints])
try:
    print("x", v1.load_checkpointables(f"{path}/1")["state"]["x"].tolist())
except Exception as error:
    print("loading raised", type(error).__name__)
EOF

run() {
    JAX_PLATFORMS=cpu "$python" "$folder/save.py" "$folder/$1" 2> "$folder/errors" | tee "$folder/output"
}
check() {
    if ! grep -q "$2" "$folder/output"; then
        echo "CHANGED: $1 no longer holds" >&2
        exit 1
    fi
    echo "holds: $1"
}

echo "== runs/lr=1e-6"
run "runs/lr=1e-6"
check "the step is listed" '^steps \[1\]$'
check "the array is there" '^x \[1.0, 1.0, 1.0, 1.0, 1.0\]$'
echo "== runs/lr=[1e-6]"
run "runs/lr=[1e-6]"
check "the step is listed" '^steps \[1\]$'
check "the array is not there" '^loading raised '
