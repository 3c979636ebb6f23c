"""--mode=export: writes both trained models as hub folders."""

import pathlib

from popi_jax.config import Config
from popi_jax.model import hub
from popi_jax.modes import runfiles
from popi_jax.modes.evaluate import trained


def export(config: Config, workdir: pathlib.Path, output: pathlib.Path, step: int | None) -> None:
    """Writes <output>/inference and <output>/generator, which transformers and vLLM load."""
    runfiles.one_process("export")
    run, state = trained(config, workdir, step)
    policy = run.programs.policy
    for role, delta in (("inference", state.phi), ("generator", state.theta)):
        hub.save(output / role, policy.config, policy.fuse(run.base, delta), run.tokenizer_path)
        print(f"wrote {output / role}")
