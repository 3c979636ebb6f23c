"""Whether a user's summary alone predicts the labels of the user's own signals.

A summary that tells the user's tastes does. One that says the same of everyone does not. The labels are not new to the
summary, so this is no test of how well it carries over to other prompts.
"""

from collections.abc import Sequence

import numpy as np

from popi_jax.data.encoding import Encoder, Unfit
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example, Query
from popi_jax.evaluation import stats
from popi_jax.evaluation.evaluate import Evaluator
from popi_jax.model.weights import Tree
from popi_jax.rollout.pairs import Item
from popi_jax.rollout.references import reference_item

USERS = 256  # The most users whose pairs are scored: the first ones that have any.


def measure(
    evaluator: Evaluator, theta: Tree | None, examples: Sequence[Example], texts_UxK: Sequence[Sequence[str]]
) -> dict[str, object] | None:
    """Scores the pairs among the users' signals as queries are scored: h under each of the user's own summaries.

    Of more than USERS users with pairs, the first USERS count. A pair counts even if limits.on_overflow = "drop" hid it
    from the inference model.

    Args:
        evaluator: its config says what the reference reads.
        theta: the generator.
        examples: the users.
        texts_UxK: the K summaries of each user.

    Returns:
        accuracy: the share of (pair, summary) with h > 0, so that a tie is wrong; NaN without a pair that fits.
        accuracy_ci95: its interval, which resamples users (or persons, if several users are one).
        users, signals: how many users and pairs count.
        skipped: the number of pairs that do not fit config.limits with a summary of the largest length.
        None if no user has a pair.
    """
    config, encoder = evaluator.config, evaluator.sampler.encoder
    which = config.objective.reference_context
    paired = [
        (example, texts)
        for example, texts in zip(examples, texts_UxK, strict=True)
        if any(signal.kind == "pair" for signal in example.signals)
    ][:USERS]
    if not paired:
        return None
    items: list[Item] = []
    asked: list[Item] = []
    owners: list[Example] = []  # Of each pair.
    skipped = 0
    for example, texts in paired:
        shown = encoder.raw_signals(example) if which == "signals" else None
        for query in (Query(s.prompt, s.chosen, s.rejected, s.provenance) for s in example.signals if s.kind == "pair"):
            if not _fits(encoder, query, shown):
                skipped += 1
                continue
            own = [Item(query, Told(text)) for text in texts]
            items += own
            asked += [reference_item(which, item, shown) for item in own]
            owners.append(example)
    accuracy = stats.Interval(np.nan, np.nan, np.nan)
    if items:
        if which != "summary":  # The reference of other runs reads the same.
            evaluator.references.remember(asked)
        h = (evaluator.scorer.logps(theta, items) - evaluator.references.lookup(asked)) @ (1, -1)
        correct_R = (h > 0).reshape(len(owners), -1).mean(axis=1)
        persons = [owner.person or owner.user for owner in owners]
        accuracy = stats.bootstrap_mean_ci(correct_R, persons, config.eval.bootstrap, seed=0)
    return {
        "accuracy": accuracy.mean,
        "accuracy_ci95": [accuracy.low, accuracy.high],
        "users": len({owner.user for owner in owners}),
        "signals": len(owners),
        "skipped": skipped,
    }


def _fits(encoder: Encoder, query: Query, shown: Told | None) -> bool:
    """Whether a pair fits alone, with a summary of the largest length, and with signals that the reference reads."""
    try:
        encoder.check(query, Told(encoder.prompts.summary_start), encoder.limits.summary)
        encoder.check(query, None)
        if shown is not None:
            encoder.check(query, shown)
    except Unfit:
        return False
    return True
