"""Writes the tokenizer's files into an exported folder, so that other libraries build the same prompts from them."""

import json
import os
import pathlib
import shutil
from typing import Any

from popi_jax.model import tokenizer as tokenizer_lib

_TEMPLATE = "chat_template.jinja"


def save(folder: pathlib.Path, source: str | os.PathLike[str]) -> dict[str, Any]:
    """Copies the tokenizer's files from the folder `source`.

    generation_config.json keeps only the ends of a response, since nothing else in it applies here. A chat template
    that reads the date or a thinking mode gets the values that the model was trained with. What transformers 4 and 5
    read differently is changed, and a tokenizer saved in the middle of training no longer cuts or pads texts.

    Returns:
        The ids that end and pad texts, as in config.json.
    """
    source = pathlib.Path(source)
    tokenizer, settings = tokenizer_lib.Tokenizer.load(source), source / "tokenizer_config.json"
    templates = tokenizer.template, tokenizer.fixed_template
    old, new = (json.dumps(template, ensure_ascii=False) for template in templates)
    ids = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    written = {
        "generation_config.json": ids,  # It wins over config.json.
        "tokenizer_config.json": _portable(_read(settings) if settings.is_file() else {}),
    }
    stored = _read(source / "tokenizer.json")
    if stored.get("truncation") or stored.get("padding") or stored["model"].get("dropout"):
        # As Tokenizer reads it: no text is cut or padded, and no token is drawn at random.
        model = stored["model"] | {"dropout": None}
        written["tokenizer.json"] = stored | {"truncation": None, "padding": None, "model": model}
    for name in tokenizer_lib.FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for name, value in written.items():
        text = json.dumps(value, indent=2, ensure_ascii=False).replace(old, new)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    if (folder / _TEMPLATE).exists():
        (folder / _TEMPLATE).write_text(templates[1], encoding="utf-8")
    return ids


def _read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))  # Tokenizer.load has checked it.


def _portable(tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """Returns a tokenizer_config.json that transformers 4 and 5 read with the class that reads it here."""
    # Without the names, version 4 adds token_type_ids, which its models refuse.
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    tokenizer_config = tokenizer_config | fixed
    for name in ("backend", "auto_map"):  # Of version 5 alone; of code that is not copied.
        tokenizer_config.pop(name, None)
    if isinstance(tokenizer_config.get("extra_special_tokens"), list):  # Version 4 has another name for the list.
        tokenizer_config["additional_special_tokens"] = tokenizer_config.pop("extra_special_tokens")
    return tokenizer_config
