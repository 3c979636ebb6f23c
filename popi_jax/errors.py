"""The exception for a user's mistake."""


class UserError(Exception):
    """A mistake that the user can fix. Commands print it as one line, without a stack trace, and exit with code 2.

    The message names the remedy and, where they apply, the file, line and field.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error, at most 200 characters, or its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
