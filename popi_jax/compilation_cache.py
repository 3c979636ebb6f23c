"""Keeps compiled programs between processes: a run that is gone on with, or evaluated, does not compile again.

They are native code, so they lie in a folder of the user's own and never in a workdir, which may be passed on.
"""

import hashlib
import os
import pathlib
import platform

import jax

_MAX_BYTES = 4 << 30  # Beyond it, what was not used for longest goes.
_MIN_COMPILE_S = 0.1  # JAX's own default, 1 s, leaves out half of a small model's programs.


def enable() -> None:
    """Makes JAX keep compiled programs in `folder()`, unless the environment says otherwise.

    JAX's own variables go before: JAX_COMPILATION_CACHE_DIR names another folder (on a pod a bucket, so that every
    host finds them), JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. To be called before anything is compiled.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    jax.config.update("jax_compilation_cache_dir", str(folder()))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_S)


def folder() -> pathlib.Path:
    """$XDG_CACHE_HOME/popi_jax/compiled (~/.cache by default), and in it one folder per kind of CPU.

    JAX tells accelerators apart by itself, and CPUs not: code for one with AVX-512 would crash on one without, where
    machines share a home.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "popi_jax" / "compiled" / hashlib.sha256(_cpu().encode()).hexdigest()[:16]


def _cpu() -> str:
    described = platform.machine() + platform.processor()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Not on Linux: machines of one architecture share no home there, as a rule.
        return described
    # The first core's: the instructions that it has, and the model, which the compiler tunes for.
    kinds = ("flags", "Features", "model", "model name", "cpu family", "CPU part")
    return described + "".join(dict.fromkeys(line for line in lines if line.split("\t")[0].strip() in kinds))
