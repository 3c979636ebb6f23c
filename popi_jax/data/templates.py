"""What the two models are shown: signals and queries as chat messages, before a tokenizer's chat template.

Each conversation is a single user turn, so that every chat template renders it and no system turn of ours displaces a
checkpoint's own. The part that a user's queries share comes first, the query's prompt last.
"""

from collections.abc import Sequence

from popi_jax.data.schema import Signal

Messages = list[dict[str, str]]

# The fields of a pair that can be shown, in the order of the text.
PAIR_LABELS = {"prompt": "Prompt: ", "chosen": "Preferred: ", "rejected": "Rejected: "}


def _user_turn(content: str) -> Messages:
    return [{"role": "user", "content": content}]


def _signal_text(signal: Signal, pair_fields: Sequence[str]) -> str:
    if signal.kind == "pair":
        if tuple(pair_fields) == ("chosen",):  # Nothing to tell it from.
            return signal.chosen
        return "\n".join(
            f"{label}{getattr(signal, name)}" for name, label in PAIR_LABELS.items() if name in pair_fields
        )
    if signal.kind == "comment":
        return f"Prompt: {signal.prompt}\nThe user wrote: {signal.text}"
    return f"About the user: {signal.text}"


def signals_text(signals: Sequence[Signal], pair_fields: Sequence[str] = tuple(PAIR_LABELS)) -> str:
    """Lays signals out as numbered blocks, in their order: what q_phi reads, and the context of raw_signals.

    Args:
        signals: of one user.
        pair_fields: what is shown of a pair, of prompt, chosen and rejected.
    """
    return "\n\n".join(
        f"### Example {i}\n{_signal_text(signal, pair_fields)}" for i, signal in enumerate(signals, start=1)
    )


def inference_messages(
    signals: Sequence[Signal], instruction: str, pair_fields: Sequence[str] = tuple(PAIR_LABELS)
) -> Messages:
    """Asks q_phi for a summary z of the signals s (POPI section 1): `signals_text`, then `instruction`."""
    return _user_turn(f"{signals_text(signals, pair_fields)}\n\n{instruction}")


def generator_messages(prompt: str, context: str | None, instruction: str) -> Messages:
    """Asks pi_theta for a response to `prompt`.

    Args:
        prompt: the query's x.
        context: what the generator is told of the user: a summary, a persona text or `signals_text(signals)`. None
            gives the bare prompt without `instruction`: what the reference pi_ref sees (POPI section 2), and what
            base and population are given.
        instruction: how to use the context.
    """
    if context is None:
        return _user_turn(prompt)
    return _user_turn(f"About the user:\n{context.strip()}\n\n{instruction}\n\nPrompt: {prompt}")
