"""The start of every command: flags, logging, and the exit codes of errors."""

import difflib
import logging as python_logging
import os
import pathlib
import re
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from popi_jax.errors import UserError, disk_full, first_line
from popi_jax.modes import signals

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
_NAMED = re.compile(r"(--?config=)(\w+)(:.*)?", re.DOTALL)
_LIBRARIES = (str(pathlib.Path(flags.__file__).parents[2]), sysconfig.get_path("stdlib"))


def run(entry: Callable[[list[str]], None]) -> None:
    """Parses the flags and runs `entry`. A user's mistake prints one line on stderr and exits with code 2.

    SIGINT and SIGTERM end it with one line and code 130 or 143, as shells and schedulers expect, see `signals`. A
    reader of stdout that has gone, such as `head`, ends it with code 141 and no line.
    """

    def quietly(argv: list[str]) -> None:
        # At absl's default level, info, Orbax and TFDS log too much. --verbosity=0 shows it.
        if not any(argument.startswith(("--verbosity", "-v")) for argument in sys.argv):
            logging.set_verbosity(logging.WARNING)
            # Orbax logs each thread's trace of an error that is reported below.
            logging.get_absl_handler().addFilter(lambda record: not disk_full((record.exc_info or (None, None))[1]))
        entry(argv)

    sys.stdout = sys.stdout or pathlib.Path(os.devnull).open("w", encoding="utf-8")  # None where the shell closed it.
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
        elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            told = (
                f"out of memory: {first_line(error)}; lower config.train.users_per_step, .eval.users_per_batch or"
                " .limits, or raise .train.accumulation_inference and .accumulation_generator"
            )
            print(f"error: {told}", file=sys.stderr)
        elif isinstance(error, OSError) and error.filename is not None:
            # Flags and config name the files, so a file error is the user's mistake.
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        else:
            raise
        sys.exit(2)


def _parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    argv = [argv[0], *map(_with_path, argv[1:])]
    # Parsing runs the config file, which can raise anything.
    # ml_collections warns of a config that returns None, which is an error here.
    python_logging.disable(python_logging.WARNING)
    try:
        rest = values(argv)
        if "config" in values:
            given = values["config"]
            getattr(given.value, "lock", None)  # Raises the error of a file that could not be read.
            if given.present and given.value is None:
                raise UserError("--config: get_config returned None; return a ConfigDict")
        return rest
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        told = _config_error(error)
        if told is None:
            if isinstance(error, SystemExit):  # --help, which ends with code 1 in absl.
                if "config" in values:
                    print(_all_keys())
                sys.exit(0)
            text = str(error).strip()
            told = " ".join(text[:300].split())
            if "Traceback" in text:  # ml_collections quotes the whole trace of a get_config that could not be called.
                told = "--config: " + text.rpartition("\n")[2]
            elif getattr(error, "name", None) == "get_config":
                told = "--config: the file has no function get_config; see configs/quickstart.py for an example"
            elif not isinstance(error, flags.Error):
                told = _unknown_key(argv) or f"--config.KEY=VALUE: {told}; configs/base.py has all keys"
        raise UserError(told) from error
    finally:
        python_logging.disable(python_logging.NOTSET)


def _with_path(argument: str) -> str:
    """Replaces the name of a config that ships with the package by its path: --config=quickstart:runlocal."""
    found = _NAMED.fullmatch(argument)
    path = _CONFIGS / f"{found[2]}.py" if found else None
    if found is None or path is None or not path.exists() or pathlib.Path(found[2]).exists():
        return argument
    return f"{found[1]}{path}{found[3] or ''}"


def _defaults() -> dict[str, Any]:
    """Returns every key of a config with its default in configs/base.py."""
    from popi_jax.configs import base

    def flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(flat(base.get_config().to_dict(), ""))


def _all_keys() -> str:
    """Returns the part of --help that lists the keys of a config."""
    lines = (f"  --config.{key}={value}" for key, value in _defaults().items())
    return "\n".join(("\nkeys of the config, with the defaults that configs/base.py explains:", *lines))


def _unknown_key(argv: Sequence[str]) -> str | None:
    """Returns what is wrong with the first --config.KEY that is no key; None if all are."""
    keys = _defaults()
    for argument in argv:
        given = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and given.startswith("config.") and given.removeprefix("config.") not in keys:
            key = given.removeprefix("config.")
            name = key.rpartition(".")[2]
            near = (
                [other for other in keys if other.rpartition(".")[2] == name]
                or [other for other in keys if other.startswith(key)]
                or difflib.get_close_matches(key, keys, n=1, cutoff=0.8)
            )
            advice = f"did you mean --config.{near[0]}?" if near else "configs/base.py has all keys"
            return f"--config.{key:.80}: no such key; {advice}"
    return None


def _config_error(error: BaseException) -> str | None:
    """Returns FILE:LINE and the error of the config file that led to this one; None if none did."""
    found: BaseException | None = error
    while found is not None:
        frames = [frame for frame in traceback.extract_tb(found.__traceback__) if "importlib" not in frame.filename]
        called = [
            place for place, frame in enumerate(frames) if frame.filename.endswith("config_flags/config_flags.py")
        ]
        # The config itself comes first; files that it imports follow.
        inside = frames[called[-1] + 1 :] if called else []
        if inside and not inside[0].filename.startswith(_LIBRARIES):
            line = [frame.lineno for frame in inside if frame.filename == inside[0].filename][-1]
            return f"{inside[0].filename}:{line}: {type(found).__name__}: {first_line(found)}"
        if isinstance(found, SyntaxError) and found.filename != "<unknown>":  # That would be the value of a flag.
            return f"{found.filename or '--config'}:{found.lineno or 1}: {found.msg}"
        if isinstance(found, OSError) and called and found.__cause__ is None:
            reason = re.sub(r"^.Errno .*?. ", "", str(found).strip().rpartition("\n")[2].strip(" ."))
            return f"--config: {reason}; give a config file, or the name of one that popi_jax has, such as quickstart"
        found = found.__cause__ or found.__context__
    return None
