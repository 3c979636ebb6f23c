"""Whether a summary names its user's preference: how much likelier it makes the user's persona than another one.

The untrained model reads the summary and scores personas as answers. What it finds likely anyway is taken off, so a
persona counts by how much likelier the summary makes it. Shape letters: docs/architecture.md.
"""

from collections.abc import Sequence

import numpy as np

from popi_jax.data.encoding import Unfit
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example, Query
from popi_jax.evaluation import stats
from popi_jax.evaluation.evaluate import Evaluator
from popi_jax.rollout.pairs import Item

USERS = 128  # The most users who are counted: the first ones with a persona that fits.
OTHERS = 4  # Other personas that a user's own is compared with, at most.
PROMPT = "Describe this user in one short sentence."


def measure(
    evaluator: Evaluator, examples: Sequence[Example], texts_UxK: Sequence[Sequence[str]]
) -> dict[str, object] | None:
    """Compares each user's persona with those of OTHERS other test users under the user's first summary.

    Args:
        evaluator: its scorer has the untrained model.
        examples: the users.
        texts_UxK: the K summaries of each user.

    Returns:
        share: of (user, other persona), how often the summary makes the user's own persona likelier by a larger factor.
            It is 1/2 for summaries that say nothing of the user.
        share_ci95: its interval, which resamples users.
        nats: the mean over users of log p(own persona | summary) - log p(own persona | nothing).
        users: how many count.
        None if fewer than two personas fit config.limits.
    """
    personas = list(dict.fromkeys(example.persona for example in examples if example.persona))
    rng = np.random.default_rng(0)
    pairs: list[tuple[int, Query, Told]] = []
    users = 0
    for example, texts in zip(examples, texts_UxK, strict=True):
        others = [persona for persona in personas if persona != example.persona]
        if users == USERS or not example.persona or not others:
            continue
        drawn = rng.choice(len(others), min(OTHERS, len(others)), replace=False)
        queries = [Query(PROMPT, example.persona, others[i]) for i in drawn]
        if all(_fits(evaluator, query) for query in queries):
            pairs += [(users, query, Told(texts[0])) for query in queries]
            users += 1
    if not pairs:
        return None
    score = evaluator.scorer.logps
    gain_Rx2 = score(None, [Item(query, told) for _, query, told in pairs])
    gain_Rx2 = gain_Rx2 - score(None, [Item(query, None) for _, query, _ in pairs])
    wins_R = (gain_Rx2[:, 0] > gain_Rx2[:, 1]).astype(float)
    share = stats.bootstrap_mean_ci(wins_R, [str(user) for user, *_ in pairs], evaluator.config.eval.bootstrap, seed=0)
    return {
        "share": share.mean,
        "share_ci95": [share.low, share.high],
        "nats": float(gain_Rx2[:, 0].mean()),
        "users": users,
    }


def _fits(evaluator: Evaluator, query: Query) -> bool:
    encoder = evaluator.sampler.encoder
    try:
        encoder.check(query, Told(encoder.prompts.summary_start), encoder.limits.summary)
        encoder.check(query, None)
    except Unfit:
        return False
    return True
