"""The exception for a user's mistake."""

import re


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
