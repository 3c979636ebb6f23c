"""The text of a compiled program: what libtpu writes down while it compiles, or else JAX's print.

Both are the same, but JAX cannot always make its own: for TPUs with SparseCores libtpu hands gathers and scatters over
to them, in asynchronous instructions of a form that XLA's reader refuses, and `compiled.as_text()` reads before it
prints.
"""

import functools
import os
import pathlib
import tempfile
from typing import Any

_FLAG = "--xla_jf_dump_to="
_NAME = "*-hlo.txt"  # Of the optimised program, among what libtpu writes.


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:  # Cached: it goes with the process.
    return tempfile.TemporaryDirectory(prefix="popi_jax_hlo_")


def keep_texts() -> None:
    """Makes libtpu write down every program that it compiles; void once libtpu is loaded."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if _FLAG in flags:  # The user's own, or set already.
        return
    # The last two keep it from writing what every pass makes of every instruction.
    own = f"{_FLAG}{_folder().name} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=false"
    os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {own} --xla_jf_dump_llo_pass_label_regex=^$".strip()


def forget() -> None:
    """Removes what was written down; to be called before a program is compiled whose text is wanted."""
    for path in pathlib.Path(_folder().name).iterdir():
        path.unlink()


def text(compiled: Any) -> str:  # Any: jax.stages.Compiled says that there may be none.
    """The optimised HLO of what was compiled last.

    Raises:
        jax.errors.JaxRuntimeError: libtpu wrote nothing down, and JAX cannot print it.
    """
    written = sorted(pathlib.Path(_folder().name).glob(_NAME), key=lambda path: path.stat().st_size)
    return written[-1].read_text(encoding="utf-8") if written else compiled.as_text()
