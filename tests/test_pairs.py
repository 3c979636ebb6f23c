"""Pairs that are scored together: what their prompts have in common is read once, and nothing else changes."""

import numpy as np

from configs import quickstart
from popi_jax.data.schema import Query
from popi_jax.modes import setup as system_lib
from popi_jax.rollout import pairs
from popi_jax.rollout.pairs import Item


def test_a_users_queries_read_once_what_is_told_of_the_user():
    config = quickstart.get_config("runlocal")
    config.limits.prompt, config.limits.bin = 256, 256
    system = system_lib.load(config)
    told = "I like short answers about the sea and dislike long ones about the land. " * 3
    questions = ["What is a tide?", "Who lives there?", "Why is it blue?"]
    items = [Item(Query(prompt=q, chosen="Salt water.", rejected="Sand."), told) for q in questions]
    packed = pairs.pack_pairs(system, items)
    rows = [pairs.pair_row(system, item) for item in items]
    once, each = int(packed.token_count), sum(row.tokens for row in rows)
    assert once < each - 1.5 * len(system.tokenizer.encode(told))
    alone = np.concatenate([pairs.pair_logps(system, None, [item], 1) for item in items])
    np.testing.assert_allclose(pairs.pair_logps(system, None, items, 3), alone, rtol=1e-5, atol=1e-4)


def test_micro_batches_share_out_the_bins_of_all_rows():
    config = quickstart.get_config("runlocal")
    config.train.accumulation_generator, config.limits.bin = 3, 64
    system = system_lib.load(config)
    items = [Item(Query(prompt=f"Why {n}?", chosen="Yes.", rejected="No."), None) for n in range(5)]
    packed = pairs.pack_pairs(system, [*items, items[0], None])
    lengths_AxR = packed.length_RxN.sum(axis=-1)
    # Each row has its lengths in one micro-batch, the sixth where the first has them, the padding nowhere.
    assert (lengths_AxR > 0).sum(axis=0).tolist() == [1] * 6 + [0]
    assert (lengths_AxR[:, 5] == lengths_AxR[:, 0]).all()
    few = pairs.pack_pairs(system, items[:2], least_bins=48)
    assert few.tokens_CxL.shape[:2] == (3, 16)  # A multiple of the 8 devices.
