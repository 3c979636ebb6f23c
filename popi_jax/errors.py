"""The exception for a user's mistake, and how other errors are told."""

import errno
import os

_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake that the user can fix. Commands print it as one line, without a stack trace, and exit with code 2.

    The message names the remedy and, where they apply, the file, line and field.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error, at most 200 characters, or its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def disk_full(error: BaseException | None) -> BaseException | None:
    """Returns the error of a full disk among this one and those that led to it, whatever its type; None without one."""
    while error is not None and not any(os.strerror(number) in str(error) for number in _FULL):
        error = error.__cause__ or error.__context__
    return error
