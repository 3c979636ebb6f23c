"""From examples and contexts to token ids.

What exceeds a limit is an error that names it, or, with on_overflow = "drop", costs whole signals, the oldest first; a
prompt or a response is never cut. Drops are counted in an `OverflowLog` that the caller shows.
"""

import bisect
from collections.abc import Callable, Sequence
from typing import Protocol

from popi_jax.data import templates
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError

Ids = list[int]


class Tokenizer(Protocol):
    """What is asked of popi_jax.model.tokenizer.Tokenizer here."""

    @property
    def end_id(self) -> int:
        """The token that a response ends with."""
        ...

    def render(self, messages: templates.Messages, add_generation_prompt: bool = True) -> Ids:
        """Token ids of a conversation in the chat template."""
        ...

    def encode(self, text: str) -> Ids:
        """Token ids of a text, without special tokens."""
        ...


class Limits(Protocol):
    """The fields of config.limits that are read here."""

    signals: int
    prompt: int
    response: int
    on_overflow: str


class OverflowLog:
    """Counts the signals dropped to fit a limit: once per user and limit, however often the user is encoded."""

    def __init__(self) -> None:
        self._dropped: dict[tuple[str, str], int] = {}

    def record(self, user: str, limit_name: str, dropped: int) -> None:
        """Notes that `dropped` of this user's signals did not fit into the limit of this name."""
        self._dropped[user, limit_name] = dropped

    def counts(self) -> dict[str, tuple[int, int]]:
        """For each limit that was exceeded: the number of signals dropped, and of users who lost some."""
        totals: dict[str, tuple[int, int]] = {}
        for (_, limit_name), dropped in self._dropped.items():
            signals, users = totals.get(limit_name, (0, 0))
            totals[limit_name] = (signals + dropped, users + 1)
        return totals

    def __str__(self) -> str:
        parts = (f"{s} signals of {u} users dropped to fit {name}" for name, (s, u) in self.counts().items())
        return "; ".join(parts) or "no signals dropped"


def encode_signals(
    example: Example,
    tokenizer: Tokenizer,
    instruction: str,
    limit: int,
    on_overflow: str,
    log: OverflowLog | None = None,
    start: str = "",
    pair_fields: Sequence[str] = tuple(templates.PAIR_LABELS),
) -> Ids:
    """The prompt of q_phi for one user, generation prompt included.

    Args:
        example: the user.
        tokenizer: of the inference model.
        instruction: see `templates.inference_messages`.
        limit: limits.signals, the most tokens.
        on_overflow: "error", or "drop": drops the oldest (first) signals until the rest fits.
        log: counts what was dropped.
        start: how every summary starts: the model goes on from there.
        pair_fields: see `templates.signals_text`.
    """
    start_ids = tokenizer.encode(start)

    def render(signals: Sequence[Signal]) -> Ids:
        return [*tokenizer.render(templates.inference_messages(signals, instruction, pair_fields)), *start_ids]

    def length(signals: Sequence[Signal]) -> int:
        return len(render(signals))

    return render(_fitting_signals(example, length, limit, "limits.signals", on_overflow, log))


def raw_signals_context(
    example: Example, tokenizer: Tokenizer, instruction: str, limits: Limits, log: OverflowLog | None = None
) -> str:
    """The generator's context in raw_signals: the signals with which every query's prompt stays within limits.prompt.

    Args:
        example: the user, with queries.
        tokenizer: of the generator.
        instruction: see `templates.generator_messages`.
        limits: on_overflow as in `encode_signals`.
        log: counts what was dropped.
    """

    def length(signals: Sequence[Signal]) -> int:
        context = templates.signals_text(signals)
        prompts = {query.prompt for query in example.queries}
        return max(
            len(tokenizer.render(templates.generator_messages(prompt, context, instruction))) for prompt in prompts
        )

    kept = _fitting_signals(example, length, limits.prompt, "limits.prompt", limits.on_overflow, log)
    return templates.signals_text(kept)


def _fitting_signals(
    example: Example,
    length: Callable[[Sequence[Signal]], int],
    limit: int,
    limit_name: str,
    on_overflow: str,
    log: OverflowLog | None,
) -> tuple[Signal, ...]:
    """The newest signals with which the prompt has at most `limit` tokens; UserError if there are none such."""
    if not example.signals:
        raise UserError(f"user {example.user!r} has no signals; give at least one")
    tokens = length(example.signals)
    if tokens <= limit:
        return example.signals
    n_signals = len(example.signals)
    over = f"user {example.user!r}: a prompt with {n_signals} signals takes {tokens} tokens, {limit_name} is {limit}"
    if on_overflow == "error":
        raise UserError(f"{over}; raise it or set limits.on_overflow to 'drop'")
    # Fewer signals take fewer tokens, so the least number to drop is found by bisection.
    dropped = bisect.bisect_left(range(n_signals), True, lo=1, key=lambda n: length(example.signals[n:]) <= limit)
    if dropped == n_signals:
        raise UserError(f"{over}, which the last signal alone exceeds; raise it")
    if log is not None:
        log.record(example.user, limit_name, dropped)
    return example.signals[dropped:]


def encode_query(
    query: Query, context: str | None, tokenizer: Tokenizer, instruction: str, limits: Limits
) -> tuple[Ids, Ids, Ids]:
    """Encodes one preference triple under a context.

    Args:
        query: the triple.
        context: see `templates.generator_messages`.
        tokenizer: of the generator.
        instruction: see `templates.generator_messages`.
        limits: a prompt or a response beyond its limit is an error, whatever on_overflow says.

    Returns:
        The prompt with its generation prompt; y+ and y-, without special tokens but for the end token of each.
    """
    where = f"query {query.provenance or repr(query.prompt[:40])}"
    prefix = tokenizer.render(templates.generator_messages(query.prompt, context, instruction))
    chosen, rejected = ([*tokenizer.encode(text), tokenizer.end_id] for text in (query.chosen, query.rejected))
    for name, ids, limit_name, limit in (
        ("the generator's prompt", prefix, "limits.prompt", limits.prompt),
        ("chosen", chosen, "limits.response", limits.response),
        ("rejected", rejected, "limits.response", limits.response),
    ):
        if len(ids) > limit:
            raise UserError(
                f"{where}: {name} takes {len(ids)} tokens, {limit_name} is {limit}; raise it or shorten the text"
            )
    return prefix, chosen, rejected
