"""Turns users and queries into token ids, following a config's prompts and limits.

Text that exceeds a limit raises an error that names the limit. With on_overflow = "drop", whole signals are dropped
instead, oldest first. Prompts and responses are never cut. An `OverflowLog` counts the drops for the caller to report.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

from popi_jax.config import Limits, Prompts
from popi_jax.data import layouts
from popi_jax.data.layouts import Layout, Told
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError, shown
from popi_jax.model.tokenizer import Tokenizer

Ids = list[int]


class Unfit(UserError):
    """A user or query that the run cannot use. `reason` says why, without naming it."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class OverflowLog:
    """Counts signals dropped to fit a limit, once per user and limit, however often the user is encoded."""

    def __init__(self) -> None:
        self._dropped: dict[tuple[str, str], int] = {}

    def record(self, user: str, limit_name: str, dropped: int) -> None:
        """Records that `dropped` of this user's signals did not fit the limit of this name."""
        self._dropped[user, limit_name] = dropped

    def of(self, user: str, limit_name: str) -> int:
        """The number of this user's signals that did not fit the limit of this name."""
        return self._dropped.get((user, limit_name), 0)

    def counts(self) -> dict[str, tuple[int, int]]:
        """For each exceeded limit, the number of dropped signals and the number of users who lost some."""
        totals: dict[str, tuple[int, int]] = {}
        for (_, limit_name), dropped in self._dropped.items():
            signals, users = totals.get(limit_name, (0, 0))
            totals[limit_name] = (signals + dropped, users + 1)
        return totals

    def __str__(self) -> str:
        parts = (f"{s} signals of {u} users dropped to fit {name}" for name, (s, u) in self.counts().items())
        return "; ".join(parts) or "no signals dropped"


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes the inputs of both models.

    Attributes:
        tokenizer: shared by both models.
        prompts: config.prompts.
        limits: config.limits.
        overflow: counts the signals that on_overflow = "drop" drops.
    """

    tokenizer: Tokenizer
    prompts: Prompts
    limits: Limits
    overflow: OverflowLog = dataclasses.field(default_factory=OverflowLog)

    @property
    def layout(self) -> Layout:
        """The layout that config.prompts names."""
        return layouts.load(self.prompts.layout)

    def signals(self, example: Example) -> Ids:
        """The prompt of q_phi for one user. It ends with the fixed start of the summary, which the model continues.

        Raises:
            UserError: no signals, or more than limits.signals tokens (see on_overflow).
        """
        start = self.tokenizer.encode_start(self.prompts.summary_start)

        def render(signals: Sequence[Signal]) -> Ids:
            messages = self.layout.inference_messages(
                signals, self.prompts.inference_instruction, self.prompts.pair_fields
            )
            return [*self.tokenizer.render(messages), *start]

        return render(self._fitting(example, lambda signals: len(render(signals)), "signals"))

    def raw_signals(self, example: Example) -> Told:
        """What method raw_signals tells the generator: the signals that keep every query's prompt within limits.prompt.

        Raises:
            UserError: no signals, or more than limits.prompt tokens (see on_overflow).
        """
        prompts = {query.prompt for query in example.queries}

        def told(signals: Sequence[Signal]) -> Told:
            return Told(self.layout.signals_text(signals), raw_signals=True)

        def length(signals: Sequence[Signal]) -> int:
            return max(len(self.prompt(prompt, told(signals))) for prompt in prompts)

        return told(self._fitting(example, length, "prompt"))

    def prompt(self, prompt: str, told: Told | None) -> Ids:
        """The generator's prompt x with what it is told of the user (see `Layout.generator_messages`)."""
        messages = self.layout.generator_messages(prompt, told, self.prompts.generator_instruction)
        return self.tokenizer.render(messages)

    def pair(self, query: Query, told: Told | None) -> tuple[Ids, Ids, Ids]:
        """The generator's prompt, y+ and y-. The responses have no special tokens except the end token."""
        chosen, rejected = (
            [*self.tokenizer.encode(text), self.tokenizer.end_id] for text in (query.chosen, query.rejected)
        )
        return self.prompt(query.prompt, told), chosen, rejected

    def check(self, query: Query, told: Told | None, more: int = 0) -> int:
        """The tokens of a prompt with both responses and `more` tokens still to come.

        Raises:
            UserError: a limit is exceeded, or the responses are equal as tokens and state no preference.

        Checked before a run, not during it. A summary may take a few more tokens when its text is tokenised again, and
        that should not end a run.
        """
        where = f"query {query.provenance or repr(query.prompt[:40])}"
        try:
            prefix, chosen, rejected = self.pair(query, told)
        except UserError as error:  # The chat template rewrites a response.
            raise Unfit("whose responses the chat template rewrites", f"{where}: {error}") from None
        if chosen == rejected:
            raise Unfit(
                "whose responses are the same tokens",
                f"{where}: chosen and rejected differ as text, but the tokenizer makes the same tokens of them; change"
                " one or remove the pair",
            )
        with_summary = f" with a summary of limits.summary = {more}" if more else ""
        for name, tokens, limit in (
            (f"the generator's prompt{with_summary}", len(prefix) + more, "prompt"),
            ("chosen", len(chosen), "response"),
            ("rejected", len(rejected), "response"),
        ):
            self._check(f"{where}: {name}", tokens, limit)
        return len(prefix) + more + len(chosen) + len(rejected)

    def check_prompt(self, prompt: str, told: Told | None) -> None:
        """Raises UserError if a prompt without known responses exceeds limits.prompt."""
        self._check(f"prompt {prompt[:40]!r}", len(self.prompt(prompt, told)), "prompt")

    def check_response(self, response: str) -> None:
        """Raises UserError if a response exceeds limits.response."""
        self._check(f"response {response[:40]!r}", len(self.tokenizer.encode(response)) + 1, "response")

    def _check(self, what: str, tokens: int, limit: str) -> None:
        most = getattr(self.limits, limit)
        if tokens > most:
            raise Unfit(
                f"that exceed limits.{limit}",
                f"{what} takes {tokens} tokens, but limits.{limit} is {most}; raise it or shorten the text",
            )

    def cost(self, text: str | None) -> int:
        """The tokens of a text that the generator is told."""
        return len(self.tokenizer.encode_part(text)) if text else 0

    def summary(self, example: Example) -> Ids:
        """The persona as a summary to imitate, without summary_start; UserError if it exceeds limits.summary."""
        text = example.persona.removeprefix(self.prompts.summary_start).lstrip()
        ids = [*self.tokenizer.encode(text), self.tokenizer.end_id]
        self._check(f"user {shown(example.user)}: the persona as a summary", len(ids), "summary")
        return ids

    def summary_stop(self) -> tuple[int, ...]:
        """The extra token that ends a summary, if any; UserError if prompts.summary_stop is more than one token."""
        ids = self.tokenizer.encode_part(self.prompts.summary_stop)
        if len(ids) > 1:
            raise UserError(
                f"config.prompts.summary_stop is {self.prompts.summary_stop!r}, {len(ids)} tokens of this tokenizer;"
                " use a single token"
            )
        return tuple(ids)

    def _fitting(self, example: Example, length: Callable[[Sequence[Signal]], int], limit: str) -> tuple[Signal, ...]:
        """The most recent signals that keep the prompt within the limit; UserError if even one is too long."""
        if not example.signals:
            raise Unfit("without signals", f"user {shown(example.user)} has no signals; give at least one")
        most, tokens, n_signals = getattr(self.limits, limit), length(example.signals), len(example.signals)
        if tokens <= most:
            return example.signals
        over = (
            f"user {shown(example.user)}: a prompt with {n_signals} signals takes {tokens} tokens,"
            f" but limits.{limit} is {most}"
        )
        if self.limits.on_overflow == "error":
            raise UserError(f"{over}; raise it or set limits.on_overflow to 'drop'")
        # Fewer signals take fewer tokens, so bisection finds the smallest number to drop.
        dropped = bisect.bisect_left(range(n_signals), True, lo=1, key=lambda n: length(example.signals[n:]) <= most)
        if dropped == n_signals:
            raise Unfit(
                f"that exceed limits.{limit}",
                f"{over}, which the last signal alone exceeds; raise it or shorten the signal",
            )
        self.overflow.record(example.user, f"limits.{limit}", dropped)
        return example.signals[dropped:]
