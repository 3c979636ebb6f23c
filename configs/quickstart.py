"""POPI in minutes on two cores: stylebook, with the tiny base model that ships with the package."""

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; `runlocal` shrinks it to under a minute."""
    c = base.get_config()
    c.name = "quickstart"
    c.prompts.inference_instruction = "In one sentence, what does this reader like?"
    c.prompts.generator_instruction = "Answer as this reader likes."
    return c.lock()
