"""Reads prompts.jsonl: the prompts that --mode=generate answers, each with what is known of its user."""

import pathlib
from typing import Any

from popi_jax.data import checks, files
from popi_jax.errors import UserError

FIELDS = ("prompt", "summary", "user")


def read_prompts(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads prompts, and for those that name a user the user's summary from summaries.jsonl beside the file.

    Returns:
        For each: {"row", "prompt", "summary"}, row the line's number, and "user" where it was given.

    Raises:
        UserError: one line that names the file, the line, the field and the remedy.
    """
    beside = path.parent / "summaries.jsonl"
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
                    f"{where}: needs the field 'summary', or 'user' with a user of {beside}, which --mode=summarize"
                    " writes"
                )
            record["summary"] = summaries[user]
        else:
            checks.text_field(record, "summary", where)
        entries.append({"row": number, **record})
    if not entries:
        raise UserError(f"{path}: holds no prompts; write one JSON object a line")
    return entries


def _read_summaries(path: pathlib.Path) -> dict[str, str]:
    summaries = {}
    for number, record in files.numbered_objects(path, "", "run --mode=summarize again"):
        where = f"{path}:{number}"
        if not isinstance(record.get("summary"), str):  # May be empty: a model can write nothing.
            raise UserError(f"{where}: field 'summary' is missing or no text; run --mode=summarize again")
        summaries[checks.text_field(record, "user", where)] = record["summary"]
    return summaries
