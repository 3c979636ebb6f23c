"""The start of every command: flags, logging, and the exit codes of errors."""

import os
import signal
import sys
from collections.abc import Callable

from absl import app, flags, logging

from popi_jax.errors import UserError
from popi_jax.modes import signals


def run(entry: Callable[[list[str]], None]) -> None:
    """Parses the flags and runs `entry`. A user's mistake prints one line on stderr and exits with code 2.

    SIGINT and SIGTERM end it with one line and code 130 or 143, as shells and schedulers expect, see `signals`. A
    reader of stdout that has gone, such as `head`, ends it with code 141 and no line.
    """

    def quietly(argv: list[str]) -> None:
        # At absl's default level, info, Orbax and TFDS log too much. --verbosity=0 shows it.
        if not any(argument.startswith(("--verbosity", "-v")) for argument in sys.argv):
            logging.set_verbosity(logging.WARNING)
        entry(argv)

    signals.listen()
    try:
        try:
            app.run(quietly, flags_parser=_parse_flags)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at its end.
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # Flags and config name the files, so a file error is the user's mistake.
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except signals.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)


def _parse_flags(argv: list[str]) -> list[str]:
    # Parsing runs the config file, so its errors (an unknown key, a wrong type) are raised here too.
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
