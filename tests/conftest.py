"""Every test runs on 8 virtual CPU devices and refuses silent rank promotion."""

import atexit
import os
import shutil
import tempfile

# Before JAX is imported. XLA's CPU client takes its thread count from NPROC: with fewer than two threads a device, a
# collective of an asynchronous loop waits for threads that never come, and the process is aborted after 40 s.
os.environ["NPROC"] = "16"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# Commands in processes of their own compile the same programs again and again. New each time: it is this code's tests.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="popi_jax_compiled_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def no_programs_of_another_file() -> Iterator[None]:
    """Drops the compiled programs of each test file.

    Each is mapped into memory in many pieces: with those of all tests the process would be aborted at Linux's limit of
    65,530 mappings (vm.max_map_count).
    """
    yield
    jax.clear_caches()
