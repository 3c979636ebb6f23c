"""Reads prompts.jsonl: the prompts that --mode=generate answers, each with its user's summary."""

import pathlib
from typing import Any

from popi_jax.data import checks, files
from popi_jax.errors import UserError, shown

FIELDS = ("prompt", "summary", "user")


def read_prompts(path: pathlib.Path, beside: pathlib.Path | None = None) -> list[dict[str, Any]]:
    """Reads prompts. If a line has no summary, its user's comes from `beside`, or summaries.jsonl in the same folder.

    That file may have other fields, which --mode=summarize writes. Of several samples of a user, the first counts.

    Returns:
        A dict with "row" (the line number), "prompt", "summary", and "user" if given, for each prompt.

    Raises:
        UserError: one line that names the file, the line, the field and the remedy.
    """
    beside = beside or summaries_beside(path)
    summaries = _read_summaries(beside) if beside.exists() else {}
    entries: list[dict[str, Any]] = []
    for number, record in files.numbered_objects(path, "give the path of a prompts.jsonl file"):
        where = f"{path}:{number}"
        checks.only_fields(record, FIELDS, where)
        checks.text_field(record, "prompt", where)
        if "user" in record:
            checks.text_field(record, "user", where)
        if "summary" in record:
            checks.text_field(record, "summary", where)
        elif record.get("user") in summaries:
            record["summary"] = summaries[record["user"]]
        else:
            raise UserError(
                f"{where}: neither the field 'summary' nor a 'user' that is in {beside}; add one"
                " (--mode=summarize writes that file)"
            )
        entries.append({"row": number, **record})
    if not entries:
        raise UserError(f"{path}: no prompts; write one JSON object per line")
    return entries


def summaries_beside(path: pathlib.Path) -> pathlib.Path:
    """Returns the file that has the summaries of the users of a prompts.jsonl."""
    return path.parent / "summaries.jsonl"


def _read_summaries(path: pathlib.Path) -> dict[str, str]:
    summaries: dict[str, str] = {}
    for number, record in files.numbered_objects(path, "run --mode=summarize again"):
        where = f"{path}:{number}"
        user = checks.text_field(record, "user", where)
        if record.get("sample", 0) != 0:
            continue
        if user in summaries:
            raise UserError(f"{where}: field 'user': {shown(user)} is on an earlier line, too; keep one of them")
        summaries[user] = checks.text_field(record, "summary", where, blank=True)  # A model can write nothing.
    return summaries
