"""ELIX: explanations for five levels of reader, with Llama-3.2-3B-Instruct for both models, as in the paper.

    python experiments/results_table.py --config=configs/elix.py --workdir=runs/elix

The data and the model come from the hub; --config.data.path takes a folder instead. The argument `lora` trains an
adapter per model, on a smaller slice. `smoke` (or `runlocal`) takes the tiny model of quickstart.py and a few rows in
the same schema. --config.data.protocol=disjoint keeps what the test split shows out of training.
"""

import ml_collections

from popi_jax.configs import check_arg, llama3_3b, quickstart

FIXTURES = "experiments/fixtures"
SMALL = ("smoke", "runlocal")
METHODS = ("base", "population", "raw_signals", "zero_shot_summary", "popi", "oracle")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment.

    Args:
        arg: "", `lora`, `smoke` or `runlocal`, see above.

    Raises:
        UserError: for any other argument.
    """
    c = published("elix", arg)
    if arg not in SMALL:
        c.data.path = "hf://datasets/Asap7772/elix_generations_autolabel"
    return c


def published(name: str, arg: str) -> ml_collections.ConfigDict:
    """Returns the paper's settings, which the four benchmarks share (POPI section 3).

    Args:
        name: of the config and of its data set.
        arg: see `get_config`.
    """
    check_arg(arg, name, "lora", *SMALL)
    c = quickstart.get_config("runlocal") if arg in SMALL else llama3_3b.get_config(arg or "full")
    c.name = name
    c.data.dataset = name
    c.data.protocol = "published"
    c.data.on_null = "drop"
    c.data.signals_per_user = 4
    c.data.queries_per_user = 1
    c.data.test_queries_per_user = 1
    c.prompts.layout = "published_pairs"
    c.prompts.inference_instruction = (
        "The examples show pairs of responses to a prompt, of which a user prefers one. Write a concise, well-ordered"
        " summary of what this user prefers in general, as guidance for later responses to this user."
    )
    c.prompts.generator_instruction = "Respond to the user prompt below in the way that this user prefers."
    c.limits.on_overflow = "drop"
    c.eval.temperature = 0.6
    c.eval.summaries_per_user = 1
    if arg in SMALL:
        shrink(c)
        return c
    c.data.train_users = 20_000
    c.train.users_per_step = 8
    c.schedule.steps = 2500  # Every training user once.
    c.table.methods = (*METHODS, "popi_two_phase")
    return c


def shrink(c: ml_collections.ConfigDict) -> None:
    """Shrinks a benchmark to the rows in FIXTURES. All benchmarks have the same shapes then, and compile only once."""
    c.data.path = f"{FIXTURES}/{c.data.dataset}"
    c.data.test_users = 8
    c.limits.signals, c.limits.prompt, c.limits.response, c.limits.bin = 960, 944, 64, 1008
    c.limits.buckets = (96, 512, 1008)
    c.prompts.inference_instruction = "In one sentence, what does this reader like?"
    c.prompts.generator_instruction = "Answer as this reader likes."
    c.table.methods = METHODS
