"""Which slice for which model: compiles the Llama configs for TPU slices that need not exist, and writes a table.

    pip install libtpu
    JAX_PLATFORMS=cpu python experiments/tpu_table.py --output=DIR [--cases=llama3_3b:full@v5e:4x4,...]

A case is CONFIG:ARG@SLICE; with @N, weights split over N devices and the rest replicas of these; with +NAME, by the
schedule NAME. 8 users for every 8 devices, all else as the config says. DIR/CASE.json keeps each case, which is not
compiled again; DIR/README.md shows them all. A case takes minutes on two cores.
"""

import importlib
import pathlib
import re
from typing import Any

from absl import flags

from popi_jax import config as config_lib
from popi_jax.data import checks, files
from popi_jax.errors import UserError
from popi_jax.modes import cli
from popi_jax.modes import compile as compile_lib

CASES = (
    "llama3_3b:lora@v5e:2x2",
    "llama3_3b:full@v5e:2x4",
    "llama3_3b:full@v5e:4x4",
    "llama3_3b:full@v5e:4x4+alternate",
    "llama3_3b:full@v5e:8x8@16",
    "llama3_3b:full@v5e:16x16@16",
    "llama3_8b:lora@v5e:2x2",
    "llama3_8b:lora@v5e:2x4",
    "llama3_8b:lora@v5e:4x4",
    "llama3_8b:full@v5e:4x8",
    "llama3_8b:full@v5e:8x8",
    "llama3_8b:full@v5p:2x2x1",
    "llama3_8b:full@v5p:2x2x2",
)
HEAD = """# The Llama configs on TPU slices

    JAX_PLATFORMS=cpu python experiments/tpu_table.py --output=experiments/results/tpu{cases}

These programs were compiled, not run. Memory is the plan of the TPU compiler (libtpu) with every text at its limit
(signals 8,192 tokens, summaries 2,048, prompts 4,096, responses 1,024), K = 8 and one user per device and step. @N
splits weights over N devices (`mesh.fsdp=N`, `mesh.data=-1`); +alternate is `schedule.name=alternate`, whose steps
train one model at a time. GiB are per device: arguments / temporaries / total. The bounds are rooflines from the chip's
public peaks: FLOPs of the products, recomputation included; bytes of HBM that the compiled instructions read and write
(an overestimate: data that stays on the chip between two instructions counts too); bytes sent. The largest bound
decides, and MFU is the model's own FLOPs against it. A "?" means that the compiler cannot print the program, so that
its memory is known and its traffic is not.
"""


def run_case(case: str, folder: pathlib.Path) -> dict[str, Any]:
    """Returns the report of one case, read from its file if that exists; UserError for a malformed case."""
    parts = re.fullmatch(r"(\w+):(\w+)@([^@+]+)(?:@([0-9]{1,6}))?(?:\+(\w+))?", case)
    if parts is None:
        raise UserError(
            f"--cases: {case!r} is no case; give CONFIG:ARG@SLICE, with @N or +SCHEDULE after it, such as {CASES[0]}"
        )
    path = folder / f"{case.replace(':', '_').replace('@', '_on_').replace('+', '_')}.json"
    found = files.read_json(path)
    if found is not None:
        if not {"case", "steps"} <= found.keys():
            raise UserError(f"{path}: not the report of a case; remove the file and run again")
        return found
    module, arg, topology, split, schedule = parts.groups()
    try:
        config = importlib.import_module(f"popi_jax.configs.{module}").get_config(arg)
    except (ImportError, AttributeError, UserError) as error:
        raise UserError(f"--cases: {case!r}: {error}") from error
    if split is not None:
        config.mesh.data, config.mesh.fsdp = -1, int(split)
    if schedule is not None:
        config.schedule.name = schedule
    config.train.users_per_step = config.eval.users_per_batch = len(compile_lib.slice_devices(topology))
    print(f"== {case}", flush=True)
    found = compile_lib.report(config_lib.parse(config), topology) | {"case": case}
    files.write_json(path, found)
    return found


def markdown(reports: list[dict[str, Any]]) -> str:
    """The table of all programs of these reports."""
    GiB = 2**30
    lines = ["| case | program | GiB per device | fits | bound, s: compute / HBM / links | by | MFU at it |"]
    lines.append("|---|---|---|---|---|---|---|")
    for found in reports:
        for row in found["steps"]:
            cells = [found["case"], row["name"]]
            if not row["fits"]:
                cells += [row["why_not"], "no", "", "", ""]
            else:
                sizes = (row[f"{name}_bytes_per_device"] / GiB for name in ("argument", "temp", "total"))
                cells += [" / ".join(f"{size:.2f}" for size in sizes), "yes"]
                bounds = row["bounds_s"].values()
                cells += [" / ".join("?" if value is None else f"{value:.3g}" for value in bounds)]
                known = row["bound_by"] is not None
                cells += [row["bound_by"], f"{100 * row['mfu_bound']:.0f}%"] if known else ["?", "?"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def short(reports: list[dict[str, Any]]) -> str:
    """README's table: of each case what a joint step takes of a chip, and the bounds of its summaries and of itself."""
    lines = ["| config | slice | GiB a chip | summaries, s | joint step, s |", "| --- | --- | --- | --- | --- |"]
    for found in reports:
        rows = {row["name"]: row for row in found["steps"]}
        if "joint_step" not in rows:
            continue

        def bound(program: str, rows: dict[str, Any] = rows) -> str:
            row = rows[program]
            return f"{row['bound_s']:.1f} ({row['bound_by']})" if row["bound_by"] else f"at least {row['bound_s']:.1f}"

        config, slice_name = found["case"].split("@", 1)
        size = bounds = "does not fit"
        if rows["joint_step"]["fits"]:
            size = f"{rows['joint_step']['total_bytes_per_device'] / 2**30:.1f}"
            bounds = bound("joint_step")
        lines.append(f"| {config} | {slice_name} | {size} | {bound('sample')} | {bounds} |")
    return "\n".join(lines) + "\n"


def _main(argv: list[str]) -> None:
    folder = config_lib.local_path(flags.FLAGS.output, "--output")
    table = folder / "README.md"
    if table.exists() and not checks.read_text(table, "choose another --output").startswith(HEAD.split("\n")[0]):
        raise UserError(f"{table}: not a table of this script; choose another --output")
    asked = ",".join(flags.FLAGS.cases or ())
    reports = [run_case(case, folder) for case in flags.FLAGS.cases or CASES]
    head = HEAD.format(cases=f" --cases={asked}" if asked else "")
    files.write_text(table, head + "\n" + markdown(reports))
    print(markdown(reports))
    print(short(reports))


if __name__ == "__main__":
    flags.DEFINE_string("output", "experiments/results/tpu", "The folder of results.")
    flags.DEFINE_list("cases", None, "CONFIG:ARG@SLICE, several with commas; all by default.")
    cli.run(_main)
