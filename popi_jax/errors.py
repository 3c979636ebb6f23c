"""The exception for a user's mistake, and the words for its message."""

import errno
import os
import re
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake that the user can fix. Commands print it as one line, without a stack trace, and exit with code 2.

    The message names the remedy and, where they apply, the file, line and field. Control characters are escaped,
    because a file's name or text could otherwise break the line or steer the terminal.
    """

    def __init__(self, message: str):
        super().__init__(
            re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: repr(found[0])[1:-1], message)
        )


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error, at most 200 characters, or its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def disk_full(error: BaseException | None) -> BaseException | None:
    """Returns the error of a full disk among this one and those that led to it, of any type; None if there is none."""
    while error is not None and not any(os.strerror(number) in str(error) for number in _FULL):
        error = error.__cause__ or error.__context__
    return error


def shown(value: Any, limit: int = 100) -> str:
    """Returns a value for an error message: its repr, cut to `limit` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # An integer of thousands of digits, or deep nesting.
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."
