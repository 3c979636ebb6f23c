"""The one type that every train step reads, and the two layouts of token rows in it.

A row is one prefix with N branches (y+ and y- under a prompt; K summaries under a user's signals). A PrefixBatch has a
line [prefix | branch 1 | ... | branch N] per row, each part padded: the sampler's own layout, scored token by token. A
PackedBatch has rows of all lengths one after another in bins of one length: made on the host, with little padding and
nearly always of one shape, for responses, whose summed log-probability is wanted.

Shapes: B lines, T prefix length, N branches, S branch length; R rows in C bins of L tokens, in G groups of W scored
tokens at most; U users, K summaries per user. In a Batch every array has one more axis in front, A, which counts the
micro-batches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixBatch:
    """Right-padded token ids, int32. A row of length 0 is padding."""

    prefix_BxT: Array
    prefix_length_B: Array
    branches_BxNxS: Array
    branch_length_BxN: Array

    @property
    def valid_B(self) -> jax.Array:
        """True at the rows that are not padding."""
        return jnp.asarray(self.prefix_length_B) > 0

    @property
    def mask_BxNxS(self) -> jax.Array:
        """True at the branches' real tokens."""
        return jnp.arange(self.branches_BxNxS.shape[-1])[None, None, :] < self.branch_length_BxN[:, :, None]

    @property
    def token_count(self) -> jax.Array:
        """How many tokens are not padding."""
        return jnp.sum(self.prefix_length_B) + jnp.sum(self.branch_length_BxN)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Rows in bins, int32; `packing.pack_bins` makes it.

    Attributes:
        tokens_CxL: token ids.
        positions_CxL: rope positions: each row's start at 0, each branch's where its prefix ended.
        segments_CxL: see attention.attend.
        predictor_GxW: of each branch token, where the token lies whose hidden state predicts it: bin * L + place, the
            bins counted from the group's first. A group is C / G bins that lie side by side on one device.
        target_GxW: that branch token.
        branch_GxW: which branch of which row it belongs to, row * N + branch; R * N where there is none.
        length_RxN: tokens of each branch. A row of empty branches is padding, or in the bins of another micro-batch.
        first_R: whose scores are this row's: its own, or of the equal row that was packed in its stead.
    """

    tokens_CxL: Array
    positions_CxL: Array
    segments_CxL: Array
    predictor_GxW: Array
    target_GxW: Array
    branch_GxW: Array
    length_RxN: Array
    first_R: Array

    @property
    def token_count(self) -> jax.Array:
        """How many tokens are not padding; those of equal rows count once."""
        return jnp.sum(jnp.asarray(self.segments_CxL) >= 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InferenceBatch:
    """Users' signals with K sampled summaries each.

    Attributes:
        lines: one line per user; a user that is padding has prefix length 0.
        sampler_logp_UxKxS: log-probability of each summary token as it was drawn, in nats.
    """

    lines: PrefixBatch
    sampler_logp_UxKxS: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GeneratorBatch:
    """Prompts with y+ and y-, in this order: rows (user, summary, query), user-major, R = U * K * M.

    Attributes:
        bins: the rows, packed.
        ref_logp_Rx2: log pi_ref of both responses in nats, reduced as objective.logp_reduction says.
        weight_R: M over the number of the user's queries in this batch; 0 at padding and at rows of other
            micro-batches. A user with fewer than M queries counts as much as the others, for both models (the mean
            over m in POPI section 3).
    """

    bins: PackedBatch
    ref_logp_Rx2: Array
    weight_R: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Everything one train step reads, as stacks of micro-batches; `shapes.Shapes.step` gives its shapes.

    Attributes:
        generator: rows that give the losses, and with them the rewards.
        inference: the sampled summaries; None in a generator step.
        learned: rows that theta learns from in a joint step, where those are not all rows of `generator`; else None.
    """

    generator: GeneratorBatch
    inference: InferenceBatch | None = None
    learned: GeneratorBatch | None = None

    @property
    def token_count(self) -> jax.Array:
        """How many tokens are scored, each once; padding and `learned`, whose rows are in `generator`, left out."""
        count = self.generator.bins.token_count
        return count if self.inference is None else count + self.inference.lines.token_count
