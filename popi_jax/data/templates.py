"""Lays signals and queries out as chat messages, before a tokenizer's chat template is applied.

Each conversation is a single user turn, so every chat template can render it, and no system turn replaces the
checkpoint's own. The part that a user's queries share comes first and the query's prompt last.
"""

from collections.abc import Sequence

from popi_jax.data.schema import Signal

Messages = list[dict[str, str]]

# The fields of a pair that can be shown, in text order.
PAIR_LABELS = {"prompt": "Prompt: ", "chosen": "Preferred: ", "rejected": "Rejected: "}


def _user_turn(content: str) -> Messages:
    return [{"role": "user", "content": content}]


def _signal_text(signal: Signal, pair_fields: Sequence[str]) -> str:
    if signal.kind == "pair":
        if tuple(pair_fields) == ("chosen",):  # A lone field needs no label.
            return signal.chosen
        return "\n".join(
            f"{label}{getattr(signal, name)}" for name, label in PAIR_LABELS.items() if name in pair_fields
        )
    if signal.kind == "comment":
        return f"Prompt: {signal.prompt}\nThe user wrote: {signal.text}"
    return f"About the user: {signal.text}"


def signals_text(signals: Sequence[Signal], pair_fields: Sequence[str] = tuple(PAIR_LABELS)) -> str:
    """Lays signals out as numbered blocks, in order. q_phi reads this text, and method raw_signals uses it as context.

    Args:
        signals: of one user.
        pair_fields: which of a pair's prompt, chosen and rejected are shown.
    """
    return "\n\n".join(
        f"### Example {i}\n{_signal_text(signal, pair_fields)}" for i, signal in enumerate(signals, start=1)
    )


def inference_messages(
    signals: Sequence[Signal], instruction: str, pair_fields: Sequence[str] = tuple(PAIR_LABELS)
) -> Messages:
    """The request to q_phi for a summary z of the signals s (POPI section 1): `signals_text`, then `instruction`."""
    return _user_turn(f"{signals_text(signals, pair_fields)}\n\n{instruction}")


def generator_messages(prompt: str, context: str | None, instruction: str) -> Messages:
    """The request to pi_theta for a response to `prompt`.

    Args:
        prompt: the query's x.
        context: text about the user: a summary, a persona or `signals_text(signals)`. None gives the bare prompt
            without `instruction`, which the reference pi_ref (POPI section 2) and methods base and population read.
        instruction: how to use the context.
    """
    if context is None:
        return _user_turn(prompt)
    return _user_turn(f"About the user:\n{context.strip()}\n\n{instruction}\n\nPrompt: {prompt}")
