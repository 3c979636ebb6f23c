"""The machine of a run, with nothing that identifies one machine among others of its kind."""

import importlib.metadata
import os
import pathlib
import platform
import re
from collections.abc import Sequence
from typing import Any

from popi_jax.modes import runfiles

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# These decide how fast a CPU multiplies. Not every library uses the widest of them on every maker's CPUs.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def describe(arguments: Sequence[str]) -> dict[str, Any]:
    """The machine, our side's versions, the commit, and the command with these arguments."""
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name in INSTRUCTIONS if name in _cpuinfo("flags").split()],
        "cores": cores(),
        "memory_gib": round(memory_gib(), 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git": runfiles.git_commit(),
        # Paths without their folders.
        "command": " ".join(["python -m benchmarks.run", *(re.sub(r"=.*/", "=", text) for text in arguments)]),
        "dtype": "float32",
    }


def _cpuinfo(field: str) -> str:
    """A field of the first core in Linux's list; "" on other systems."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
