"""Any run again from what it left: --config=configs/recorded.py:runs/mine/config.json."""

import json
import pathlib

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config that the file `arg` holds; a key that configs/base.py does not know is an error."""
    recorded = json.loads(pathlib.Path(arg).read_text(encoding="utf-8"))
    c = base.get_config()
    for key, value in recorded.items():
        if isinstance(value, dict):
            for name, entry in value.items():
                c[key][name] = tuple(entry) if isinstance(entry, list) else entry
        else:
            c[key] = value
    return c
