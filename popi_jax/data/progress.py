"""Shows how far a long reading of rows has come: a bar on a terminal, elsewhere a line every ten seconds."""

import sys
import time
from typing import Self

import rich.progress
from rich.console import Console

_PATIENCE = 1.0  # Seconds before anything is shown. Small data need less.
_LINES = 10.0  # Seconds between two lines.


class Progress:
    """Shows rows, rows per second and the time left on stderr. Use it as a context manager.

    Args:
        name: what is done.
        total: the number of rows.
        console: where to print; stderr by default.
        patience: the seconds before anything is shown.
    """

    def __init__(self, name: str, total: int, console: Console | None = None, patience: float = _PATIENCE):
        self._name, self._total, self._patience = name, total, patience
        self._console = console or Console(file=sys.stderr)
        self._begun = self._said = time.monotonic()
        self._first: int | None = None
        self._ended = False
        self._bar: rich.progress.Progress | None = None
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(),
                "{task.fields[shown]}",
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(name, total=total, shown="")

    def update(self, rows: int) -> None:
        """Shows that so many rows are done. Those of the first call were done before."""
        now = time.monotonic()
        self._first = rows if self._first is None else self._first
        passed = now - self._begun
        if passed < self._patience:
            return
        rate = (rows - self._first) / passed
        left = f"{(self._total - rows) / rate:,.0f} s left" if rate else "starting"
        shown = f"{rows:,}/{self._total:,} rows  {rate:,.0f} rows/s  {left}"
        if self._bar is not None:
            self._bar.start()  # Starting it again changes nothing.
            self._bar.update(self._task, completed=rows, shown=shown)
        elif now - self._said >= _LINES or (rows >= self._total and self._said > self._begun and not self._ended):
            self._said, self._ended = now, rows >= self._total
            self._console.print(f"{self._name}: {shown}", markup=False, emoji=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
