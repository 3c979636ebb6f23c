"""Runs every test on 8 virtual CPU devices and forbids implicit rank promotion."""

import atexit
import os
import shutil
import tempfile

# Set before JAX is imported. XLA's CPU client takes its thread count from NPROC: with fewer than two threads per
# device, a collective in an asynchronous loop waits for threads that never start, and the process aborts after 40 s.
os.environ["NPROC"] = "16"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of what the tests do, and takes half as long without the compiler's optimizations. `make nightly`
# runs every test with them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Workers and subprocesses compile the same programs repeatedly, so they share a cache. It is new in each session: an
# old one would hold programs of other code.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="popi_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def clear_compiled_programs() -> Iterator[None]:
    """Drops the compiled programs after each test file.

    Each program takes many memory mappings. Those of all tests would exceed Linux's limit of 65,530 (vm.max_map_count)
    and abort the process.
    """
    yield
    jax.clear_caches()
