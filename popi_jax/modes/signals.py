"""SIGINT (Ctrl-C) and SIGTERM (a preemption, a time limit) at any moment: one line on stderr, exit code 130 or 143.

Every file of a run is written so that a kill leaves it complete, absent or resumable. So a thread ends the process at
once, even while the main thread compiles. Only a training loop with steps that no checkpoint holds defers the end: it
asks after each step, saves, and then ends. A second signal ends it at once.
"""

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from typing import Self, TypeVar

from popi_jax.modes import host_memory

T = TypeVar("T")


class Stopped(Exception):
    """A signal stopped the run, which has saved its state. `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(_line(number))
        self.number = number


class _BrokenOff(BaseException):
    """Leaves code that runs within `Deferral.breakable`. No handler of errors may catch it."""


class Deferral:
    """Defers the end of the process until the training loop has saved its state. Use it as a context manager.

    It raises Stopped at its end if there was a signal. In a run of several processes JAX's preemption service hears
    SIGTERM instead, and all processes agree on the step to stop after.
    """

    def __init__(self) -> None:
        import jax  # Late: a command listens before it imports JAX.

        self._processes = jax.process_count()
        self._lock = threading.Lock()
        self._holds = self._over = self._breakable = False
        self._heard = self._told = 0  # The signal, as set by the listening and by the main thread.

    def __enter__(self) -> Self:
        global _deferral
        _deferral = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _deferral
        with self._lock:
            self._over, _deferral = True, None
        if self._processes > 1 and _listening:
            _hear(signal.SIGTERM)  # JAX's service replaced this handler, and after the loop nobody asks the service.
        number = self._told or self._heard
        if number and (kind is None or issubclass(kind, _BrokenOff)):
            raise Stopped(number) from None

    def reached(self, step: int) -> bool:
        """Returns whether the run is to stop after `step`, the same in every process.

        The first call says that the loop has something to save.
        """
        self._holds = True
        if self._processes > 1 and not self._told:
            from jax.experimental import multihost_utils

            self._told = signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return bool(self._told)

    def breakable(self, run: Callable[[], T]) -> T | None:
        """Runs a function, such as an evaluation, and returns its result; None if a signal broke it off."""
        try:
            self._breakable = self._processes == 1
            return None if self._told and self._breakable else run()
        except _BrokenOff:
            return None
        finally:
            self._breakable = False

    def take(self, number: int) -> bool:
        """Takes a signal, in the listening thread. Returns whether the loop will end the process."""
        with self._lock:
            if not self._holds or self._over or self._heard:
                return False
            self._heard = number
        if self._processes > 1:  # JAX's service tells the other processes.
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    def tell(self, number: int) -> None:
        """Tells the loop of a signal, in the main thread. Breaks off breakable code."""
        if self._processes > 1:
            return
        self._told = number
        if self._breakable:
            self._breakable = False
            raise _BrokenOff


_deferral: Deferral | None = None
_listening = False


def _nothing() -> str:
    return "nothing was written"


_safe = _nothing


def say(safe: Callable[[], str]) -> None:
    """Sets the part of the line that says what is safe if the process ends from now on."""
    global _safe
    _safe = safe


def listen() -> None:
    """Starts to listen. Commands call this before their imports, which take seconds."""
    global _listening
    if _listening:
        return
    _listening = True
    host_memory.keep()  # Before the first thread starts.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Python runs handlers in the main thread, between two instructions. This pipe is written at once.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        _hear(number)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def _hear(number: int) -> None:
    signal.signal(number, _in_main_thread)


def _in_main_thread(number: int, frame: types.FrameType | None) -> None:
    if _deferral is not None:
        _deferral.tell(number)


def _watch(reading: int) -> None:
    while True:
        number = os.read(reading, 1)[0]
        if number in (signal.SIGINT, signal.SIGTERM) and (_deferral is None or not _deferral.take(number)):
            os.write(2, f"{_line(number)}\n".encode())
            # Another thread may hold the lock of stdout for ever, when nobody reads what it writes.
            timer = threading.Timer(1.0, os._exit, (128 + number,))
            timer.daemon = True
            timer.start()
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.write("\x1b[?25h" if sys.stdout.isatty() else "")  # A progress bar hides the cursor.
                sys.stdout.flush()
            os._exit(128 + number)


def _line(number: int) -> str:
    try:
        safe = _safe()
    except OSError as error:
        safe = str(error)
    return f"stopped by {signal.Signals(number).name}: {safe}; run the same command again to resume"
