"""The same as llama3_3b.py, with Llama-3.1-8B-Instruct for both models.

    python -m popi_jax.main --config=configs/llama3_8b.py:lora --config.data.path=users.jsonl --workdir=runs/llama3_8b
    python -m popi_jax.main --config=configs/llama3_8b.py:lora --mode=compile --topology=v5e:4x4

The arguments are those of llama3_3b.py.
"""

import ml_collections

from popi_jax.configs import check_arg, llama3_3b


def get_config(arg: str = "full") -> ml_collections.ConfigDict:
    """Returns the experiment.

    Args:
        arg: one of llama3_3b.ARGS; "" is `full`.

    Raises:
        UserError: for any other argument.
    """
    check_arg(arg, "llama3_8b", *llama3_3b.ARGS)
    c = llama3_3b.get_config(arg)
    c.name = "llama3_8b"
    if arg != "runlocal":
        c.model.path = "meta-llama/Llama-3.1-8B-Instruct"
        c.model.shape = str(llama3_3b.SHAPES / "llama-3.1-8b.json")
    return c
