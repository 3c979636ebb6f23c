"""The exact text that the models read: any change to it invalidates trained checkpoints."""

import pytest

from popi_jax.data import templates
from popi_jax.data.schema import Signal

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
    assert templates.signals_text((PAIR, COMMENT, PROFILE)) == expected


def test_signals_text_depends_on_which_response_is_preferred() -> None:
    swapped = Signal("pair", prompt=PAIR.prompt, chosen=PAIR.rejected, rejected=PAIR.chosen)
    assert templates.signals_text([PAIR]) != templates.signals_text([swapped])


def test_inference_messages_end_with_the_instruction_in_one_user_turn() -> None:
    messages = templates.inference_messages([PROFILE], "Describe the user.")
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
    (message,) = templates.inference_messages([PAIR, COMMENT], "Describe the user.", pair_fields)
    comment = "### Example 2\nPrompt: Best soup?\nThe user wrote: Keep it short."
    assert message["content"] == f"### Example 1\n{shown}\n\n{comment}\n\nDescribe the user."


def test_generator_without_context_sees_only_the_bare_prompt() -> None:
    assert templates.generator_messages("What is rain?", None, "Please the user.") == [
        {"role": "user", "content": "What is rain?"}
    ]


def test_generator_context_comes_first_and_the_prompt_last() -> None:
    (message,) = templates.generator_messages("What is rain?", " Likes rhymes.\n", "Please the user.")
    assert message["content"] == "About the user:\nLikes rhymes.\n\nPlease the user.\n\nPrompt: What is rain?"


def test_queries_of_one_user_share_their_text_up_to_the_prompt() -> None:
    one, two = (templates.generator_messages(p, "Likes rhymes.", "Please.")[0]["content"] for p in ("alpha", "beta"))
    assert one.removesuffix("alpha") == two.removesuffix("beta")


def test_an_empty_summary_is_not_the_bare_prompt() -> None:
    assert templates.generator_messages("x", "", "i") != templates.generator_messages("x", None, "i")
