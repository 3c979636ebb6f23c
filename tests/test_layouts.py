"""The exact text that the models read: any change to it invalidates trained checkpoints."""

import json
import pathlib

import pytest

from popi_jax.data import layouts
from popi_jax.data.layouts import PLAIN, Told
from popi_jax.data.schema import Signal
from popi_jax.errors import UserError

PAIR = Signal(
    "pair", prompt="Why is the sky blue?", chosen="Air scatters blue.", rejected="Rayleigh, 1871.", provenance="f#1"
)
COMMENT = Signal("comment", prompt="Best soup?", text="Keep it short.")
PROFILE = Signal("profile", text="A nurse from Oslo.")


def test_signals_text_shows_each_kind_in_order_and_never_the_provenance() -> None:
    expected = (
        "### Example 1\nPrompt: Why is the sky blue?\nPreferred: Air scatters blue.\nRejected: Rayleigh, 1871.\n\n"
        "### Example 2\nPrompt: Best soup?\nThe user wrote: Keep it short.\n\n"
        "### Example 3\nAbout the user: A nurse from Oslo."
    )
    assert PLAIN.signals_text((PAIR, COMMENT, PROFILE)) == expected


def test_signals_text_depends_on_which_response_is_preferred() -> None:
    swapped = Signal("pair", prompt=PAIR.prompt, chosen=PAIR.rejected, rejected=PAIR.chosen)
    assert PLAIN.signals_text([PAIR]) != PLAIN.signals_text([swapped])


def test_inference_messages_end_with_the_instruction_in_one_user_turn() -> None:
    messages = PLAIN.inference_messages([PROFILE], "Describe the user.")
    assert messages == [
        {"role": "user", "content": "### Example 1\nAbout the user: A nurse from Oslo.\n\nDescribe the user."}
    ]


@pytest.mark.parametrize(
    ("pair_fields", "shown"),
    [
        (("chosen", "prompt"), "Prompt: Why is the sky blue?\nPreferred: Air scatters blue."),
        (("chosen", "rejected"), "Preferred: Air scatters blue.\nRejected: Rayleigh, 1871."),
        (("chosen",), "Air scatters blue."),
    ],
)
def test_inference_messages_show_the_requested_pair_fields(pair_fields: tuple[str, ...], shown: str) -> None:
    (message,) = PLAIN.inference_messages([PAIR, COMMENT], "Describe the user.", pair_fields)
    comment = "### Example 2\nPrompt: Best soup?\nThe user wrote: Keep it short."
    assert message["content"] == f"### Example 1\n{shown}\n\n{comment}\n\nDescribe the user."


def test_generator_without_context_sees_only_the_bare_prompt() -> None:
    assert PLAIN.generator_messages("What is rain?", None, "Please the user.") == [
        {"role": "user", "content": "What is rain?"}
    ]


def test_generator_context_comes_first_and_the_prompt_last() -> None:
    (message,) = PLAIN.generator_messages("What is rain?", Told(" Likes rhymes.\n"), "Please the user.")
    assert message["content"] == "About the user:\nLikes rhymes.\n\nPlease the user.\n\nPrompt: What is rain?"


def test_queries_of_one_user_share_their_text_up_to_the_prompt() -> None:
    one, two = (PLAIN.generator_messages(p, Told("Likes rhymes."), "Please.")[0]["content"] for p in ("alpha", "beta"))
    assert one.removesuffix("alpha") == two.removesuffix("beta")


def test_an_empty_summary_is_not_the_bare_prompt() -> None:
    assert PLAIN.generator_messages("x", Told(""), "i") != PLAIN.generator_messages("x", None, "i")


GOLDEN = pathlib.Path(__file__).parent / "fixtures/layouts"
SIGNALS = (
    Signal("pair", prompt="Why is {prompt} blue?", chosen="Air scatters blue.", rejected="Rayleigh, 1871."),
    Signal("comment", prompt="Best soup?", text="Keep it short."),
    Signal("pair", prompt="Is rain wet?", chosen="Yes.", rejected="It depends."),
    Signal("profile", text="A nurse from Oslo."),
)


def requests(layout: layouts.Layout) -> dict[str, layouts.Messages]:
    """Every kind of request, as the models read it."""
    raw = Told(layout.signals_text(SIGNALS), raw_signals=True)
    return {
        "inference": layout.inference_messages(SIGNALS, "Sum up."),
        "summary": layout.generator_messages("What is {context}?", Told(" Likes rhymes.\n"), "Please the user."),
        "raw_signals": layout.generator_messages("What is {context}?", raw, "Please the user."),
        "direct": layout.generator_messages("What is {context}?", None, "Please the user."),
        "one_pair": layout.inference_messages(SIGNALS[:1], "Sum up."),
    }


def written(messages: dict[str, layouts.Messages]) -> str:
    """A file to read: each turn's text in full, between a line with its place and a line that ends it."""
    turns = [(name, turn) for name, own in messages.items() for turn in own]
    return "".join(f"<<< {name}: {turn['role']}\n{turn['content']}\n>>>\n" for name, turn in turns)


@pytest.mark.parametrize("name", layouts.NAMES)
def test_a_layout_is_as_in_its_golden_file(name: str) -> None:
    assert written(requests(layouts.load(name))) == (GOLDEN / f"{name}.txt").read_text()


def test_the_published_pairs_have_the_white_space_of_the_public_code() -> None:
    """By hand: a space ends each sub-heading, two line ends each example, two more the section and the prompt."""
    layout = layouts.load("published_pairs")
    raw = layout.signals_text(SIGNALS[2:3])
    assert raw == (
        "## Example 1\n### Prompt \nIs rain wet?\n"
        "### Preferred Response \nYes.\n### Dispreferred Response \nIt depends.\n\n"
    )
    (turn,) = layout.generator_messages("Why?", Told(raw, raw_signals=True), "Do.")
    assert turn == {
        "role": "user",
        "content": f"# User Preference Examples\n{raw}\n\n# Instruction\nDo.\n\n# User Prompt\nWhy?\n\n",
    }
    assert layout.generator_messages("Why?", None, "Do.") == [{"role": "user", "content": "Why?"}]


def test_alignx_says_what_is_missing_and_never_shows_the_bare_post() -> None:
    layout = layouts.load("published_alignx")
    text = layout.signals_text([PROFILE])
    assert text.count("Not provided.\n\n") == 2 and text.startswith(
        "## This user's demographic information:\n\nA nurse"
    )
    system, user = layout.generator_messages("A post.", None, "Do.")
    assert system["role"] == "system" and user["content"].endswith("# Post\nA post.\n\n")
    assert "Do." not in user["content"]


PLAIN_FILE = json.loads((layouts._FOLDER / "plain.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair": "no place"}, r"pair must have \{fields\}, each once"),
        ({"pair": "{fields} {fields}"}, "pair must have"),
        (
            {"comment": "{text} {context} {prompt}"},
            r"comment must have \{prompt\} and \{text\}, each once, and no other",
        ),
        ({"direct": {"system": "", "user": "x"}}, "direct.user must have"),
        ({"direct": {"system": ""}}, "direct.user: Field required"),
        ({"direct": {"system": 3, "user": "{prompt}"}}, "direct.system: Input should be a valid string"),
        ({"sections": []}, "each of pair, comment and profile once"),
        ({"sections": [{"kinds": ["pair"], "heading": "", "empty": ""}]}, "each of pair, comment and profile once"),
        ({"pair_fields": {"chosen": "{chosen}"}}, "pair_fields all three"),
        ({"separator": "{number}"}, "separator must have no placeholder"),
        ({"direct": {"system": "{instruction}", "user": "{prompt}"}}, "direct.system must have no placeholder"),
        ({"direct": {"system": "", "user": "{number} {prompt}"}}, "direct.user must have"),
        ({"pair": "\ud800{fields}"}, "a text has half a surrogate pair"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
)
def test_a_bad_layout_file_is_refused_in_one_line(tmp_path: pathlib.Path, change: dict, message: str) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(PLAIN_FILE | change))
    with pytest.raises(UserError, match=message) as refused:
        layouts.load(str(path))
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


def test_a_layout_is_a_name_or_a_json_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(PLAIN_FILE | {"separator": "\n"}))
    own = layouts.load(str(path))
    path.with_name("braces.json").write_text(json.dumps(PLAIN_FILE | {"profile": "{x} {{text}}"}))
    assert layouts.load(str(path.with_name("braces.json"))).signals_text([PROFILE]) == "{x} {A nurse from Oslo.}"
    assert own.signals_text([PROFILE, PROFILE]) == PLAIN.signals_text([PROFILE, PROFILE]).replace("\n\n", "\n")
    assert layouts.fingerprint(str(path)) != layouts.fingerprint("plain")
    for name, message in (("publishd", "use plain, published_alignx"), ("none.json", "none.json: no such file")):
        with pytest.raises(UserError, match=message):
            layouts.load(name)
