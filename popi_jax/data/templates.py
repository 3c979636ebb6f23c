"""What the two models are shown: signals and queries as chat messages, before a tokenizer's chat template.

Each conversation is a single user turn, so that every chat template renders it and no system turn of ours displaces a
checkpoint's own. The part that a user's queries share comes first, the query's prompt last.
"""

from collections.abc import Sequence

from popi_jax.data.schema import Signal

Messages = list[dict[str, str]]


def _user_turn(content: str) -> Messages:
    return [{"role": "user", "content": content}]


def _signal_text(signal: Signal, rejected: bool) -> str:
    if signal.kind == "pair":
        text = f"Prompt: {signal.prompt}\nPreferred: {signal.chosen}"
        return f"{text}\nRejected: {signal.rejected}" if rejected else text
    if signal.kind == "comment":
        return f"Prompt: {signal.prompt}\nThe user wrote: {signal.text}"
    return f"About the user: {signal.text}"


def signals_text(signals: Sequence[Signal], rejected: bool = True) -> str:
    """Lays signals out as numbered blocks, in their order: what q_phi reads, and the context of raw_signals.

    Args:
        signals: of one user.
        rejected: whether pairs show the rejected response too.
    """
    return "\n\n".join(
        f"### Example {i}\n{_signal_text(signal, rejected)}" for i, signal in enumerate(signals, start=1)
    )


def inference_messages(signals: Sequence[Signal], instruction: str, rejected: bool = True) -> Messages:
    """Asks q_phi for a summary z of the signals s (POPI section 1): `signals_text`, then `instruction`."""
    return _user_turn(f"{signals_text(signals, rejected)}\n\n{instruction}")


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
