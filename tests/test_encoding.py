"""From examples to padded arrays, with a tokenizer of one token a word so that every length can be counted by eye."""

import dataclasses
import types

import pytest

from popi_jax.data import encoding
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError


class WordTokenizer:
    """One token for each word, and one each for the start and the end of a turn and for the generation prompt."""

    pad_id, start_id, end_id, generation_id = 0, 1, 2, 3

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [4 + self.words.index(word) for word in text.split()]

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        ids = []
        for message in messages:
            ids += [self.start_id, *self.encode(message["content"]), self.end_id]
        return ids + [self.generation_id] * add_generation_prompt

    def text(self, ids: list[int]) -> str:
        return " ".join(f"<{i}>" if i < 4 else self.words[i - 4] for i in ids)


TOKENIZER = WordTokenizer()
SIGNALS = tuple(
    Signal("profile", text=f"fact{i}") for i in range(4)
)  # Each: "### Example 1 About the user: fact0", 7 words.
EXAMPLE = Example("u1", "train", SIGNALS, (Query("why now", "yes indeed", "no", "f#1"), Query("what", "a", "b")))
SIGNALS_LIMIT = 3 + 4 * 7 + 2  # Special tokens, signals, and the instruction "sum up".


def limits(**changes):
    return types.SimpleNamespace(**({"signals": 100, "prompt": 100, "response": 3, "on_overflow": "error"} | changes))


def shown(ids: list[int]) -> list[str]:
    return [word for word in TOKENIZER.text(ids).split() if word.startswith("fact")]


def test_encode_signals_is_the_rendered_inference_prompt_ready_to_generate() -> None:
    ids = encoding.encode_signals(EXAMPLE, TOKENIZER, "sum up", SIGNALS_LIMIT, "error")
    assert len(ids) == SIGNALS_LIMIT
    assert TOKENIZER.text(ids).startswith("<1> ### Example 1 About the user: fact0 ### Example 2")
    assert TOKENIZER.text(ids).endswith("fact3 sum up <2> <3>")


def test_a_start_of_the_summary_ends_the_prompt_and_counts() -> None:
    plain = encoding.encode_signals(EXAMPLE, TOKENIZER, "sum up", SIGNALS_LIMIT, "error")
    ids = encoding.encode_signals(EXAMPLE, TOKENIZER, "sum up", SIGNALS_LIMIT + 2, "error", start="They like")
    assert ids[: len(plain)] == plain and TOKENIZER.text(ids[len(plain) :]) == "They like"
    with pytest.raises(UserError, match="limits.signals"):
        encoding.encode_signals(EXAMPLE, TOKENIZER, "sum up", SIGNALS_LIMIT + 1, "error", start="They like")


def test_too_many_signals_are_an_error_that_names_user_tokens_and_limit() -> None:
    with pytest.raises(
        UserError, match=r"user 'u1': .* 4 signals takes 33 tokens, limits.signals is 32; raise it or set"
    ):
        encoding.encode_signals(EXAMPLE, TOKENIZER, "sum up", SIGNALS_LIMIT - 1, "error")


@pytest.mark.parametrize(("limit", "kept"), [(33, 4), (32, 3), (26, 3), (25, 2), (19, 2), (18, 1), (12, 1)])
def test_drop_loses_the_fewest_oldest_signals(limit: int, kept: int) -> None:
    log = encoding.OverflowLog()
    ids = encoding.encode_signals(EXAMPLE, TOKENIZER, "sum up", limit, "drop", log)
    assert shown(ids) == [f"fact{i}" for i in range(4 - kept, 4)]
    assert log.counts() == ({} if kept == 4 else {"limits.signals": (4 - kept, 1)})


def test_drop_keeps_at_least_one_signal_or_fails() -> None:
    with pytest.raises(
        UserError, match=r"user 'u1'.*limits.signals is 11, which the last signal alone exceeds; raise it"
    ):
        encoding.encode_signals(EXAMPLE, TOKENIZER, "sum up", 11, "drop")


def test_no_signals_are_an_error() -> None:
    with pytest.raises(UserError, match="'u1' has no signals"):
        encoding.encode_signals(dataclasses.replace(EXAMPLE, signals=()), TOKENIZER, "sum up", 99, "drop")


def test_the_log_counts_a_user_once_however_often_encoded() -> None:
    log = encoding.OverflowLog()
    assert str(log) == "no signals dropped"
    for _ in range(3):
        encoding.encode_signals(EXAMPLE, TOKENIZER, "sum up", 19, "drop", log)
        encoding.encode_signals(dataclasses.replace(EXAMPLE, user="u2"), TOKENIZER, "sum up", 26, "drop", log)
    assert log.counts() == {"limits.signals": (3, 2)}
    assert str(log) == "3 signals of 2 users dropped to fit limits.signals"


def test_raw_signals_leave_room_for_the_longest_query() -> None:
    # "<1> About the user: {signals} please Prompt: why now <2> <3>": 3 + 3 + 7 n + 1 + 3 tokens.
    log = encoding.OverflowLog()
    context = encoding.raw_signals_context(EXAMPLE, TOKENIZER, "please", limits(prompt=30, on_overflow="drop"), log)
    assert context == "### Example 1\nAbout the user: fact2\n\n### Example 2\nAbout the user: fact3"
    assert log.counts() == {"limits.prompt": (2, 1)}
    assert len(encoding.encode_query(EXAMPLE.queries[0], context, TOKENIZER, "please", limits(prompt=24))[0]) == 24
    with pytest.raises(UserError, match=r"user 'u1': .* takes 38 tokens, limits.prompt is 37"):
        encoding.raw_signals_context(EXAMPLE, TOKENIZER, "please", limits(prompt=37))


def test_encode_query_ends_each_response_with_the_end_token() -> None:
    prefix, chosen, rejected = encoding.encode_query(EXAMPLE.queries[0], "likes rhymes", TOKENIZER, "please", limits())
    assert TOKENIZER.text(prefix) == "<1> About the user: likes rhymes please Prompt: why now <2> <3>"
    assert TOKENIZER.text(chosen) == "yes indeed <2>"
    assert TOKENIZER.text(rejected) == "no <2>"


def test_without_context_the_prefix_is_the_bare_prompt() -> None:
    prefix, _, _ = encoding.encode_query(EXAMPLE.queries[0], None, TOKENIZER, "please", limits())
    assert TOKENIZER.text(prefix) == "<1> why now <2> <3>"


@pytest.mark.parametrize("on_overflow", ["error", "drop"])
def test_prompts_and_responses_are_never_cut(on_overflow: str) -> None:
    query = EXAMPLE.queries[0]
    fits = limits(prompt=5, on_overflow=on_overflow)
    assert len(encoding.encode_query(query, None, TOKENIZER, "please", fits)[0]) == 5
    with pytest.raises(UserError, match=r"query f#1: the generator's prompt takes 5 tokens, limits.prompt is 4; raise"):
        encoding.encode_query(query, None, TOKENIZER, "please", limits(prompt=4, on_overflow=on_overflow))
    with pytest.raises(UserError, match=r"query f#1: chosen takes 3 tokens, limits.response is 2"):
        encoding.encode_query(query, None, TOKENIZER, "please", limits(response=2, on_overflow=on_overflow))
    swapped = Query(query.prompt, query.rejected, query.chosen)
    with pytest.raises(UserError, match=r"query 'why now': rejected takes 3 tokens, limits.response is 2"):
        encoding.encode_query(swapped, None, TOKENIZER, "please", limits(response=2, on_overflow=on_overflow))
