"""A lock per folder, so that two processes never write the files of one run."""

import contextlib
import fcntl
import logging
import os
import pathlib
import socket
import time
from collections.abc import Iterator

import jax

from popi_jax.data import files
from popi_jax.errors import UserError


@contextlib.contextmanager
def held(folder: pathlib.Path, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a folder, which is created if missing. In a multi-process run, the first process holds it.

    The lock is on the file `lock`, which names the holder. The kernel releases it when the process ends in any way, so
    a file that a killed process left behind locks nothing. Files that it had not finished are removed.

    Args:
        folder: the folder.
        wait: whether to wait for another holder.

    Raises:
        UserError: another process holds the lock.
    """
    if jax.process_index() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder}: another process writes this folder ({file.read().strip() or 'it has just started'}); wait"
                " until it has ended, or choose another folder"
            ) from None
        except OSError as error:
            logging.warning("%s: no lock, because this file system has none (%s)", folder, error.strerror)
        with contextlib.suppress(OSError):  # A full disk must not prevent the lock.
            started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {started}\n")
            file.flush()
        files.remove_unfinished(folder)
        yield
