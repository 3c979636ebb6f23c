"""A JSONL output with one line per input, written in any order, resumed, and left in the order of the input."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import rich.progress

from popi_jax.data import files
from popi_jax.errors import UserError

_ELSEWHERE = "choose another --output"


class Plan:
    """The lines of an output: one for each of `entries`.

    Attributes:
        entries: the fields that say what each line is made from.
        key: of these, the fields that tell the lines apart. No two entries agree in them.
        changeable: those that the input decides. A line in which one differs is written again; if another differs, such
            as the run's, the file is another command's.
        made: the fields that are added.
        head: the fields of an entry that come before these in a line; the others follow.
        what: the name of the lines, for the reader.
    """

    def __init__(
        self,
        entries: Sequence[Mapping[str, Any]],
        *,
        key: Sequence[str],
        changeable: Sequence[str],
        made: Sequence[str],
        head: Sequence[str],
        what: str,
    ):
        self.entries, self.key, self.changeable, self.what = entries, key, changeable, what
        self.made, self.head = made, head
        self._place = {self.key_of(entry): place for place, entry in enumerate(entries)}

    def key_of(self, line: Mapping[str, Any]) -> str:
        """Returns what tells a line apart."""
        return json.dumps([line.get(name) for name in self.key])

    def line(self, place: int, made: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the line of an entry, given the fields of `made`."""
        entry = self.entries[place]
        return {name: entry[name] for name in self.head if name in entry} | dict(made) | dict(entry)

    def begins(self, cut: bytes) -> bool:
        """Whether an incomplete line begins like one of these."""
        for entry in self.entries:
            head = {name: entry[name] for name in self.head if name in entry}
            start = json.dumps({**head, self.made[0]: ""}, ensure_ascii=False)[:-2].encode()
            if start.startswith(cut) or cut.startswith(start):
                return True
        return False

    def place(self, line: Any, where: str) -> tuple[int, bool]:
        """Returns the entry that a line of the output belongs to, and whether the input has changed since.

        Raises:
            UserError: this command did not write the line.
        """
        if not isinstance(line, dict):
            raise UserError(f"{where}: this command did not write this line; {_ELSEWHERE}")
        place = self._place.get(self.key_of(line))
        if place is None:
            named = ", ".join(f"{name} {line.get(name)!r:.80}" for name in self.key)
            raise UserError(f"{where}: the input has no {named}; {_ELSEWHERE}")
        entry, stale = self.entries[place], False
        for field, value in entry.items():
            if line.get(field) == value:
                continue
            if field not in self.changeable:
                raise UserError(
                    f"{where}: field {field!r} is {line.get(field)!r:.80}, but input and checkpoint give {value!r:.80};"
                    f" {_ELSEWHERE}"
                )
            stale = True
        if line.keys() != {*entry, *self.made}:
            raise UserError(f"{where}: has other fields than this command writes; {_ELSEWHERE}")
        return place, stale


def write(
    output: pathlib.Path,
    plan: Plan,
    batches: Iterable[Sequence[int]],
    make: Callable[[Sequence[int]], Sequence[Mapping[str, Any]]],
) -> None:
    """Writes the lines that the output lacks, batch by batch, and leaves all in the order of the entries.

    Args:
        output: the file. Lines of an earlier call stay as they are, unless their input has changed.
        plan: its lines.
        batches: the entries that are made together; each entry is in one batch.
        make: returns the fields of `plan.made` for each entry of a batch. A batch is made as a whole, so that its lines
            do not depend on where an earlier call was interrupted.

    Raises:
        UserError: another process writes the file, or this command did not write what is in it.
    """
    with contextlib.ExitStack() as locks:
        file = _locked(output, locks)
        there, changed = _present(output, file.read(), plan)
        if changed:
            print(f"{changed} {plan.what} are of inputs that changed since; they are written again")
        lines: list[Mapping[str, Any] | None] = [there.get(place) for place in range(len(plan.entries))]
        if not _is(output, there.values()):
            files.write_jsonl(output, list(there.values()))
            file = _locked(output, locks)
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns) as progress:
            task = progress.add_task(plan.what, total=len(lines), completed=len(there))
            for batch in batches:
                missing = [place for place in batch if lines[place] is None]
                if not missing:
                    continue
                made = dict(zip(batch, make(batch), strict=True))
                new = {place: plan.line(place, made[place]) for place in missing}
                files.append_jsonl(output, list(new.values()))
                for place, line in new.items():
                    lines[place] = line
                progress.advance(task, len(missing))
        complete = [line for line in lines if line is not None]
        if not _is(output, complete):  # They were written batch by batch.
            files.write_jsonl(output, complete)
    print(f"{len(lines)} {plan.what} in {output}")


def _locked(output: pathlib.Path, locks: contextlib.ExitStack) -> BinaryIO:
    """Opens the file, at its start, and keeps other processes from writing it."""
    file = locks.enter_context(output.open("a+b", buffering=0))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{output}: another process writes this file; wait until it ends") from None
    except OSError:  # The file system has no locks.
        pass
    file.seek(0)
    return file


def _present(output: pathlib.Path, data: bytes, plan: Plan) -> tuple[dict[int, dict[str, Any]], int]:
    """Returns the lines that stay, by entry and in the order of the file, and the number of those that do not."""
    *lines, cut = data.split(b"\n")
    there: dict[int, dict[str, Any]] = {}
    changed = 0
    if cut and _parsed(cut) is not None:  # Only the line's end is missing.
        lines, cut = [*lines, cut], b""
    for number, written in enumerate(lines, start=1):
        where, line = f"{output}:{number}", _parsed(written)
        place, stale = plan.place(line, where)
        if place in there:
            raise UserError(f"{where}: an earlier line is of the same input; {_ELSEWHERE}")
        if stale:
            changed += 1
        else:
            there[place] = line
    if cut and (len(lines) >= len(plan.entries) or not plan.begins(cut)):
        raise UserError(f"{output}:{len(lines) + 1}: this command did not write this line; {_ELSEWHERE}")
    return there, changed


def _parsed(line: bytes) -> Any:
    """Returns the JSON value of a line, None if it is not JSON."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def _is(output: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the file has these lines, in this order."""
    return output.read_bytes() == files.jsonl(list(lines))
