"""Shapes of programs: at the limits worked by hand, and rounded so that they stay few."""

import jax
import numpy as np
import pytest

from popi_jax.config import Config, changed, parse
from popi_jax.configs import quickstart
from popi_jax.data.batch import GeneratorBatch
from popi_jax.data.shapes import Bins, Measured, Shapes, abstract_bins, shardings_of
from popi_jax.model import sharding


def shapes(devices: int = 1, buckets: tuple[int, ...] = (32, 48, 96), **values: object) -> Shapes:
    """Shapes for the quickstart's config with these keys changed; "__" stands for the dot in a key."""
    config: Config = changed(
        parse(quickstart.get_config("runlocal")), {key.replace("__", "."): value for key, value in values.items()}
    )
    return Shapes(config, sharding.make_mesh(devices, 1, 1), buckets)


@pytest.mark.parametrize(
    ("lengths", "length"),
    [
        ([30] * 13, 64),  # Two rows per bin: 448 positions. Bins of 32 would need 416, not much less.
        ([40] * 4, 48),  # One row in a bin of 64 leaves a third of it empty.
        ([40, 70], 96),  # One row is longer than limits.bin.
    ],
)
def test_bins_use_a_bucket_that_needs_far_less_padding(lengths, length):
    assert shapes(limits__bin=64).bin_length(lengths) == length


def sizes(tree) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def test_a_step_at_its_limits_by_hand():
    limits = {"limits__bin": 200, "limits__prompt": 60, "limits__response": 20, "limits__signals": 90}
    own = shapes(2, **limits, limits__summary=7, train__users_per_step=3, sampling__k=4, sampling__k_generator=2)
    step = own.step("joint")
    # Rows of 60 + 2 * 20 tokens, two per bin: 4 users (3 rounded up for 2 devices) * 4 summaries * 2 queries = 32 rows.
    assert sizes(step.generator.bins) == sizes(abstract_bins(32, 16, 200, shards=2, scored=800, stack=(1,)))
    assert sizes(step.learned.bins) == sizes(abstract_bins(16, 8, 200, shards=2, scored=400, stack=(1,)))
    assert step.generator.ref_logp_Rx2.shape == (1, 32, 2)
    assert step.inference.lines.prefix_BxT.shape == (1, 4, 96)
    assert step.inference.lines.branches_BxNxS.shape == step.inference.sampler_logp_UxKxS.shape == (1, 4, 4, 7)
    assert own.step("generator").inference is None and own.step("generator").generator.weight_R.shape == (1, 16)
    assert own.step("inference").learned is None


def test_measured_bins_round_to_few_shapes():
    own = shapes(2, train__accumulation_generator=2)
    bins = Bins(64, [10] * 17 + [40])
    pair = own.step("generator", Measured(bins)).generator.bins
    # 9 bins per micro-batch become 10 in two shards. The fullest shard has 4 bins of 10 scored tokens and one of 40.
    assert (pair.tokens_CxL.shape, pair.target_ShxW.shape) == ((2, 10, 64), (2, 2, 80))
    fewer = own.step("joint", Measured(bins, 40, 9, Bins(64, [10])))
    # Its share of the bins, rounded up to an even number.
    n_bins = fewer.generator.bins.tokens_CxL.shape[1]
    assert fewer.learned.bins.tokens_CxL.shape[1] == 2 * -(-n_bins // (2 * own.config.sampling.k))


def test_every_array_of_a_batch_has_a_sharding():
    own = shapes(4)
    abstract = own.step("joint")
    placed = shardings_of(abstract)
    assert jax.tree.structure(abstract) == jax.tree.structure(placed)
    split, everywhere = sharding.stack_sharding(own.mesh), sharding.replicated(own.mesh)
    assert placed.inference.lines.prefix_BxT == placed.generator.bins.tokens_CxL == split
    assert placed.generator.weight_R == placed.generator.bins.first_R == everywhere
    assert isinstance(placed.learned, GeneratorBatch)
    assert all(leaf.dtype in (np.int32, np.float32) for leaf in jax.tree.leaves(abstract))
