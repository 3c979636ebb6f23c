"""Keeps compiled programs between processes: a run that is gone on with, or evaluated, does not compile again.

They are native code, so they lie in a folder of the user's own and never in a workdir, which may be passed on.
"""

import contextlib
import hashlib
import os
import pathlib
import platform

import jax

_MAX_BYTES = 4 << 30  # Of the folder: beyond it, what was not used for longest goes.
_MIN_COMPILE_S = "0.1"  # JAX's own default, 1 s, leaves out half of a small model's programs.


def enable() -> None:
    """Makes JAX keep compiled programs in `folder()`, unless the environment says otherwise.

    JAX's own variables go before: JAX_COMPILATION_CACHE_DIR names another folder (on a pod a bucket, so that every
    host finds them), which is left to its owner; JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. To be called before
    anything is compiled.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    own = folder()
    _tidy(own)
    jax.config.update("jax_compilation_cache_dir", str(own))
    seconds = os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", _MIN_COMPILE_S)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(seconds))


def folder() -> pathlib.Path:
    """$XDG_CACHE_HOME/popi_jax/compiled (~/.cache by default), and in it one folder per kind of CPU.

    JAX tells accelerators apart by itself, and CPUs not: code for one with AVX-512 would crash on one without, where
    machines share a home.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "popi_jax" / "compiled" / hashlib.sha256(_cpu().encode()).hexdigest()[:16]


def _tidy(own: pathlib.Path) -> None:
    """Makes room. JAX's own limit keeps a second file per program; killed between the two, it takes no program more."""
    found = []
    for path in own.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # Another process tidies, too.
            stat = path.stat()
            found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= _MAX_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size


def _cpu() -> str:
    described = platform.machine() + platform.processor()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Not on Linux: machines of one architecture share no home there, as a rule.
        return described
    # The instructions that it has, and the model, which the compiler tunes for; once, however many cores there are.
    kinds = ("flags", "Features", "model", "model name", "cpu family", "CPU part")
    return described + "".join(dict.fromkeys(line for line in lines if line.split("\t")[0].strip() in kinds))
