"""What the attacks share."""

import pathlib

import pytest

from tests.attack.runs import COMMANDS, make_inputs


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run that nothing disturbed, for the commands that use one, and inputs beside it."""
    folder = tmp_path_factory.mktemp("finished")
    COMMANDS["joint"].finish(folder)
    make_inputs(folder)
    return folder / "run"
