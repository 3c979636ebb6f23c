"""The start of every command: flags, logging, and the exit codes of errors."""

import os
import signal
import sys
from collections.abc import Callable

from absl import app, flags, logging

from popi_jax.errors import UserError, disk_full, first_line
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
            # Orbax logs each thread's trace of an error that is told below.
            logging.get_absl_handler().addFilter(lambda record: not disk_full((record.exc_info or (None, None))[1]))
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
    except signals.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)
    except Exception as error:
        full = disk_full(error)
        if full is not None:
            told = f"the disk is full: {first_line(full)}; free space, and run the same command again"
            print(f"error: {told}", file=sys.stderr)
        elif isinstance(error, OSError) and error.filename is not None:
            # Flags and config name the files, so a file error is the user's mistake.
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        else:
            raise
        sys.exit(2)


def _parse_flags(argv: list[str]) -> list[str]:
    # Parsing runs the config file, so its errors (an unknown key, a wrong type) are raised here too.
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
