"""Repeats a run from the config.json in its workdir: --config=configs/recorded.py:runs/mine/config.json."""

import json
import pathlib

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config in a config.json.

    Args:
        arg: the path of the file.

    Raises:
        ValueError: one line that names the file, if it is missing or holds no JSON object.
        AttributeError, KeyError, TypeError: for a key that configs/base.py does not have, or a value of another type.
    """
    if not arg:
        raise ValueError("configs/recorded.py: the file is missing; use --config=configs/recorded.py:DIR/config.json")
    try:
        recorded = json.loads(pathlib.Path(arg).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"configs/recorded.py: {arg} cannot be read: {error}; give a run's config.json") from error
    if not isinstance(recorded, dict):
        raise ValueError(f"configs/recorded.py: {arg} does not hold a JSON object; give a run's config.json")
    c = base.get_config()
    for key, value in recorded.items():
        if isinstance(value, dict):
            for name, entry in value.items():
                c[key][name] = tuple(entry) if isinstance(entry, list) else entry
        else:
            c[key] = value
    return c
