#!/usr/bin/env bash
# JAX 0.10.2: one entry without its -atime file stops every write to a compilation cache with a size limit.
#
# With jax_compilation_cache_max_size set, the cache keeps two files per program, KEY-cache and KEY-atime, and writes
# them one after the other. A process that is killed in between leaves KEY-cache alone. Before each later write, the
# cache reads the -atime file of every entry, finds one missing, and gives up. Reads still work, and nothing repairs
# the folder, so each new program is compiled again at every start. The only sign is a warning.
#
# Conditions: the limit is set, and so filelock is installed; without filelock JAX refuses the limit and caches nothing.
# Reported as jax-ml/jax#39880 and fixed by #39883; jax 0.12.0.1 has the fix.
#
# The script exits with 0 as long as jax 0.10.2 behaves so. It needs Python 3.11 or newer and a package index.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 filelock==4.2.12
"$python" --version
"$python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(filelock|jax|jaxlib) '

export JAX_PLATFORMS=cpu
export JAX_COMPILATION_CACHE_DIR="$folder/cache"
export JAX_COMPILATION_CACHE_MAX_SIZE=1000000000
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

# Compiles one program of the given name, and prints whether it came from the cache. A second argument, killed, makes the
# process end by SIGKILL as it opens the program's -atime file.
cat > "$folder/compile.py" <<'EOF'
import os
import signal
import sys

import jax
import numpy as np

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)


def kill(event, arguments):
    if event == "open" and str(arguments[0]).endswith("-atime"):
        os.kill(os.getpid(), signal.SIGKILL)


def double(x):
    return x * 2


if sys.argv[2:] == ["killed"]:
    sys.addaudithook(kill)
double.__name__ = sys.argv[1]
jax.jit(double)(np.ones(3, np.float32))
print(sys.argv[1], "was read from the cache" if hits else "was compiled")
EOF

run() {
    "$python" "$@" 2>&1 | sed "s#$folder#FOLDER#g" | tee -a "$folder/output"
}
entries() {
    (cd "$JAX_COMPILATION_CACHE_DIR" && ls | sed -E 's/-[0-9a-f]{64}/-KEY/')
}
check() {
    if ! eval "$2"; then
        echo "CHANGED: $1 no longer holds" >&2
        exit 1
    fi
    echo "holds: $1"
}

echo "== a process is killed between the two writes"
status=0
"$python" "$folder/compile.py" first killed || status=$?
entries
check "the process died of SIGKILL" '[ "$status" -eq 137 ]'
check "the entry has no -atime file" '[ "$(entries)" = "jit_first-KEY-cache" ]'

echo "== two later processes compile a second program; expected: the first keeps it, the second reads it"
run "$folder/compile.py" second
run "$folder/compile.py" second
entries
check "the second program is compiled both times" '[ "$(grep -c "second was compiled" "$folder/output")" -eq 2 ]'
check "both warn that the -atime file is missing" \
    '[ "$(grep -c "Error writing .*jit_second.*FileNotFoundError.*-atime" "$folder/output")" -eq 2 ]'
check "the second program is not in the folder" '! entries | grep -q second'

echo "== the lone entry is removed: the second program is kept"
rm "$JAX_COMPILATION_CACHE_DIR"/jit_first-*-cache
run "$folder/compile.py" second
run "$folder/compile.py" second
entries
check "the second program is read from the folder" 'tail -1 "$folder/output" | grep -q "read from the cache"'
