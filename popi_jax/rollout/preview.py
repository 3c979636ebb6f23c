"""Shows a run's first examples as the models read them: prompts, end tokens, and the part that is scored."""

import itertools
from collections.abc import Iterable

from popi_jax.config import SUMMARIZED, Config
from popi_jax.data.encoding import Encoder
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example
from popi_jax.rollout import contexts

_EXAMPLES = 2
_SUMMARY = "(the summary)"
_HEAD, _TAIL = 1500, 500  # Characters of a text that are shown.


def of_examples(config: Config, encoder: Encoder, examples: Iterable[Example]) -> str:
    """The prompts of the first examples, decoded, each with one text that is scored after it, between >>> and <<<."""
    tokenizer = encoder.tokenizer
    blocks = []
    for example in itertools.islice(examples, _EXAMPLES):
        rows = []
        told: Told | None = Told(_SUMMARY)  # Not drawn yet.
        if config.method in SUMMARIZED:
            end = tokenizer.show([tokenizer.end_id])
            rows.append(("the inference model", encoder.signals(example), f"{_SUMMARY}{end}"))
        else:
            told = contexts.told(config.method, encoder, example).told
        prompt, chosen, _ = encoder.pair(example.queries[0], told)
        rows.append(("the generator, with the preferred response", prompt, tokenizer.show(chosen)))
        blocks += [
            f"--- user {example.user!r}: {reader}\n{_shown(tokenizer.show(ids))}>>>{_shown(scored)}<<<"
            for reader, ids, scored in rows
        ]
    note = f"first examples (>>>scored<<<; dates in the chat template are fixed at {tokenizer.date}):"
    return "\n".join([note, *blocks])


def _shown(text: str) -> str:
    """Shortens a long text in the middle, and escapes characters that a terminal would obey."""
    left_out = len(text) - _HEAD - _TAIL
    if left_out > 0:
        text = f"{text[:_HEAD]}[... {left_out} characters ...]{text[-_TAIL:]}"
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
