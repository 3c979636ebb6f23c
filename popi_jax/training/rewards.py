"""What a summary is rewarded for besides the user's queries, and the level that rewards are measured from.

`more` is computed on the host, before the step, and reaches it as InferenceBatch.more_reward_UxK.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np

from popi_jax.config import Config
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.model.weights import Tree
from popi_jax.rollout.pairs import Item, PairScorer
from popi_jax.rollout.references import References, reference_item
from popi_jax.rollout.text import Drawn
from popi_jax.training import objective
from popi_jax.training.rng import STREAMS

COPIED = 3  # Words. A shorter run may be in a user's signals by chance.


def withhold(example: Example, count: int, seed: int, step: int, place: int) -> Example:
    """Returns the example with up to `count` of its pairs as queries instead of signals, drawn anew for each step.

    One signal always stays. A summary is so rewarded for what it says of the user, who would choose alike elsewhere.
    """
    pairs = [i for i, signal in enumerate(example.signals) if signal.kind == "pair"]
    count = min(count, len(pairs), len(example.signals) - 1)
    if count < 1:
        return example
    rng = np.random.default_rng((seed, STREAMS.index("withhold"), step, place))
    taken = {pairs[i] for i in rng.choice(len(pairs), count, replace=False)}
    asked = [Query(s.prompt, s.chosen, s.rejected, s.provenance) for s in (example.signals[i] for i in sorted(taken))]
    signals = tuple(signal for i, signal in enumerate(example.signals) if i not in taken)
    return dataclasses.replace(example, signals=signals, queries=(*example.queries, *asked))


def more(
    config: Config, scorer: PairScorer, references: References, theta: Tree, examples: Sequence[Example], drawn: Drawn
) -> np.ndarray:
    """Returns what is added to each summary's reward, [U, K], in nats / beta; see configs/base.py.

    With objective.relative_reward, it is the loss of a generator that is told nothing, averaged over the user's
    queries. Then the penalties are subtracted.

    Args:
        config: the run's settings.
        scorer: scores pairs with theta.
        references: holds log pi_ref.
        theta: the generator's adapter or weights.
        examples: the step's users with the step's queries.
        drawn: their summaries.
    """
    own = config.objective
    lengths_UxK = np.asarray(drawn.samples.length_BxN[: len(examples)], np.float32)
    more_UxK = np.zeros_like(lengths_UxK)
    if own.relative_reward:
        more_UxK += _untold_loss(config, scorer, references, theta, examples)[:, None]
    if own.length_penalty:
        more_UxK -= own.length_penalty * lengths_UxK
    if own.copy_penalty:
        shares = [
            [copied_share(text, example.signals) for text in texts]
            for example, texts in zip(examples, drawn.texts_UxK, strict=True)
        ]
        more_UxK -= own.copy_penalty * np.array(shares, np.float32)
    return more_UxK


def _untold_loss(
    config: Config, scorer: PairScorer, references: References, theta: Tree, examples: Sequence[Example]
) -> np.ndarray:
    """Returns the mean over each user's queries of l(h(x, nothing)), [U]; 0 without queries."""
    which, encoder = config.objective.reference_context, scorer.packer.encoder
    items, asked = [], []
    for example in examples:
        shown = encoder.raw_signals(example) if which == "signals" and example.queries else None
        own = [Item(query, None) for query in example.queries]
        items += own
        asked += [reference_item(which, item, shown) for item in own]
    if not items:
        return np.zeros(len(examples), np.float32)
    h = (scorer.logps(theta, items) - references.lookup(asked)) @ (1, -1)
    loss = np.asarray(objective.preference_loss(config.objective.loss)(jnp.asarray(h), config.objective.beta))
    parts = np.split(loss, np.cumsum([len(example.queries) for example in examples])[:-1])
    return np.array([part.mean() if len(part) else 0.0 for part in parts], np.float32)


def copied_share(text: str, signals: Iterable[Signal]) -> float:
    """Returns the share of a summary's words that are in runs of COPIED or more words of one field of a signal."""
    words = _words(text)
    known = {run for s in signals for field in (s.prompt, s.chosen, s.rejected, s.text) for run in _runs(_words(field))}
    copied = np.zeros(len(words), bool)
    for i, run in enumerate(_runs(words)):
        copied[i : i + COPIED] |= run in known
    return float(copied.mean()) if words else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _runs(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + COPIED]) for i in range(len(words) - COPIED + 1)]
