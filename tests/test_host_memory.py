"""Freed memory stays in the process. The setting holds for a whole process, so each case runs in its own."""

import platform
import subprocess
import sys

import pytest

# Fills and frees 256 MiB twice, in threads as XLA does. Prints the number of page faults of the second time.
PROGRAM = """
import resource, sys, threading
import numpy as np
from popi_jax.modes import host_memory

def fill():
    np.ones(1 << 25)

def in_thread():
    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()

if sys.argv[1] == "keep":
    host_memory.keep()
in_thread()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
in_thread()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_is_reused_without_page_faults():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < 100
    assert faults("not") > 100
