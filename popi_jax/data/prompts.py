"""Reads prompts.jsonl: the prompts that --mode=generate answers, each with its user's summary."""

import pathlib
from typing import Any

from popi_jax.data import checks, files
from popi_jax.errors import UserError

FIELDS = ("prompt", "summary", "user")


def read_prompts(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads prompts. If a line has no summary, its user's summary comes from summaries.jsonl in the same folder.

    Returns:
        A dict with "row" (the line number), "prompt", "summary", and "user" if given, for each prompt.

    Raises:
        UserError: one line that names the file, the line, the field and the remedy.
    """
    beside = summaries_beside(path)
    summaries = _read_summaries(beside) if beside.exists() else {}
    entries: list[dict[str, Any]] = []
    for number, record in files.numbered_objects(path, "give the path of a prompts.jsonl file"):
        where = f"{path}:{number}"
        checks.only_fields(record, FIELDS, where)
        checks.text_field(record, "prompt", where)
        if "summary" not in record:
            user = record.get("user")
            if not isinstance(user, str) or user not in summaries:
                raise UserError(
                    f"{where}: neither the field 'summary' nor a 'user' that is in {beside}; add one"
                    " (--mode=summarize writes that file)"
                )
            record["summary"] = summaries[user]
        else:
            checks.text_field(record, "summary", where)
        entries.append({"row": number, **record})
    if not entries:
        raise UserError(f"{path}: no prompts; write one JSON object per line")
    return entries


def summaries_beside(path: pathlib.Path) -> pathlib.Path:
    """Returns the file that has the summaries of the users of a prompts.jsonl."""
    return path.parent / "summaries.jsonl"


def _read_summaries(path: pathlib.Path) -> dict[str, str]:
    summaries = {}
    remedy = "run --mode=summarize again"
    for number, record in files.numbered_objects(path, remedy, remedy):
        where = f"{path}:{number}"
        if not isinstance(record.get("summary"), str):  # May be empty, since a model can write nothing.
            raise UserError(f"{where}: field 'summary' is missing or not a string; {remedy}")
        summaries[checks.text_field(record, "user", where)] = record["summary"]
    return summaries
