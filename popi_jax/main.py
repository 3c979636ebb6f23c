"""The command line: popi, or python -m popi_jax.main, --config=configs/NAME.py[:arg] --workdir=DIR [--mode=MODE]."""
# ruff: noqa: E402

import pathlib
import sys

# The other imports take seconds, in which a signal may come, too.
if __name__ == "__main__" or pathlib.Path(sys.argv[0]).name == "popi":
    from popi_jax.modes import signals

    signals.listen()

import json
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from popi_jax import config as config_lib
from popi_jax.data import files
from popi_jax.errors import UserError, first_line
from popi_jax.modes import cli, compilation_cache, signals

FORMATS = ("hub", "peft", "orbax")
MODES = ("train", "prepare", "evaluate", "summarize", "generate", "export", "report", "compile")
USES = ("evaluate", "summarize", "generate", "export")  # The modes that take a run's own config if none is given.

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: configs/NAME.py[:arg], or NAME[:arg] of popi_jax's.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder for the run's files. An existing run there is resumed.")
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    None,
    "Runs in several processes: 'auto' on TPU slices and Slurm, HOST:PORT,COUNT,INDEX elsewhere.",
)
_MODE = flags.DEFINE_enum("mode", "train", MODES, "The mode to run. prepare: only the data, without the model.")
_STEP = flags.DEFINE_integer("step", None, "The step of the checkpoint to use; the newest by default.")
_INPUT = flags.DEFINE_string(
    "input", None, "summarize: users.jsonl. generate: prompts.jsonl. 'example' takes one that popi_jax has."
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "summarize, generate: the JSONL file to write. export, evaluate: a folder. compile: a JSON file."
)
_SUMMARIES = flags.DEFINE_string("summaries", None, "generate: the summaries; summaries.jsonl beside --input if none.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "summarize, generate: 0 is greedy; the config's eval.temperature by default."
)
_TOP_P = flags.DEFINE_float("top_p", None, "summarize, generate: nucleus sampling; the config's eval.top_p by default.")
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "summarize, generate: the longest text; limits.summary or limits.response by default."
)
_N = flags.DEFINE_integer("n", None, "summarize, generate: texts per user or prompt; 1 by default.")
_DRAWING = (_TEMPERATURE, _TOP_P, _MAX_TOKENS, _N)
_FORMAT = flags.DEFINE_enum(
    "format", "hub", FORMATS, "export: whole models for transformers and vLLM, adapters for PEFT, or Orbax checkpoints."
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "compile: a TPU slice, such as v5e:4x4, or 'here' for these devices.")


def main(argv: list[str]) -> None:
    """Runs one mode."""
    if len(argv) > 1:
        raise UserError(f"argument {argv[1]!r} is not a flag; give flags as --name=value")
    _check_flags()
    if _MODE.value == "report":
        _report(_path(_WORKDIR))
        return
    config = _config()
    if _MODE.value == "compile":
        _compile(config)
        return
    workdir = _path(_WORKDIR)
    if _DISTRIBUTED.value is not None:
        _join(_DISTRIBUTED.value)
    compilation_cache.enable()
    # Imported late, so that a mistake in the flags is reported at once.
    from popi_jax.modes import evaluate, export, personalize, prepare, train

    if _MODE.value in ("train", "prepare"):
        (train.train if _MODE.value == "train" else prepare.prepare)(config, workdir)
        return
    output = None if _MODE.value == "evaluate" and _OUTPUT.value is None else _path(_OUTPUT)
    signals.say(lambda: f"the run in {workdir} is safe, and {output or 'its evaluation'} may be incomplete")
    if _MODE.value == "evaluate":
        print(json.dumps(evaluate.evaluate_checkpoint(config, workdir, output, _STEP.value), indent=2))
    elif _MODE.value == "export":
        export.export(config, workdir, _path(_OUTPUT), _STEP.value, _FORMAT.value)
    else:
        write = personalize.summarize if _MODE.value == "summarize" else personalize.generate
        write(config, workdir, _personalize_flags())


def _check_flags() -> None:
    """Raises UserError for a flag that the mode does not read."""
    for flag, modes in (
        (_INPUT, ("summarize", "generate")),
        (_SUMMARIES, ("generate",)),
        *((flag, ("summarize", "generate")) for flag in _DRAWING),
        (_FORMAT, ("export",)),
        (_TOPOLOGY, ("compile",)),
    ):
        if flag.present and _MODE.value not in modes:
            raise UserError(f"--{flag.name} is for --mode={' and '.join(modes)}; leave it out")


def _personalize_flags() -> Any:
    from popi_jax.modes import personalize

    source = _path(_INPUT)
    if _INPUT.value == "example" and not source.exists():
        source = personalize.EXAMPLES / ("users.jsonl" if _MODE.value == "summarize" else "prompts.jsonl")
    return personalize.Flags(
        input=source,
        output=_path(_OUTPUT),
        step=_STEP.value,
        drawing={flag.name: flag.value for flag in _DRAWING},
        summaries=None if _SUMMARIES.value is None else _path(_SUMMARIES),
    )


def _report(workdir: pathlib.Path) -> None:
    from popi_jax.evaluation import report

    if not (workdir / "results.json").is_file():
        raise UserError(f"{workdir}: no results.json; give the workdir of a finished run, or of a table")
    report.write(workdir)
    print(workdir / "report.html")


def _config() -> config_lib.Config:
    """Returns the settings of --config, or in use of a run those in its workdir."""
    if _CONFIG.value is not None:
        return config_lib.parse(_CONFIG.value)
    if _MODE.value in USES and _WORKDIR.value is not None:
        recorded = _path(_WORKDIR) / "config.json"
        if recorded.is_file():
            from popi_jax.configs import recorded as recorded_config

            return config_lib.parse(recorded_config.get_config(str(recorded)))
    raise UserError("--config is missing; give e.g. --config=configs/quickstart.py")


def _compile(config: config_lib.Config) -> None:
    if _TOPOLOGY.value is None:
        raise UserError("--mode=compile needs --topology; give a TPU slice, such as v5e:4x4, or here")
    if _WORKDIR.value is not None:
        raise UserError("--mode=compile writes no run; replace --workdir by --output=FILE.json for its report")
    from popi_jax.modes import compile as compile_lib

    jax.config.update("jax_enable_compilation_cache", False)  # The report measures compile times.
    output = None if _OUTPUT.value is None else _path(_OUTPUT)
    if output is not None:
        compile_lib.check_output(output)
    report = compile_lib.report(config, _TOPOLOGY.value)
    print(compile_lib.table(report))
    if output is not None:
        files.write_json(output, report)


def _join(cluster: str) -> None:
    """Connects to the other processes. Must run before anything uses a device."""
    try:
        match cluster.split(","):
            case ["auto"]:
                jax.distributed.initialize()
            case [address, count, index] if count.isdigit() and index.isdigit() and int(index) < int(count):
                jax.distributed.initialize(address, num_processes=int(count), process_id=int(index))
            case _:
                raise ValueError("give auto, or HOST:PORT,COUNT,INDEX such as 10.0.0.1:1234,2,0 (INDEX from 0)")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed={cluster}: {first_line(error)}") from error


def _path(flag: flags.FlagHolder) -> pathlib.Path:
    if flag.value is None:
        raise UserError(f"--mode={_MODE.value} needs --{flag.name}")
    return config_lib.local_path(flag.value, f"--{flag.name}")


def popi() -> None:
    """Runs the command `popi`, which is `python -m popi_jax.main` under a shorter name."""
    cli.run(main)


if __name__ == "__main__":
    popi()
