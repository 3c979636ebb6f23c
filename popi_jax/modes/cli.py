"""How every command of the project starts and fails."""

import sys
from collections.abc import Callable

from absl import app, flags, logging

from popi_jax.errors import UserError
from popi_jax.modes import host_memory
from popi_jax.modes.runfiles import Stopped


def run(entry: Callable[[list[str]], None]) -> None:
    """Parses the flags and runs `entry`. A user's mistake is one line on stderr and exit code 2.

    A run that SIGTERM ended has saved itself and exits with 143, which is what a scheduler expects of it.
    """

    def quietly(argv: list[str]) -> None:
        # At absl's default, info, Orbax and TFDS fill the screen with their own affairs; --verbosity=0 shows them.
        if not any(argument.startswith(("--verbosity", "-v")) for argument in sys.argv):
            logging.set_verbosity(logging.WARNING)
        entry(argv)

    host_memory.keep()
    try:
        app.run(quietly, flags_parser=_parse_flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # Files are named by flags and config; their mistakes are the user's.
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(143)


def _parse_flags(argv: list[str]) -> list[str]:
    # A config file is a program: what it raises on an unknown key or a wrong type comes through here too.
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
