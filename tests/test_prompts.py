"""prompts.jsonl: reading it, and the errors for mistakes in it."""

import json

import pytest

from popi_jax.data import prompts
from popi_jax.errors import UserError


def write(folder, *lines):
    path = folder / "prompts.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_summaries_come_from_the_line_or_from_the_file_beside_it(tmp_path):
    (tmp_path / "summaries.jsonl").write_text(
        '{"user": "u", "summary": "Likes\u2028lists.", "step": 3}\n{"user": "v", "summary": ""}\n'
    )
    path = write(
        tmp_path,
        {"prompt": "Why?", "user": "u"},
        "",
        {"prompt": "How?", "summary": "Likes tables."},
        {"prompt": "What?", "user": "v"},
    )
    assert prompts.read_prompts(path) == [
        {"row": 1, "prompt": "Why?", "user": "u", "summary": "Likes\u2028lists."},
        {"row": 3, "prompt": "How?", "summary": "Likes tables."},
        {"row": 4, "prompt": "What?", "user": "v", "summary": ""},
    ]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"prompt"', ":1: not JSON"),
        ("[1]", ":1: "),
        ({"summary": "s"}, ":1: field 'prompt' is missing"),
        ({"prompt": " ", "summary": "s"}, ":1: field 'prompt' is empty"),
        ({"prompt": "Why?", "summary": ""}, ":1: field 'summary' is empty"),
        ({"prompt": "Why?"}, ":1: neither the field 'summary' nor a 'user'"),
        ({"prompt": "Why?", "user": "u"}, ":1: neither the field 'summary' nor a 'user'"),
        ({"prompt": "Why?", "user": ["u"]}, ":1: field 'user' must be a string, found a list; put"),
        ({"prompt": "Why?", "summary": "s", "user": 7}, ":1: field 'user' must be a string, found a number; put"),
        ({"prompt": "Why?", "summary": "s", "user": "\ud800"}, ":1: field 'user' has half a surrogate pair"),
        ('{"prompt": "Why?", "summary": "s", "user": NaN}', ":1: field 'user' must be a string, found a number; put"),
        ({"prompt": "Why?", "sumary": "s"}, ":1: unknown field 'sumary'"),
        ("", ": no prompts"),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path, line, shown):
    path = write(tmp_path, line)
    with pytest.raises(UserError) as error:
        prompts.read_prompts(path)
    assert f"{path}{shown}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        ([{"user": "u"}], ":1: field 'summary' is missing"),
        ([{"user": "u", "summary": None}], ":1: field 'summary' must be a string, found null"),
        ([{"user": "u", "summary": "\ud800"}], ":1: field 'summary' has half a surrogate pair"),
        ([{"summary": "s"}], ":1: field 'user' is missing"),
        ([{"user": 7, "summary": "s"}], ":1: field 'user' must be a string"),
        ([{"user": "u", "summary": "first"}, {"user": "u", "summary": "first"}], ":2: field 'user': 'u' is on an"),
    ],
)
def test_a_mistake_in_summaries_jsonl_is_named(tmp_path, lines, shown):
    path = tmp_path / "summaries.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError) as error:
        prompts.read_prompts(write(tmp_path, {"prompt": "Why?", "user": "u"}))
    assert str(error.value).startswith(f"{path}{shown}") and "\n" not in str(error.value)
