"""Compiled programs are kept between processes, and one that is damaged is compiled again."""

import os
import subprocess
import sys

import pytest

from popi_jax.modes import compilation_cache

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from popi_jax.modes import compilation_cache
compilation_cache.enable()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)

@jax.jit
def slow_to_compile(x):
    for _ in range(60):
        x = jnp.sort(jnp.sin(x) @ x)
    return x.sum()

print(slow_to_compile(np.linspace(0, 1, 81, dtype=np.float32).reshape(9, 9)), len(hits))  # Nothing else is compiled.
"""


def run(home, **more):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERS"))}
    env |= {"XDG_CACHE_HOME": str(home), **more}
    out = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    value, hits = out.stdout.split()
    return float(value), int(hits)


@pytest.fixture
def kept(tmp_path):
    """The value of the first process, and the folder that it left."""
    value, hits = run(tmp_path)
    assert hits == 0
    return value, tmp_path


def test_the_next_process_compiles_nothing(kept):
    value, home = kept
    assert run(home) == (value, 1)


def test_a_damaged_program_is_compiled_again(kept):
    value, home = kept
    (entry,) = home.glob("popi_jax/compiled/*/jit_slow_to_compile*-cache")
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert run(home) == (value, 0)


def test_jaxs_own_variables_go_before(tmp_path):
    run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "elsewhere"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert list((tmp_path / "elsewhere").iterdir())
    run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert not list(tmp_path.glob("popi_jax/compiled/*/*-cache"))


def test_what_was_not_used_for_longest_goes(tmp_path, monkeypatch):
    for age, name in enumerate(["new", "older", "oldest"]):
        (tmp_path / name).write_bytes(bytes(40))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(compilation_cache, "_MAX_BYTES", 100)
    compilation_cache._tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "older"]
