"""Flags to mode, nothing else: python -m popi_jax.main --config=configs/NAME.py[:arg] --workdir=DIR [--mode=MODE]."""

import json
import pathlib

import jax
from absl import flags
from ml_collections import config_flags

from popi_jax import config as config_lib
from popi_jax.data import files
from popi_jax.errors import UserError, first_line
from popi_jax.modes import cli, compilation_cache

MODES = ("train", "evaluate", "summarize", "generate", "export", "compile")

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: configs/NAME.py[:arg].", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files go; an existing run there is resumed.")
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    None,
    "Several processes: 'auto' where the cluster knows them (TPU slices, Slurm), else HOST:PORT,COUNT,INDEX.",
)
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint to use; the newest by default.")
_INPUT = flags.DEFINE_string("input", None, "summarize: users.jsonl. generate: prompts.jsonl.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "summarize, generate: the jsonl to write. export, evaluate: a folder. compile: a json."
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "compile: a TPU slice, such as v5e:4x4, or 'here': these devices.")


def main(argv: list[str]) -> None:
    """Runs one mode."""
    if len(argv) > 1:
        raise UserError(f"argument {argv[1]!r} is not a flag; write --name=value")
    if _CONFIG.value is None:
        raise UserError("--config is missing; e.g. --config=configs/quickstart.py")
    config = config_lib.parse(_CONFIG.value)
    if _MODE.value == "compile":
        _compile(config)
        return
    if _TOPOLOGY.value is not None:
        raise UserError("--topology is for --mode=compile")
    workdir = _path(_WORKDIR)
    if _DISTRIBUTED.value is not None:
        _join(_DISTRIBUTED.value)
    compilation_cache.enable()
    # Imported late, so that a mistake in the flags is told at once.
    from popi_jax.modes import evaluate, export, personalize, train

    if _MODE.value == "train":
        train.train(config, workdir)
    elif _MODE.value == "evaluate":
        output = None if _OUTPUT.value is None else pathlib.Path(_OUTPUT.value)
        print(json.dumps(evaluate.evaluate_checkpoint(config, workdir, output, _STEP.value), indent=2))
    elif _MODE.value == "summarize":
        personalize.summarize(config, workdir, _path(_INPUT), _path(_OUTPUT), _STEP.value)
    elif _MODE.value == "generate":
        personalize.generate(config, workdir, _path(_INPUT), _path(_OUTPUT), _STEP.value)
    else:
        export.export(config, workdir, _path(_OUTPUT), _STEP.value)


def _compile(config: config_lib.Config) -> None:
    if _TOPOLOGY.value is None:
        raise UserError("--mode=compile needs --topology: a TPU slice, such as v5e:4x4, or here")
    if _WORKDIR.value is not None:
        raise UserError("--mode=compile leaves no run in --workdir; give --output=FILE.json for its report")
    from popi_jax.modes import compile as compile_lib

    jax.config.update("jax_enable_compilation_cache", False)  # It reports how long compilation takes.
    report = compile_lib.report(config, _TOPOLOGY.value)
    print(compile_lib.table(report))
    if _OUTPUT.value is not None:
        files.write_json(pathlib.Path(_OUTPUT.value), report)


def _join(cluster: str) -> None:
    """Joins the other processes; before anything else touches a device."""
    try:
        match cluster.split(","):
            case ["auto"]:
                jax.distributed.initialize()
            case [address, count, index] if count.isdigit() and index.isdigit() and int(index) < int(count):
                jax.distributed.initialize(address, num_processes=int(count), process_id=int(index))
            case _:
                raise ValueError("give auto, or HOST:PORT,COUNT,INDEX such as 10.0.0.1:1234,2,0, INDEX from 0")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed={cluster}: {first_line(error)}") from error


def _path(flag: flags.FlagHolder) -> pathlib.Path:
    if flag.value is None:
        raise UserError(f"--mode={_MODE.value} needs --{flag.name}")
    return pathlib.Path(flag.value)


if __name__ == "__main__":
    cli.run(main)
