"""The config.json of a run reproduces its config."""

import json

import pydantic
import pytest

from popi_jax.config import Data
from popi_jax.configs import psoups_smollm2, recorded
from popi_jax.errors import UserError


def test_config_json_reproduces_the_config(tmp_path):
    config = psoups_smollm2.get_config()
    path = tmp_path / "config.json"
    path.write_text(config.to_json_best_effort())
    assert recorded.get_config(str(path)).to_dict() == config.to_dict()


def test_unknown_key_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"optim": {"learning_rate": 1}}))
    with pytest.raises(UserError, match="learning_rate is not a setting"):
        recorded.get_config(str(path))


def test_the_config_of_an_older_run_is_read(tmp_path):
    """Before data.signals became data.protocol and a benchmark's keys were added."""
    tree = json.loads(psoups_smollm2.get_config().to_json_best_effort())
    for key in ("protocol", "on_null", "variant", "unseen", "traits_per_user"):
        del tree["data"][key]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree | {"data": tree["data"] | {"signals": "shipped"}}))
    config = psoups_smollm2.get_config()
    config.data.protocol = "published"
    assert recorded.get_config(str(path)).to_dict() == config.to_dict()
    for key in set(tree["data"]) - {"signals"}:  # A key that has always been there has no other value to fall back on.
        with pytest.raises(pydantic.ValidationError):
            Data.model_validate({k: v for k, v in Data(**config.data.to_dict()).model_dump().items() if k != key})
