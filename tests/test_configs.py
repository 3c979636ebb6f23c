"""Every config: the arguments that it takes, where it reads from, and the comments of its keys."""

import importlib
import io
import pathlib
import re
import tokenize

import pytest

from popi_jax.config import parse
from popi_jax.configs import base, recorded
from popi_jax.data import files
from popi_jax.errors import UserError

CONFIGS = pathlib.Path(base.__file__).resolve().parent

# The arguments of each config; recorded takes the path of a file instead.
ARGUMENTS = {
    "base": (),
    "quickstart": ("runlocal",),
    "psoups_smollm2": ("eight_signals", "runlocal"),
    "users": ("runlocal",),
    "free": ("smoke", "runlocal"),
    "llama3_3b": ("full", "lora", "runlocal"),
    "llama3_8b": ("full", "lora", "runlocal"),
    "elix": ("lora", "smoke", "runlocal"),
    "review": ("lora", "smoke", "runlocal"),
    "roleplay": ("lora", "smoke", "runlocal"),
    "alignx": ("lora", "smoke", "runlocal"),
    "prefeval": ("smoke", "runlocal"),
    "traits": ("smoke", "runlocal"),
}
EACH = [(name, arg) for name, arguments in ARGUMENTS.items() for arg in ("", *arguments)]


def get_config(name, arg):
    return importlib.import_module(f"popi_jax.configs.{name}").get_config(arg)


def leaves(config, prefix=""):
    """The path and value of every key that is not a section."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_every_config_is_in_the_table():
    assert {path.stem for path in CONFIGS.glob("*.py")} == {*ARGUMENTS, "recorded", "__init__"}


@pytest.mark.parametrize(("name", "arg"), EACH)
def test_a_config_is_named_after_its_file_and_has_the_keys_of_base(name, arg):
    config = get_config(name, arg)
    assert config.name == name
    assert [key for key, _ in leaves(config)] == [key for key, _ in leaves(base.get_config())]


@pytest.mark.parametrize(("name", "arg"), EACH)
def test_no_default_points_outside_the_repository(name, arg):
    root = CONFIGS.parent
    for key in ("model.path", "model.tokenizer", "model.shape", "data.path", "data.test_path", "data.prepared_dir"):
        value = dict(leaves(get_config(name, arg)))[key]
        assert (root / value).resolve().is_relative_to(root), (key, value)


@pytest.mark.parametrize("arg", ["runlocl", "RUNLOCAL", "full,lora", " "])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_unknown_argument_is_refused(name, arg):
    with pytest.raises(UserError) as refused:
        get_config(name, arg)
    message = str(refused.value)
    assert f"configs/{name}.py" in message and repr(arg) in message and "\n" not in message
    assert all(choice in message.split(repr(arg))[1] for choice in ARGUMENTS[name])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, ": no such file; give a run's config.json"),
        (b"{", ":1: not JSON (Expecting property name enclosed in double quotes at column 2); give a run's"),
        (b"\xff", ": not UTF-8 at byte 0"),
        (b'["seed"]', ": expected an object in braces, found a list; give a run's config.json"),
        (b'{"seed": "a"}', ": config.seed is 'a'; it should be a valid integer"),
        (b'{"seed": null}', ": config.seed is None; it should be a valid integer"),
        (b'{"seed": NaN}', ": config.seed is nan; it should be a valid integer"),
        (b'{"seeds": 1}', ": config.seeds is not a setting; configs/base.py has all of them"),
        (b'{"eval": {"user": 1}}', ": config.eval.user is not a setting; configs/base.py has all of them"),
        (b'{"eval": 1}', ": config.eval is 1; it must be a section, with the keys of configs/base.py"),
        (b'{"seed": {"a.b": 1}}', ": config.seed is {'a.b': 1}; it should be a valid integer"),
    ],
)
def test_a_recorded_config_that_cannot_be_used_is_one_line_with_the_file(tmp_path, content, reason):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        recorded.get_config(str(path))
    assert str(refused.value).startswith(f"{path}{reason}") and "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "arg"), EACH)
def test_a_recorded_config_is_the_config(tmp_path, name, arg):
    path = tmp_path / "config.json"
    settings = parse(get_config(name, arg))
    files.write_json(path, settings.model_dump())
    again = recorded.get_config(str(path))
    assert parse(again) == settings
    assert {k: type(v) for k, v in leaves(again)} == {k: type(v) for k, v in leaves(get_config(name, arg))}


def test_recorded_asks_for_a_file():
    with pytest.raises(UserError, match=r"the file is missing; use --config=configs/recorded.py:DIR/config.json"):
        recorded.get_config()


def test_every_key_of_base_has_a_comment():
    source = pathlib.Path(base.__file__).read_text(encoding="utf-8")
    commented = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    without = []
    for number, line in enumerate(lines, start=1):
        key = re.match(r"    c\.([\w.]+) = ", line)
        # Beside the key, or on a line of its own above it.
        if key and number not in commented and not lines[number - 2].lstrip().startswith("#"):
            without.append(key[1])
    assert not without
