"""--mode=export: writes both trained models as hub folders."""

import pathlib
import shutil

from popi_jax.config import Config
from popi_jax.data import files
from popi_jax.errors import UserError
from popi_jax.model import folders, hub
from popi_jax.modes import runfiles
from popi_jax.modes.evaluate import trained

_ROLES = ("inference", "generator")
_UNFINISHED = ".unfinished"  # In the output, so that it is on the same disk.


def export(config: Config, workdir: pathlib.Path, output: pathlib.Path, step: int | None) -> None:
    """Writes <output>/inference and <output>/generator, which transformers and vLLM load.

    Both are complete or missing. Those of an earlier export are replaced; UserError if there is anything else.
    """
    runfiles.one_process("export")
    _check_output(output)
    run, state, _ = trained(config, workdir, step)
    policy, scratch = run.programs.policy, output / _UNFINISHED
    shutil.rmtree(scratch, ignore_errors=True)  # A killed export leaves it.
    try:
        for role, delta in zip(_ROLES, (state.phi, state.theta), strict=True):
            hub.save(scratch / role, policy.config, policy.fuse(run.base, delta), run.tokenizer_path)
        _replace(output, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for role in _ROLES:
        print(f"wrote {output / role}")


def _replace(output: pathlib.Path, scratch: pathlib.Path) -> None:
    there = [role for role in _ROLES if (output / role).exists()]
    try:
        for role in there:  # Both go before the first new one comes: a kill leaves no pair of different runs.
            (output / role).rename(scratch / f"old_{role}")
        for role in _ROLES:
            (scratch / role).rename(output / role)
    except BaseException:
        for role in there:
            if (scratch / f"old_{role}").exists():
                shutil.rmtree(output / role, ignore_errors=True)
                (scratch / f"old_{role}").rename(output / role)
        raise


def _check_output(output: pathlib.Path) -> None:
    """Raises UserError unless the folder is missing, empty, or holds an earlier export alone."""
    files.check_folder(output, "--output")
    for path in sorted(output.iterdir()) if output.exists() else []:
        if path.name not in (*_ROLES, _UNFINISHED):
            raise UserError(f"--output={output}: {path.name} there is not from an export; choose another --output")
    for role in _ROLES:
        folders.check_replaceable(output / role)
