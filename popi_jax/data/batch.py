"""The Batch that every train step reads, and its two layouts of token rows.

A row is one prefix with N branches (y+ and y- after a prompt; K summaries after a user's signals). A PrefixBatch holds
one padded line [prefix | branch 1 | ... | branch N] per row. This is the sampler's layout, and it is scored token by
token. A PackedBatch holds rows of all lengths, back to back in bins of one length. It is built on the host, has little
padding and nearly always the same shape. It holds responses, for which only summed log-probabilities are needed.

Every array of a Batch has a leading axis A, the micro-batches. Shape letters: docs/architecture.md.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixBatch:
    """Right-padded token ids and their lengths, int32. A row of length 0 is padding."""

    prefix_BxT: Array
    prefix_length_B: Array
    branches_BxNxS: Array
    branch_length_BxN: Array

    @property
    def valid_B(self) -> jax.Array:
        """True for rows that are not padding."""
        return jnp.asarray(self.prefix_length_B) > 0

    @property
    def mask_BxNxS(self) -> jax.Array:
        """True for the branches' real tokens."""
        return jnp.arange(self.branches_BxNxS.shape[-1])[None, None, :] < self.branch_length_BxN[:, :, None]

    @property
    def token_count(self) -> jax.Array:
        """The number of tokens that are not padding."""
        return jnp.sum(self.prefix_length_B) + jnp.sum(self.branch_length_BxN)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Rows packed into bins by `packing.pack_bins`, int32.

    Attributes:
        tokens_CxL: token ids.
        positions_CxL: rope positions. A row starts at 0; each branch continues from the end of its prefix.
        segments_CxL: see attention.attend.
        predictor_ShxW: for each branch token, the index of the token whose hidden state predicts it: bin * L + offset,
            counting bins from the shard's first. A shard is C / Sh consecutive bins on one device.
        target_ShxW: the branch token itself.
        branch_ShxW: the branch that the token belongs to, row * N + branch; R * N marks an unused slot.
        length_RxN: tokens in each branch. A row with empty branches is padding, or is in another micro-batch's bins.
        first_R: the row that holds this row's scores: itself, or an equal row that was packed in its place.
    """

    tokens_CxL: Array
    positions_CxL: Array
    segments_CxL: Array
    predictor_ShxW: Array
    target_ShxW: Array
    branch_ShxW: Array
    length_RxN: Array
    first_R: Array

    @property
    def token_count(self) -> jax.Array:
        """The number of tokens that are not padding. Equal rows count once."""
        return jnp.sum(jnp.asarray(self.segments_CxL) >= 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InferenceBatch:
    """Users' signals with K sampled summaries each.

    Attributes:
        lines: one line per user. A padding user has prefix length 0.
        sampler_logp_UxKxS: log-probability of each summary token when it was drawn, in nats.
        more_reward_UxK: added to the reward that the queries give, in nats / beta; see `rewards.more`.
    """

    lines: PrefixBatch
    sampler_logp_UxKxS: Array
    more_reward_UxK: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GeneratorBatch:
    """Prompts with y+ and y-, in that order. Rows are (user, summary, query), user-major, R = U * K * M.

    Attributes:
        bins: the packed rows.
        ref_logp_Rx2: log pi_ref of both responses in nats, reduced as objective.logp_reduction says.
        weight_R: M divided by the number of the user's queries in this batch; 0 for padding and for rows of other
            micro-batches. A user with fewer than M queries thus weighs as much as any other, for both models (the mean
            over m in POPI section 3).
    """

    bins: PackedBatch
    ref_logp_Rx2: Array
    weight_R: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Everything that one train step reads, as stacks of micro-batches. `shapes.Shapes.step` gives the shapes.

    Attributes:
        generator: rows that give the losses, and so the rewards.
        inference: the summaries of a step that updates phi: sampled ones, or texts to imitate; else None.
        learned: in a joint step, the rows that theta learns from, if they are not all rows of `generator`; else None.
    """

    generator: GeneratorBatch
    inference: InferenceBatch | None = None
    learned: GeneratorBatch | None = None

    @property
    def token_count(self) -> jax.Array:
        """The number of scored tokens, without padding and without `learned`, whose rows are also in `generator`."""
        count = self.generator.bins.token_count
        return count if self.inference is None else count + self.inference.lines.token_count
