"""Repeats a run from the config.json in its workdir: --config=configs/recorded.py:runs/mine/config.json."""

import ml_collections

from popi_jax import config
from popi_jax.configs import base
from popi_jax.data import checks
from popi_jax.errors import UserError

_REMEDY = "give a run's config.json"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config in a config.json.

    Args:
        arg: the path of the file.

    Raises:
        UserError: one line that names the file, if it cannot be read or sets a key that configs/base.py does not have
            or a value of another type.
    """
    if not arg:
        raise UserError("configs/recorded.py: the file is missing; use --config=configs/recorded.py:DIR/config.json")
    recorded = checks.as_object(checks.parse_json(checks.read_text(arg, _REMEDY), arg, remedy=_REMEDY), arg, _REMEDY)
    tree = base.get_config().to_dict()
    for key, value in config.tuples(recorded).items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            value = {**tree[key], **value}
        tree[key] = value
    try:
        return ml_collections.ConfigDict(config.validated(tree).model_dump()).lock()
    except UserError as error:
        raise UserError(f"{arg}: {error}") from error
