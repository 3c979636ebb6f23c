"""Compiled programs are cached between processes, up to a size limit. A damaged entry is compiled again."""

import os
import subprocess
import sys

import pytest

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
WITHOUT_A_NAME = """
import pwd

def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = getpwuid
"""


def run(home, first="", **more):
    """Runs `first` and PROGRAM in a new process; returns its value and the number of programs read from the cache."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERS"))}
    env |= {"XDG_CACHE_HOME": str(home), **more}
    out = subprocess.run([sys.executable, "-c", first + PROGRAM], env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    value, hits = out.stdout.split()
    return float(value), int(hits)


def entries(home):
    """Returns the names of the programs in the cache, without JAX's keys."""
    return sorted(path.name.split("-")[0] for path in home.glob("popi_jax/compiled/*/*-cache"))


@pytest.fixture
def kept(tmp_path):
    """The value computed by a first process, and its cache folder."""
    value, hits = run(tmp_path)
    assert hits == 0
    return value, tmp_path


def test_next_process_compiles_nothing(kept):
    value, home = kept
    assert run(home) == (value, 1)


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: raw[:99] + bytes([raw[99] ^ 1]) + raw[100:]],
    ids=["cut", "empty", "flipped"],
)
def test_damaged_program_is_compiled_again_and_replaced(kept, damage):
    value, home = kept
    (entry,) = home.glob("popi_jax/compiled/*/jit_slow_to_compile*-cache")
    entry.write_bytes(damage(entry.read_bytes()))
    assert run(home) == (value, 0)
    assert run(home) == (value, 1)  # It was replaced.


def test_jax_environment_variables_take_precedence(tmp_path):
    run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "elsewhere"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert list((tmp_path / "elsewhere").iterdir())
    run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    run(tmp_path, JAX_COMPILATION_CACHE_MAX_SIZE="1")
    run(tmp_path, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1000")
    assert not entries(tmp_path)


def test_least_recently_used_program_is_removed_at_the_limit(kept):
    value, home = kept
    (folder,) = home.glob("popi_jax/compiled/*")
    for age, name in enumerate(["older", "newer"], start=1):
        with open(folder / f"{name}-cache", "wb") as entry:
            entry.truncate(3 << 30)  # A sparse file, which takes no disk space.
        (folder / f"{name}-atime").write_bytes(age.to_bytes(8, "little"))
    (entry,) = folder.glob("jit_slow_to_compile*-cache")
    entry.unlink()
    assert run(home) == (value, 0)
    assert entries(home) == ["jit_slow_to_compile", "newer"]


def test_unfinished_entry_of_a_killed_process_does_not_block_others(kept):
    value, home = kept
    (folder,) = home.glob("popi_jax/compiled/*")
    for path in folder.glob("jit_slow_to_compile*"):
        path.unlink()
    (folder / "unfinished-cache").write_bytes(b"cut sh")
    assert run(home) == (value, 0)
    assert entries(home) == ["jit_slow_to_compile"]
    assert run(home) == (value, 1)


@pytest.mark.parametrize(
    "setting",
    [{"first": WITHOUT_A_NAME}, {"JAX_COMPILATION_CACHE_MAX_SIZE": "-1"}],
    ids=["owner_has_no_name", "unlimited"],
)
def test_programs_are_kept_without_a_limit(tmp_path, setting):
    value, _ = run(tmp_path, **setting)
    (folder,) = tmp_path.glob("popi_jax/compiled/*")
    for path in folder.glob("jit_slow_to_compile*"):
        path.rename(path.with_name(path.name.replace("jit_slow_to_compile", "another")))
    assert run(tmp_path, **setting) == (value, 0)  # The cache has only the other program.
    assert run(tmp_path, **setting) == (value, 1)


def test_unwritable_folder_does_not_stop_a_run(tmp_path):
    (tmp_path / "file").touch()
    _, hits = run(tmp_path / "file")
    assert hits == 0
