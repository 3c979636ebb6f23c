"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake that the user can mend: one clear line, no stack trace, exit code 2.

    The message names the file, the line and the field where there are such, and the remedy.
    """


def first_line(error: BaseException) -> str:
    """The first line of another library's error, at most 200 characters, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
