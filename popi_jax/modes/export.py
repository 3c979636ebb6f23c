"""--mode=export: writes both trained models as hub folders, as PEFT adapters, or as Orbax checkpoints."""

import pathlib
import shutil

import jax
import orbax.checkpoint as ocp

from popi_jax.config import Config
from popi_jax.data import files
from popi_jax.errors import UserError
from popi_jax.model import folders, hub, peft, tokenizer_files
from popi_jax.model.weights import Tree
from popi_jax.modes import exported, runfiles
from popi_jax.modes.evaluate import trained
from popi_jax.modes.setup import Run

_UNFINISHED = ".unfinished"  # In the output, so that it is on the same disk.


def export(config: Config, workdir: pathlib.Path, output: pathlib.Path, step: int | None, form: str = "hub") -> None:
    """Writes <output>/inference and <output>/generator.

    Both are complete or missing. Those of an earlier export are replaced; UserError if there is anything else. Each has
    the tokenizer, popi.json and a model card beside its weights:

    * hub: the whole model, which transformers, vLLM and `Personalizer` load.
    * peft: the adapter alone, which PEFT loads on top of config.model.path.
    * orbax: the whole model as a tree of numpy arrays in `params`, whose names docs/howto/use.md lists.
    """
    runfiles.one_process("export")
    _check_output(output)
    if form == "peft" and not config.lora.rank:
        raise UserError("--format=peft: the run trained whole models (config.lora.rank = 0); use --format=hub")
    run, state, _ = trained(config, workdir, step)
    scratch = output / _UNFINISHED
    shutil.rmtree(scratch, ignore_errors=True)  # A killed export leaves it.
    try:
        for role, delta in zip(exported.ROLES, (state.phi, state.theta), strict=True):
            texts = exported.texts(role, config, run.encoder, int(state.step), workdir, adapter=form == "peft")
            _write(run, scratch / role, delta, form, texts)
        _replace(output, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for role in exported.ROLES:
        print(f"wrote {output / role}")


def _write(run: Run, folder: pathlib.Path, delta: Tree | None, form: str, texts: dict[str, str]) -> None:
    policy = run.programs.policy
    if form == "peft":
        assert policy.lora is not None
        if delta is None:  # Without an inference model, q_0 is in use: an adapter that changes nothing.
            delta = policy.init_delta(run.base, jax.random.key(0))
        peft.save(folder, delta, policy.lora, run.config.model.path, run.tokenizer_path, texts)
    elif form == "hub":
        hub.save(folder, policy.config, policy.fuse(run.base, delta), run.tokenizer_path, texts=texts)
    else:
        with folders.new(folder, texts) as scratch:
            tokenizer_files.save(scratch, run.tokenizer_path)
            # Arrays on several devices could only be read on as many; numpy arrays can be read anywhere.
            params = jax.device_get(policy.fuse(run.base, delta))
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save((scratch / "params").resolve(), params)


def _replace(output: pathlib.Path, scratch: pathlib.Path) -> None:
    there = [role for role in exported.ROLES if (output / role).exists()]
    try:
        for role in there:  # Both go before the first new one comes: a kill leaves no pair of different runs.
            (output / role).rename(scratch / f"old_{role}")
        for role in exported.ROLES:
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
        if path.name not in (*exported.ROLES, _UNFINISHED):
            raise UserError(f"--output={output}: {path.name} there is not from an export; choose another --output")
    for role in exported.ROLES:
        folders.check_replaceable(output / role)
