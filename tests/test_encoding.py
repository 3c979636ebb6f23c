"""Examples become token ids within their limits. One token per word lets a reader count every length."""

import dataclasses

import pytest

from popi_jax.config import parse
from popi_jax.configs import base
from popi_jax.data import encoding
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError


class WordTokenizer:
    """One token per word, and one each for a turn's start, a turn's end and the generation prompt."""

    pad_id, start_id, end_id, generation_id = 0, 1, 2, 3

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [4 + self.words.index(word) for word in text.split()]

    encode_start = encode_part = encode

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        ids = []
        for message in messages:
            ids += [self.start_id, *self.encode(message["content"]), self.end_id]
        return [*ids, self.generation_id]

    def text(self, ids: list[int]) -> str:
        return " ".join(f"<{i}>" if i < 4 else self.words[i - 4] for i in ids)


TOKENIZER = WordTokenizer()
# Each signal is seven words: "### Example 1 About the user: fact0".
SIGNALS = tuple(Signal("profile", text=f"fact{i}") for i in range(4))
EXAMPLE = Example("u1", "train", SIGNALS, (Query("why now", "yes indeed", "no", "f#1"), Query("what", "a", "b")))
SIGNALS_LIMIT = 3 + 4 * 7 + 2  # Special tokens, signals and the instruction "sum up".


def encoder(summary_start: str = "", summary_stop: str = "", **limits):
    """Returns an encoder for EXAMPLE with these limits."""
    c = base.get_config()
    c.prompts.inference_instruction, c.prompts.generator_instruction = "sum up", "please"
    c.prompts.summary_start, c.prompts.summary_stop = summary_start, summary_stop
    c.limits.update({"signals": 100, "prompt": 100, "response": 3, "on_overflow": "error"} | limits)
    settings = parse(c)
    return encoding.Encoder(TOKENIZER, settings.prompts, settings.limits)


def shown(ids: list[int]) -> list[str]:
    return [word for word in TOKENIZER.text(ids).split() if word.startswith("fact")]


def test_signals_are_the_rendered_inference_prompt() -> None:
    ids = encoder(signals=SIGNALS_LIMIT).signals(EXAMPLE)
    assert len(ids) == SIGNALS_LIMIT
    assert TOKENIZER.text(ids).startswith("<1> ### Example 1 About the user: fact0 ### Example 2")
    assert TOKENIZER.text(ids).endswith("fact3 sum up <2> <3>")


def test_the_summary_start_ends_the_prompt_and_counts_towards_the_limit() -> None:
    plain = encoder().signals(EXAMPLE)
    ids = encoder("They like", signals=SIGNALS_LIMIT + 2).signals(EXAMPLE)
    assert ids[: len(plain)] == plain and TOKENIZER.text(ids[len(plain) :]) == "They like"
    with pytest.raises(UserError, match="limits.signals"):
        encoder("They like", signals=SIGNALS_LIMIT + 1).signals(EXAMPLE)


def test_too_many_signals_raise_an_error_naming_user_tokens_and_limit() -> None:
    with pytest.raises(
        UserError, match=r"user 'u1': .* 4 signals takes 33 tokens, .*limits.signals is 32; raise it or set"
    ):
        encoder(signals=SIGNALS_LIMIT - 1).signals(EXAMPLE)


@pytest.mark.parametrize(("limit", "kept"), [(33, 4), (32, 3), (26, 3), (25, 2), (19, 2), (18, 1), (12, 1)])
def test_drop_removes_as_few_signals_as_possible_oldest_first(limit: int, kept: int) -> None:
    drops = encoder(signals=limit, on_overflow="drop")
    assert shown(drops.signals(EXAMPLE)) == [f"fact{i}" for i in range(4 - kept, 4)]
    assert drops.overflow.counts() == ({} if kept == 4 else {"limits.signals": (4 - kept, 1)})
    assert drops.overflow.of("u1", "limits.signals") == 4 - kept


def test_drop_fails_if_the_last_signal_alone_is_too_long() -> None:
    with pytest.raises(
        UserError, match=r"user 'u1'.*limits.signals is 11, which the last signal alone exceeds; raise it"
    ):
        encoder(signals=11, on_overflow="drop").signals(EXAMPLE)


def test_no_signals_raise_an_error() -> None:
    with pytest.raises(UserError, match="'u1' has no signals"):
        encoder(on_overflow="drop").signals(dataclasses.replace(EXAMPLE, signals=()))


def test_the_log_counts_a_user_once_however_often_it_is_encoded() -> None:
    drops = encoder(signals=19, on_overflow="drop")
    assert str(drops.overflow) == "no signals dropped"
    for _ in range(3):
        drops.signals(EXAMPLE)
        drops.signals(dataclasses.replace(EXAMPLE, user="u2", signals=SIGNALS[:3]))
    assert drops.overflow.counts() == {"limits.signals": (3, 2)}
    assert str(drops.overflow) == "3 signals of 2 users dropped to fit limits.signals"


def test_raw_signals_leave_room_for_the_longest_query() -> None:
    # "<1> About the user: {signals} please Prompt: why now <2> <3>": 3 + 3 + 7 n + 1 + 3 tokens.
    drops = encoder(prompt=30, on_overflow="drop")
    told = drops.raw_signals(EXAMPLE)
    text = "### Example 1\nAbout the user: fact2\n\n### Example 2\nAbout the user: fact3"
    assert told == Told(text, raw_signals=True)
    assert drops.overflow.counts() == {"limits.prompt": (2, 1)}
    assert len(drops.pair(EXAMPLE.queries[0], told)[0]) == 24
    with pytest.raises(UserError, match=r"user 'u1': .* takes 38 tokens, .*limits.prompt is 37"):
        encoder(prompt=37).raw_signals(EXAMPLE)


def test_a_pair_ends_each_response_with_the_end_token() -> None:
    prefix, chosen, rejected = encoder().pair(EXAMPLE.queries[0], Told("likes rhymes"))
    assert TOKENIZER.text(prefix) == "<1> About the user: likes rhymes please Prompt: why now <2> <3>"
    assert TOKENIZER.text(chosen) == "yes indeed <2>"
    assert TOKENIZER.text(rejected) == "no <2>"


def test_without_context_the_prompt_is_bare() -> None:
    assert TOKENIZER.text(encoder().prompt("why now", None)) == "<1> why now <2> <3>"


@pytest.mark.parametrize("on_overflow", ["error", "drop"])
def test_prompts_and_responses_are_never_cut(on_overflow: str) -> None:
    query = EXAMPLE.queries[0]
    encoder(prompt=5, on_overflow=on_overflow).check(query, None)
    with pytest.raises(UserError, match=r"query f#1: the generator's prompt takes 5 .*limits.prompt is 4; raise"):
        encoder(prompt=4, on_overflow=on_overflow).check(query, None)
    with pytest.raises(UserError, match=r"query f#1: chosen takes 3 tokens, .*limits.response is 2"):
        encoder(response=2, on_overflow=on_overflow).check(query, None)
    with pytest.raises(UserError, match=r"query 'why now': rejected takes 3 tokens, .*limits.response is 2"):
        encoder(response=2).check(Query(query.prompt, query.rejected, query.chosen), None)
    with pytest.raises(UserError, match=r"prompt 'why now' takes 5 tokens, .*limits.prompt is 4"):
        encoder(prompt=4).check_prompt("why now", None)


def test_responses_that_are_the_same_tokens_state_no_preference() -> None:
    with pytest.raises(UserError, match=r"^query f#7: chosen and rejected .* the same tokens.*remove the pair$"):
        encoder().check(Query("why now", "yes indeed", "yes  indeed", "f#7"), None)
    encoder().check(Query("why now", "yes indeed", "yes", "f#7"), None)


def test_a_prompt_leaves_room_for_the_coming_summary() -> None:
    query = EXAMPLE.queries[0]
    with pytest.raises(UserError, match=r"prompt with a summary of limits.summary = 6 takes 17 .*limits.prompt"):
        encoder(prompt=16).check(query, Told("They"), more=6)
    exact = encoder(prompt=17)
    exact.check(query, Told("They"), more=6)
    # When tokenised again, a summary may be longer than it was when drawn. It is neither cut nor refused.
    assert len(exact.pair(query, Told("They like rhymes and more words than there was room"))[0]) == 20


def test_the_summary_stop_is_at_most_one_token() -> None:
    assert encoder().summary_stop() == ()
    assert encoder(summary_stop=".").summary_stop() == tuple(TOKENIZER.encode("."))
    with pytest.raises(UserError, match="config.prompts.summary_stop is 'two words', 2 tokens of this tokenizer"):
        encoder(summary_stop="two words").summary_stop()


def test_a_response_that_the_template_rewrites_names_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str) -> list[int]:
        raise UserError("the chat template rewrites a response")

    checker = encoder()
    prefix = TOKENIZER.render([{"role": "user", "content": "why now"}])
    monkeypatch.setattr(encoding.Encoder, "prompt", lambda *_: prefix)
    monkeypatch.setattr(TOKENIZER, "encode", refuse)
    with pytest.raises(UserError, match="query f#1: the chat template rewrites a response"):
        checker.check(EXAMPLE.queries[0], None)
