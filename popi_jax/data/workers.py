"""Runs jobs in several processes, as many as there are cores; a few small ones in this process."""

import concurrent.futures
import concurrent.futures.process
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from popi_jax.data.progress import Progress
from popi_jax.errors import UserError

J = TypeVar("J")
R = TypeVar("R")
Told = Callable[[int], None]  # Called with the number of rows that are done since the last call.

_POLL = 0.2  # Seconds between two looks at the progress.


class Killed(UserError):
    """A process of the pool was killed. What the others finished is good."""


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    function: Callable[[J, Told], R],
    jobs: Sequence[J],
    name: str,
    rows: int,
    done: int = 0,
    processes: int | None = None,
) -> list[R]:
    """Runs the function on each job and returns the results in the order of the jobs.

    Args:
        function: of a module, to run on a job.
        jobs: they are pickled.
        name: for the progress bar.
        rows: the number of rows of all jobs, and of those done before.
        done: the rows that were done before.
        processes: how many to use; 1 runs the jobs in this process. By default, as many as there are cores.

    Raises:
        UserError: that of the first job that has a mistake.
        Killed: a process was killed, as the kernel does when memory is full.
    """
    if not jobs:
        return []
    processes = min(processes or cores(), len(jobs))
    with Progress(name, rows) as progress:
        progress.update(done)
        if processes <= 1:
            return _here(function, jobs, progress, done)
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", done)
        before = set(multiprocessing.active_children())
        executor = concurrent.futures.ProcessPoolExecutor(processes, context, _begin, (counter,))
        futures: list[concurrent.futures.Future[R]] = []
        try:
            futures += [executor.submit(_there, function, job) for job in jobs]
            for future in futures:  # In order, so that of several mistakes the same one is told each time.
                while not concurrent.futures.wait([future], _POLL).done:
                    progress.update(counter.value)
                future.result()
            progress.update(counter.value)
            return [future.result() for future in futures]
        except concurrent.futures.process.BrokenProcessPool:
            raise Killed(
                f"{name}: a process was killed, perhaps because the memory was full; free memory, or let the command"
                " use fewer cores, for example with taskset -c 0"
            ) from None
        finally:
            # After a mistake, nobody waits for the jobs that run.
            if not all(future.done() and not future.exception() for future in futures):
                for process in set(multiprocessing.active_children()) - before:
                    process.terminate()
            executor.shutdown(cancel_futures=True)


def threads(function: Callable[[J], R], values: Iterable[J]) -> list[R]:
    """Applies a function that mostly waits or hashes to each value, in as many threads as there are cores."""
    with concurrent.futures.ThreadPoolExecutor(cores()) as executor:
        return list(executor.map(function, values))


def _here(function: Callable[[J, Told], R], jobs: Sequence[J], progress: Progress, done: int) -> list[R]:
    def told(rows: int) -> None:
        nonlocal done
        done += rows
        progress.update(done)

    return [function(job, told) for job in jobs]


_counter: Any = None  # Of the rows done by all processes of a pool.


def _begin(counter: Any) -> None:
    """Prepares a process of the pool."""
    global _counter
    _counter = counter
    gc.disable()  # Rows make no cycles, and to look for some takes a tenth of the time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The first process hears it, and ends this one.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the one that started it has ended in any way. Else a killed one would leave it waiting."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _there(function: Callable[[J, Told], R], job: J) -> R:
    return function(job, _add)


def _add(rows: int) -> None:
    with _counter.get_lock():
        _counter.value += rows
