"""What a run was measured on; nothing that tells one machine of a kind from another."""

import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

from popi_jax.training import metrics

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# They decide how fast a CPU multiplies; not every library uses the widest on every maker's.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
# Flags of which the last part alone is told.
PATHS = ("--data=", "--peers=", "--tunix=", "--model=", "--output=", "--work=")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def describe(arguments: Sequence[str]) -> dict[str, Any]:
    """The machine, the versions of our side, the commit and the command, whose arguments are given."""
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name in INSTRUCTIONS if name in _cpuinfo("flags").split()],
        "cores": cores(),
        "memory_gib": round(memory_gib(), 1),
        "system": f"{platform.system()} {platform.machine()}",
        # Near 0 on an idle machine; times of a busy one say little.
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git": metrics.git_commit(),
        "command": " ".join(["python -m benchmarks.run", *map(_without_folder, arguments)]),
        "dtype": "float32",
    }


def _without_folder(argument: str) -> str:
    for flag in PATHS:
        if argument.startswith(flag):
            return flag + pathlib.PurePath(argument.removeprefix(flag)).name
    return argument


def _cpuinfo(field: str) -> str:
    """This field of the first core in Linux's list; "" elsewhere."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
