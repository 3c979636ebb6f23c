"""The config.json of a run reproduces its config."""

import json

import pytest

from configs import psoups_smollm2, recorded
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
