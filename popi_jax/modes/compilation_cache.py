"""Caches compiled programs between processes, so that resuming or evaluating a run does not compile again.

The programs are native code. They go to the user's cache folder and never to a workdir, which may be shared.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import warnings
from typing import Any

import jax
from etils import epath

_MAX_BYTES = 4 << 30  # The limit of the folder. JAX removes the least recently used programs beyond it.
_NO_LIMIT = -1
_UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '([\w.]+)'")
_MIN_COMPILE_S = 0.1  # JAX's default, 1 s, would leave out half of a small model's programs.


def enable() -> None:
    """Makes JAX cache compiled programs in `folder()`, unless the environment says otherwise.

    JAX's own variables take precedence. JAX_COMPILATION_CACHE_DIR names another folder, which is used as it is (on a
    pod use a bucket, so that every host finds the programs). JAX_ENABLE_COMPILATION_CACHE=false disables the cache.
    JAX_COMPILATION_CACHE_MAX_SIZE and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS replace our values. Call this before
    anything is compiled.
    """
    _replace_damaged()
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    own = folder()
    settings = {
        "jax_compilation_cache_max_size": _limit(own),
        "jax_persistent_cache_min_compile_time_secs": _MIN_COMPILE_S,
    }
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    if jax.config.jax_compilation_cache_max_size != _NO_LIMIT:  # type: ignore[attr-defined]
        _remove_unfinished(own)
    jax.config.update("jax_compilation_cache_dir", str(own))


def _replace_damaged() -> None:
    """Makes a program that JAX cannot read give way to the one that is compiled instead.

    JAX 0.10.2 warns, compiles, and keeps the old entry, so that every start warns and compiles again. It names the
    program in the warning, which comes before the new entry is written. All entries of that name are removed, since
    their keys are not in the warning.
    """
    show = warnings.showwarning
    if getattr(show, "replaces_damaged", False):
        return

    def showwarning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        found = _UNREADABLE.match(str(message))
        kept_in = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        if found and kept_in:
            with contextlib.suppress(OSError):
                for entry in epath.Path(kept_in).glob(f"{found[1]}-*-cache"):
                    entry.unlink(missing_ok=True)
            message = f"{message}; the program is compiled again and replaced"
        show(message, *args, **kwargs)

    showwarning.replaces_damaged = True  # type: ignore[attr-defined]
    warnings.showwarning = showwarning


def folder() -> pathlib.Path:
    """Returns the folder for this kind of CPU in $XDG_CACHE_HOME/popi_jax/compiled (~/.cache by default).

    JAX's cache keys distinguish accelerators but not CPUs. If machines share a home, code compiled for AVX-512 would
    crash on a CPU without it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "popi_jax" / "compiled" / hashlib.sha256(_cpu().encode()).hexdigest()[:16]


def _limit(own: pathlib.Path) -> int:
    """Creates the folder and returns its limit in bytes, or _NO_LIMIT if the folder's owner has no name.

    An owner has no name in a container that runs under an arbitrary user id. JAX 0.10.2 reads file sizes with etils,
    which looks up the owner's name and fails, so a limit would prevent almost every write (jax-ml/jax#40650).
    """
    try:
        own.mkdir(parents=True, exist_ok=True)
        epath.Path(own).stat()
    except KeyError:
        return _NO_LIMIT
    except OSError:  # JAX warns about an unwritable folder, and the run continues without a cache.
        pass
    return _MAX_BYTES


def _remove_unfinished(own: pathlib.Path) -> None:
    """Removes entries without the second file that JAX writes under a limit, which has the time of last use.

    A process that is killed between the two writes leaves such an entry. It may be incomplete, and as long as it
    exists, JAX 0.10.2 caches no other program (jax-ml/jax#39880; findings/jax_cache_entry_without_atime.sh).
    """
    with contextlib.suppress(OSError):  # An entry that remains costs only time and must not stop a run.
        for entry in own.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink(missing_ok=True)  # Another process may remove it, too.


def _cpu() -> str:
    described = platform.machine() + platform.processor()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Not Linux. There, machines rarely share a home.
        return described
    # The instruction sets, and the model that the compiler tunes for. All cores repeat these lines; keep each once.
    kinds = ("flags", "Features", "model", "model name", "cpu family", "CPU part")
    return described + "".join(dict.fromkeys(line for line in lines if line.split("\t")[0].strip() in kinds))
