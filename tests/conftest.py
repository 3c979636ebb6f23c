"""Every test runs on 8 virtual CPU devices and refuses silent rank promotion."""

import os

# Before JAX is imported. XLA's CPU client takes its thread count from NPROC: with fewer than two threads a device, a
# collective of an asynchronous loop waits for threads that never come, and the process is aborted after 40 s.
os.environ["NPROC"] = "16"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def no_mesh_from_another_file() -> Iterator[None]:
    """A loaded system sets its mesh for the whole process; the next file's tests start without one."""
    yield
    jax.set_mesh(None)
