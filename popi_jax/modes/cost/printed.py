"""The text of a compiled program: libtpu's dump from compilation, or else JAX's print.

Both are the same, but JAX cannot always print: on TPUs with SparseCores, libtpu offloads gathers and scatters to them
in asynchronous instructions of a form that XLA's parser rejects, and `compiled.as_text()` parses before it prints.
"""

import functools
import os
import pathlib
import tempfile
from typing import Any

_FLAG = "--xla_jf_dump_to="
_NAME = "*-hlo.txt"  # The optimised program, among libtpu's dumps.


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:  # Cached, so that it lives as long as the process.
    return tempfile.TemporaryDirectory(prefix="popi_jax_hlo_")


def keep_texts() -> None:
    """Makes libtpu dump every program that it compiles. Has no effect once libtpu is loaded."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if _FLAG in flags:  # Set by the user or by an earlier call.
        return
    # The last two flags turn off the dump of every pass.
    own = f"{_FLAG}{_folder().name} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=false"
    os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {own} --xla_jf_dump_llo_pass_label_regex=^$".strip()


def forget() -> None:
    """Removes earlier dumps; call it before compiling a program whose text is needed."""
    for path in pathlib.Path(_folder().name).iterdir():
        path.unlink()


def text(compiled: Any) -> str:  # Any, since jax.stages.Compiled.as_text may return None.
    """Returns the optimised HLO of the last compiled program.

    Raises:
        jax.errors.JaxRuntimeError: libtpu dumped nothing, and JAX cannot print the program.
    """
    written = sorted(pathlib.Path(_folder().name).glob(_NAME), key=lambda path: path.stat().st_size)
    return written[-1].read_text(encoding="utf-8") if written else compiled.as_text()
