"""Padded lines and bins keep their contents, and bins score the same as separate rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.data import packing
from popi_jax.data.shapes import abstract_bins
from popi_jax.training import scoring
from tests import tiny

BUCKETS = (4, 8, 16)


@pytest.mark.parametrize(("length", "expected"), [(0, 4), (4, 4), (5, 8), (16, 16)])
@pytest.mark.parametrize("buckets", [BUCKETS, BUCKETS[::-1]])
def test_bucket_is_the_smallest_that_fits(length: int, expected: int, buckets: tuple[int, ...]) -> None:
    assert packing.bucket(length, buckets) == expected


@pytest.mark.parametrize(("length", "expected"), [(1025, 1152), (1152, 1152), (2049, 2176)])
def test_lengths_beyond_the_largest_bucket_round_up_in_eighths_of_it(length: int, expected: int) -> None:
    assert packing.bucket(length, (96, 1024, 512)) == expected
    assert packing.bucket(17, BUCKETS) == 18


@pytest.mark.parametrize(("length", "expected"), [(1, 1), (7, 7), (9, 10), (65, 80), (128, 128), (130, 160)])
def test_without_buckets_lengths_round_up_in_eighths_of_the_next_power_of_two(length: int, expected: int) -> None:
    assert packing.bucket(length, ()) == expected


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_chosen_buckets_minimise_padding(most: int) -> None:
    lengths = np.random.default_rng(most).integers(1, 60, 12).tolist()

    def padding(buckets: tuple[int, ...]) -> int:
        return sum(packing.bucket(length, buckets) - length for length in lengths)

    got = packing.choose_buckets(lengths, most, step=4)
    assert list(got) == sorted(set(got)) and len(got) <= most and all(size % 4 == 0 for size in got)
    sizes = range(4, 64, 4)
    possible = [
        b for n in range(1, min(most, 4) + 1) for b in itertools.combinations(sizes, n) if b[-1] >= max(lengths)
    ]
    assert padding(got) <= min(map(padding, possible))


def test_no_lengths_give_no_buckets() -> None:
    assert packing.choose_buckets([], 8) == ()


def test_prompts_are_padded_on_the_right() -> None:
    ids_BxT, length_B = packing.pad_rows([[7, 8, 9], [5] * 5], (3, 8), pad_id=99)
    _ = 99
    np.testing.assert_array_equal(ids_BxT, [[7, 8, 9, _, _, _, _, _], [5, 5, 5, 5, 5, _, _, _], [_] * 8])
    np.testing.assert_array_equal(length_B, [3, 5, 0])
    assert ids_BxT.dtype == length_B.dtype == np.int32
    with pytest.raises(ValueError, match="2 prompts do not fit into 1 rows"):
        packing.pad_rows([[1], [2]], (1, 8), 0)


def test_fill_bins_is_first_fit_decreasing() -> None:
    assert packing.fill_bins([3, 0, 7, 5, 2, 10], 10) == [[5], [2, 0], [3, 4]]
    assert packing.fill_bins([], 10) == [] == packing.fill_bins([0], 10)


def test_pack_bins_by_hand() -> None:
    rows = [packing.Row([7, 8], [[1, 2], [3]]), packing.Row([], [[], []]), packing.Row([9], [[4], [5, 6]])]
    own = packing.plant(rows, [[0], [2]], 11)
    batch = packing.pack_bins(rows, [own], abstract_bins(3, 2, 11, shards=2, scored=7), pad_id=0)
    assert batch.tokens_CxL[0].tolist() == [7, 8, 1, 2, 3, 9, 4, 5, 6, 0, 0]
    assert batch.positions_CxL[0].tolist() == [0, 1, 2, 3, 2, 0, 1, 1, 2, 0, 0]
    assert batch.segments_CxL[0].tolist() == [0, 0, 1, 1, 2, 1024, 1025, 1026, 1026, -1, -1]
    assert batch.predictor_ShxW[0].tolist() == [1, 2, 1, 5, 5, 7, 0]
    assert batch.target_ShxW[0].tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert batch.branch_ShxW[0].tolist() == [0, 0, 1, 4, 5, 5, 6]
    assert (batch.segments_CxL[1] == -1).all() and (batch.branch_ShxW[1] == 6).all()
    assert batch.length_RxN.tolist() == [[2, 1], [0, 0], [1, 2]] and batch.first_R.tolist() == [0, 1, 2]
    assert int(batch.token_count) == 9


def test_bins_of_a_shard_share_their_scored_positions() -> None:
    rows = [packing.Row([7, 8], [[1, 2], [3]]), packing.Row([9], [[4], [5, 6]]), packing.Row([6], [[2], [2]])]
    shape = abstract_bins(3, n_bins=4, length=6, shards=2, scored=6)
    bins = [[tree] for tree in packing.plant(rows, [[0], [1], [2]], 6)]
    batch = packing.pack_bins(rows, bins, shape, pad_id=0)
    assert batch.predictor_ShxW.tolist() == [[1, 2, 1, 6, 6, 8], [0, 0, 0, 0, 0, 0]]
    assert batch.target_ShxW.tolist() == [[1, 2, 3, 4, 5, 6], [2, 2, 0, 0, 0, 0]]
    assert batch.branch_ShxW.tolist() == [[0, 0, 1, 2, 3, 3], [4, 5, 6, 6, 6, 6]]


def test_a_tree_by_hand() -> None:
    rows = [packing.Row([7, 8, 9], [[1, 2], [3]]), packing.Row([7, 8], [[4], [5, 6]])]
    (tree,) = packing.plant(rows, [[0, 1]], 12)
    assert tree.start == [7, 8] and tree.tokens == 10 and tree.scored_tokens == 6
    batch = packing.pack_bins(rows, [[tree]], abstract_bins(2, 1, 11, shards=1, scored=7), pad_id=0)
    assert batch.tokens_CxL[0].tolist() == [7, 8, 9, 1, 2, 9, 3, 4, 5, 6, 0]
    assert batch.positions_CxL[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 2, 2, 3, 0]
    assert batch.segments_CxL[0].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 4, 4, -1]
    assert batch.predictor_ShxW[0].tolist() == [2, 3, 5, 1, 1, 8, 0]
    assert batch.target_ShxW[0].tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert batch.branch_ShxW[0].tolist() == [0, 0, 1, 2, 3, 3, 4]


def test_starts_are_shared_if_that_leaves_less_to_read() -> None:
    long, short = list(range(9)), [50]
    rows = [packing.Row([*start, 60 + i, 70 + i, 71], [[1], [2]]) for i, start in enumerate([long] * 3 + [short] * 3)]
    starts = [len(tree.start) for tree in packing.plant(rows, [[0, 1, 2], [3, 4, 5]], 30)]
    # Two long rows: 9 + 2 * 2 * (3 + 1) = 25 tokens, within 30, against 2 * 14. Short rows: 1 + 3 * 8 > 3 * 6.
    assert starts == [9, 12, 4, 4, 4]
    assert [len(tree.start) for tree in packing.plant(rows, [[0, 1, 2]], 33)] == [9]


def test_rows_with_a_shared_start_score_the_same_as_alone() -> None:
    policy = tiny.policy(tiny.LORA)
    base = tiny.perturbed(policy.init_base(jax.random.key(0)), 1, 0.05)
    delta = tiny.perturbed(policy.init_delta(base, jax.random.key(2)), 3)
    lines = tiny.rows(np.random.default_rng(0), 6, 2, 12, 4, least=10)
    lines.prefix_BxT[:3, :9], lines.prefix_BxT[3:, :10] = lines.prefix_BxT[0, :9], lines.prefix_BxT[3, :10]
    weight = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
    shared, alone = (tiny.packed(lines, length=48, groups_of=size) for size in (3, 1))
    assert int(shared.token_count) < 0.8 * int(alone.token_count)

    def by_line(delta):
        total = scoring.score(policy.bind(base, delta), lines).logp_BxNxS.sum(-1)
        return jnp.sum(weight * total), total

    def by_tree(delta):
        total = scoring.score_packed(policy.bind(base, delta), shared)
        return jnp.sum(weight * total), total

    (_, expected), expected_grad = jax.jit(jax.value_and_grad(by_line, has_aux=True))(delta)
    (_, total), grad = jax.jit(jax.value_and_grad(by_tree, has_aux=True))(delta)
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5), grad, expected_grad)


@pytest.mark.parametrize(("length", "shards"), [(12, 1), (40, 1), (12, 3)])
def test_bins_score_the_same_as_lines(length: int, shards: int) -> None:
    policy = tiny.policy(tiny.LORA)
    base = tiny.perturbed(policy.init_base(jax.random.key(0)), 1, 0.05)
    delta = tiny.perturbed(policy.init_delta(base, jax.random.key(2)), 3)
    lines = tiny.rows(np.random.default_rng(0), 7, 2, 4, 4)
    lines.prefix_length_B[3] = lines.branch_length_BxN[3] = 0
    for values in (lines.prefix_BxT, lines.prefix_length_B, lines.branches_BxNxS, lines.branch_length_BxN):
        values[5] = values[2]
    packed = tiny.packed(lines, length=length, n_bins=6, shards=shards)
    assert packed.first_R.tolist() == [0, 1, 2, 3, 4, 2, 6] and not (np.asarray(packed.branch_ShxW) // 2 == 5).any()
    weight = np.random.default_rng(1).normal(size=(7, 2)).astype(np.float32)

    def by_line(delta):
        total = scoring.score(policy.bind(base, delta), lines).logp_BxNxS.sum(-1)
        return jnp.sum(weight * total), total

    def by_bin(delta):
        total = scoring.score_packed(policy.bind(base, delta), packed, chunk=5)
        return jnp.sum(weight * total), total

    (_, expected), expected_grad = jax.jit(jax.value_and_grad(by_line, has_aux=True))(delta)
    (_, total), grad = jax.jit(jax.value_and_grad(by_bin, has_aux=True))(delta)
    np.testing.assert_allclose(total, expected, atol=1e-4)
    assert (np.asarray(total)[3] == 0).all()
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=5e-5, rtol=5e-4), grad, expected_grad)


def test_coarse_counts_are_few_and_add_less_than_a_quarter():
    counts = [packing.coarse(n) for n in range(1, 129)]
    assert all(n <= size < 1.25 * n for n, size in enumerate(counts, start=1))
    assert sorted(set(counts)) == [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128]
