"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake that the user can mend: one clear line, no stack trace, exit code 2.

    The message names the file, the line and the field where there are such, and the remedy.
    """
