"""What an exported folder says of itself: popi.json, from which both prompts can be built, and the model card."""

import json
import pathlib
from typing import Any

import popi_jax
from popi_jax import config as config_lib
from popi_jax.config import Config
from popi_jax.configs import base
from popi_jax.data import files
from popi_jax.data.encoding import Encoder
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example, Signal
from popi_jax.errors import UserError
from popi_jax.evaluation import stored

INFERENCE, GENERATOR = ROLES = ("inference", "generator")
DESCRIPTION, CARD = "popi.json", "README.md"

# What the models need in use. The rest of a config is about training.
_SECTIONS = ("prompts", "limits", "eval", "objective")
# An example of each kind of signal, for a reader of popi.json and the card.
_SIGNALS = (
    Signal(
        "pair", prompt="What is gravity?", chosen="It pulls things together.", rejected="A force, see Newton (1687)."
    ),
    Signal("comment", prompt="What is light?", text="Please keep it short."),
    Signal("profile", text="A busy teacher."),
)
_PROMPT, _SUMMARY = "Why is the sky blue?", "The user prefers short answers in plain words."
_REMEDY = "export the run again"


def is_export(folder: pathlib.Path) -> bool:
    """Whether --mode=export wrote this folder."""
    return (folder / INFERENCE / DESCRIPTION).is_file()


def read_config(folder: pathlib.Path) -> Config:
    """Returns a config for the two models of an export; UserError if popi.json is missing or damaged."""
    described = {role: files.read_json(folder / role / DESCRIPTION, _REMEDY) for role in ROLES}
    for role, value in described.items():
        if value is None:
            raise UserError(f"{folder / role / DESCRIPTION}: no such file; {_REMEDY}")
        if not (folder / role / "config.json").is_file():
            raise UserError(f"{folder / role}: is an adapter or Orbax export; --format=hub writes whole models")
    own, other = described.values()
    assert own is not None and other is not None
    if any(own.get(key) != other.get(key) for key in own.keys() - {"role", "stop_ids", "example"}):
        raise UserError(f"{folder}: its two models are of different runs; {_REMEDY}")
    tree = base.get_config().to_dict()
    for section in _SECTIONS:
        if not isinstance(own.get(section), dict):
            raise UserError(f"{folder / INFERENCE / DESCRIPTION}: the section {section!r} is missing; {_REMEDY}")
        tree[section] = tree[section] | config_lib.tuples({section: own[section]})[section]
    tree["name"], tree["seed"], tree["method"] = own.get("name"), own.get("seed"), own.get("method")
    tree["model"] = tree["model"] | {"path": str(folder / INFERENCE), "compute_dtype": own.get("compute_dtype")}
    tree["lora"]["rank"] = 0
    tree["prompts"]["layout"] = str(folder / INFERENCE / DESCRIPTION)
    try:
        return config_lib.validated(tree)
    except UserError as error:
        raise UserError(f"{folder / INFERENCE / DESCRIPTION}: {error}") from None


def step(folder: pathlib.Path) -> int:
    """Returns the training steps of an export whose popi.json `read_config` has read."""
    described = files.read_json(folder / INFERENCE / DESCRIPTION, _REMEDY) or {}
    return int(described.get("step", 0))


def describe(role: str, config: Config, encoder: Encoder, step: int) -> dict[str, Any]:
    """Returns popi.json: instructions, fixed start and stops, limits and layout, with an example of a request."""
    if role == INFERENCE:
        request = encoder.layout.inference_messages(
            _SIGNALS, config.prompts.inference_instruction, config.prompts.pair_fields
        )
        example: dict[str, Any] = {"signals": [_fields(signal) for signal in _SIGNALS], "messages": request}
        stops = (*encoder.tokenizer.stop_ids, *encoder.summary_stop())
    else:
        request = encoder.layout.generator_messages(_PROMPT, Told(_SUMMARY), config.prompts.generator_instruction)
        example = {"prompt": _PROMPT, "summary": _SUMMARY, "messages": request}
        stops = encoder.tokenizer.stop_ids
    return {
        "schema": 1,
        "popi_jax": popi_jax.__version__,
        "role": role,
        "name": config.name,
        "method": config.method,
        "step": step,
        "seed": config.seed,
        "compute_dtype": config.model.compute_dtype,
        **{section: getattr(config, section).model_dump(mode="json") for section in _SECTIONS},
        "layout": encoder.layout.model_dump(mode="json"),
        "stop_ids": list(stops),
        "example": example,
    }


def texts(
    role: str, config: Config, encoder: Encoder, step: int, workdir: pathlib.Path, adapter: bool
) -> dict[str, str]:
    """Returns popi.json and the model card of a role."""
    described = describe(role, config, encoder, step)
    return {
        DESCRIPTION: json.dumps(described, indent=2, ensure_ascii=False) + "\n",
        CARD: _card(role, config, described, workdir, adapter),
    }


def example_prompt(role: str, encoder: Encoder) -> list[int]:
    """Returns the token ids of the request in popi.json, as the model was trained to read it."""
    if role == INFERENCE:
        return encoder.signals(Example("example", "test", _SIGNALS, ()))
    return encoder.prompt(_PROMPT, Told(_SUMMARY))


def _fields(signal: Signal) -> dict[str, str]:
    names = ("kind", "prompt", "chosen", "rejected", "text")
    return {name: getattr(signal, name) for name in names if getattr(signal, name)}


_ABOUT = {
    INFERENCE: "This model reads what a user left behind, their signals, and writes a summary of what they prefer.",
    GENERATOR: "This model reads a prompt with a summary of a user's preferences, and answers as the user would like.",
}
_OTHER = {
    INFERENCE: "Give the summary to the generator beside it, or to any other model.",
    GENERATOR: "The inference model beside it writes the summaries.",
}
_SNIPPET = """\
import json, pathlib
{imports}

folder = "."  # this folder
popi = json.loads(pathlib.Path(folder, "popi.json").read_text())
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {model}.from_pretrained(folder)
start = {start}
text = tokenizer.apply_chat_template(popi["example"]["messages"], tokenize=False, add_generation_prompt=True) + start
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
out = model.generate(**ids, do_sample=False, max_new_tokens={tokens}, eos_token_id=popi["stop_ids"])
print((start + tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip())
"""


def snippet(role: str, adapter: bool) -> str:
    """Returns the lines of transformers, or peft, that repeat this model's greedy text for the request in popi.json."""
    model = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if adapter:
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
    limit = "summary" if role == INFERENCE else "response"
    return _SNIPPET.format(
        imports=imports,
        model=model,
        start='popi["prompts"]["summary_start"]' if role == INFERENCE else '""',
        tokens=f'popi["limits"]["{limit}"]',
    )


def _card(role: str, config: Config, described: dict[str, Any], workdir: pathlib.Path, adapter: bool) -> str:
    """Returns the model card, in the hub's format."""
    head = ["---", "library_name: peft" if adapter else "library_name: transformers", "pipeline_tag: text-generation"]
    if adapter:
        head.append(f"base_model: {json.dumps(config.model.path)}")
    lines = [
        *head,
        "tags: [popi, personalization]",
        "---",
        "",
        f"# {config.name}: the {role} model",
        "",
        f"{_ABOUT[role]} {_OTHER[role]} The two are of one run of popi_jax {popi_jax.__version__} (POPI,"
        f" [arXiv 2510.17881](https://arxiv.org/abs/2510.17881)): method {config.method}, data set"
        f" {config.data.dataset}, {described['step']} steps, seed {config.seed}.",
        "",
        *_results(workdir),
        "## Use",
        "",
        "`popi.json` has everything around the texts: instructions, layout, the fixed start of a summary, the ids that"
        " end a text, limits in tokens, and the example that these lines send:",
        "",
        "```python",
        snippet(role, adapter).rstrip(),
        "```",
        "",
        "`popi_jax.Personalizer.load(...)` takes the folder with both models, and lays out your own users' signals.",
        "",
        "A summary is text about a person. Treat it like the data that it was made from.",
        "",
    ]
    return "\n".join(lines)


def _results(workdir: pathlib.Path) -> list[str]:
    found = stored.results(workdir)
    if found is None:
        return []
    row = found["rows"][0]
    low, high = (100 * value for value in row.get("accuracy_ci95") or (float("nan"),) * 2)
    return [
        "## Results",
        "",
        f"How often the implicit reward ranks the user's preferred response first, on {row.get('n')} test pairs of"
        f" {found['dataset']}, with a 95% bootstrap interval, and the tokens that personalization costs in the prompt:",
        "",
        "| method | accuracy | context tokens |",
        "| --- | --- | --- |",
        f"| {row['method']} | {100 * row['accuracy']:.1f}% [{low:.1f}, {high:.1f}] |"
        f" {row.get('context_tokens_mean') or 0:.0f} |",
        "",
    ]
