"""Between text and arrays: draws summaries for users, and lays out the rows that the steps and the evaluation score.

The two models are joined by text: a sampled summary is decoded, and the generator's prompt is tokenised afresh with it,
exactly as a user of the trained pair would do.
Shapes: U users, K summaries each, S tokens of a summary at most; B prompts, N texts each, T prompt length; R rows for
the generator, user-major as in steps.py.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from popi_jax import sampler, sharding, steps
from popi_jax.data import encoding, packing, templates
from popi_jax.data.schema import Example, Query
from popi_jax.errors import UserError
from popi_jax.model.policy import Policy
from popi_jax.scoring import PackedBatch
from popi_jax.system import System


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to score: a query, and what the generator is told of the user (None: nothing)."""

    query: Query
    context: str | None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Summaries of U users, K each, with what the inference step needs; rows beyond U are padding."""

    texts_UxK: list[list[str]]
    prefixes_U: list[list[int]]
    samples: sampler.Samples  # numpy


@functools.partial(
    jax.jit,
    static_argnames=("policy", "branches", "max_tokens", "temperature", "top_p", "stop_ids", "pad_id"),
)
def _draw(base, delta, prompt_BxT, prompt_length_B, key, *, policy: Policy, **options) -> sampler.Samples:
    return sampler.sample(policy.bind(base, delta), prompt_BxT, prompt_length_B, key, **options)


@functools.partial(jax.jit, static_argnames=("policy", "reduction"))
def _pair_logps(base, theta, rows, *, policy: Policy, reduction: str) -> jax.Array:
    return steps.pair_logps(policy, base, theta, rows, reduction)


def draw_text(
    system: System,
    delta,
    prefixes: Sequence[list[int]],
    key: jax.Array,
    *,
    branches: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    rows: int,
    start: str = "",
    stop: str = "",
) -> tuple[list[list[str]], sampler.Samples]:
    """Draws `branches` texts after each prompt (at most `rows` of them) with the base model and this adapter.

    `start` is what the prompts end with of the text itself: the texts that are returned have it, the samples do not.
    `stop` is one token that ends a text, and belongs to it, beside the tokens that always do.
    """
    tokenizer = system.tokenizer
    lines = packing.pack_prefixes(prefixes, _buckets(system), tokenizer.pad_id, padded_users(system, rows))
    samples = _draw(
        system.base,
        delta,
        *jax.device_put(lines, sharding.batch_sharding(system.mesh)),
        key,
        policy=system.policy,
        branches=branches,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids=tokenizer.stop_ids + stop_token(system, stop),
        pad_id=tokenizer.pad_id,
    )
    samples = sharding.to_host(samples)
    texts = [
        [
            (start + tokenizer.decode(samples.tokens_BxNxS[b, n, : samples.length_BxN[b, n]].tolist())).strip()
            for n in range(branches)
        ]
        for b in range(len(prefixes))
    ]
    return texts, samples


def draw_summaries(
    system: System,
    phi,
    examples: Sequence[Example],
    key: jax.Array,
    *,
    k: int,
    temperature: float,
    top_p: float,
    rows: int,
) -> Drawn:
    """Draws K summaries z ~ q_phi(.|s) for each user; phi None is the untrained inference model q_0."""
    prefixes = [encode_signals(system, example) for example in examples]
    texts, samples = draw_text(
        system,
        phi,
        prefixes,
        key,
        branches=k,
        max_tokens=system.config.limits.summary,
        temperature=temperature,
        top_p=top_p,
        rows=rows,
        start=system.config.prompts.summary_start,
        stop=system.config.prompts.summary_stop,
    )
    return Drawn(texts, prefixes, samples)


def stop_token(system: System, stop: str) -> tuple[int, ...]:
    """The id of the text `stop`; nothing where it is empty. Raises UserError where it is more than one token."""
    ids = system.tokenizer.encode(stop)
    if len(ids) > 1:
        raise UserError(f"config.prompts.summary_stop is {stop!r}, {len(ids)} tokens of this tokenizer; give one token")
    return tuple(ids)


def encode_signals(system: System, example: Example) -> list[int]:
    """Tokens of what the inference model reads of a user."""
    config = system.config
    return encoding.encode_signals(
        example,
        system.tokenizer,
        config.prompts.inference_instruction,
        config.limits.signals,
        config.limits.on_overflow,
        system.overflow,
        config.prompts.summary_start,
        tuple(config.prompts.pair_fields),
    )


def signals_context(system: System, example: Example) -> str:
    """The user's raw signals as a context: what raw_signals shows the generator."""
    config = system.config
    return encoding.raw_signals_context(
        example, system.tokenizer, config.prompts.generator_instruction, config.limits, system.overflow
    )


def encode_item(system: System, item: Item) -> tuple[list[int], list[int], list[int]]:
    """Tokens of the generator's prompt, of y+ and of y-."""
    config = system.config
    return encoding.encode_query(
        item.query, item.context, system.tokenizer, config.prompts.generator_instruction, config.limits
    )


def encode_prompt(system: System, prompt: str, context: str | None) -> list[int]:
    """Tokens of what the generator reads for a prompt that has no known responses."""
    ids = system.tokenizer.render(
        templates.generator_messages(prompt, context, system.config.prompts.generator_instruction)
    )
    if len(ids) > system.config.limits.prompt:
        raise UserError(
            f"prompt {prompt[:40]!r} takes {len(ids)} tokens, config.limits.prompt is {system.config.limits.prompt};"
            " raise it or shorten the prompt"
        )
    return ids


def context_tokens(system: System, context: str | None) -> int:
    """What telling the generator `context` costs, in tokens of its text."""
    return len(system.tokenizer.encode(context)) if context else 0


def _shards(system: System) -> int:
    return system.mesh.shape["data"] * system.mesh.shape["fsdp"]


def padded_users(system: System, users: int) -> int:
    """How many users a batch of `users` has room for: as many on every device."""
    return packing.round_up(users, _shards(system))


def _buckets(system: System) -> tuple[int, ...]:
    return tuple(system.config.limits.buckets)


def inference_batch(system: System, drawn: Drawn, rows: int) -> steps.InferenceBatch:
    """The users' signals with their sampled summaries as branches, token for token as they were drawn."""
    samples = drawn.samples
    branches = [
        [samples.tokens_BxNxS[u, k, : samples.length_BxN[u, k]].tolist() for k in range(samples.length_BxN.shape[1])]
        for u in range(len(drawn.prefixes_U))
    ]
    lines = packing.pack(
        drawn.prefixes_U,
        branches,
        _buckets(system),
        system.tokenizer.pad_id,
        rows=padded_users(system, rows),
        # K branches a user: padded to a bucket made for prompts, they can outweigh the signals.
        branch_limit=system.config.limits.summary,
    )
    U, K, S = lines.branches_BxNxS.shape
    logp_UxKxS = np.zeros((U, K, S), np.float32)
    logp_UxKxS[: len(branches)] = samples.logp_BxNxS[: len(branches), :, :S]
    return jax.device_put(steps.InferenceBatch(lines, logp_UxKxS), sharding.batch_sharding(system.mesh))


def pair_row(system: System, item: Item | None) -> packing.Row:
    """A prompt with y+ and y-; None is a row of padding."""
    if item is None:
        return packing.Row([], [[], []])
    prefix, chosen, rejected = encode_item(system, item)
    return packing.Row(prefix, [chosen, rejected])


def bin_length(system: System, lengths: Sequence[int]) -> int:
    """The length of bins for such rows: limits.bin, or a bucket that holds the longest where that pads far less."""
    limit = system.config.limits.bin
    if max(lengths) > limit:
        return packing.bucket(max(lengths), tuple(system.config.limits.buckets))
    positions = {
        size: len(packing.fill_bins(lengths, size)) * size
        for size in (limit, *system.config.limits.buckets)
        if max(lengths) <= size <= limit
    }
    best = min(positions, key=lambda size: positions[size])
    # Not for a little less: another length is another shape to compile.
    return best if positions[best] < 0.8 * positions[limit] else limit


def place_packed(system: System, packed: PackedBatch) -> PackedBatch:
    """Spreads the bins over the devices that share the rows; what there is of each row goes to all of them."""
    spread, everywhere = sharding.batch_sharding(system.mesh), sharding.replicated(system.mesh)
    values = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed)}
    placed = {name: everywhere if name in ("length_RxN", "first_R") else spread for name in values}
    return PackedBatch(**jax.device_put(values, placed))


def pack_pairs(system: System, items: Sequence[Item | None], least_bins: int = 0) -> PackedBatch:
    """Packs a train step's rows, each micro-batch's by itself, in `least_bins` or more of them.

    Where some of a user's K summaries are the same text, their rows are read once.
    """
    rows = [pair_row(system, item) for item in items]
    micro = len(rows) // system.config.train.accumulation
    starts = range(0, len(rows), micro)
    parts = [rows[start : start + micro] for start in starts]
    firsts = [packing.first_equals(items[start : start + micro]) for start in starts]
    lengths = [
        [row.tokens if own == i else 0 for i, (row, own) in enumerate(zip(part, first, strict=True))]
        for part, first in zip(parts, firsts, strict=True)
    ]
    length = bin_length(system, sum(lengths, []))
    bins = [packing.fill_bins(own, length) for own in lengths]
    # Rounded up, so that steps have few shapes, and every device has as many bins.
    n_bins = packing.round_up(packing.coarse(max(least_bins, *map(len, bins))), _shards(system))
    shape = packing.BinShape(n_bins, length, _shards(system))
    scored = max(packing.most_scored(part, own, shape) for part, own in zip(parts, bins, strict=True))
    packed = [
        packing.pack_bins(part, own, shape, scored=scored, pad_id=system.tokenizer.pad_id, first_R=first)
        for part, own, first in zip(parts, bins, firsts, strict=True)
    ]
    return place_packed(system, jax.tree.map(lambda *leaves: np.concatenate(leaves), *packed))


def pair_logps(system: System, theta, items: Sequence[Item], rows: int) -> np.ndarray:
    """Log pi(y+|x,z) and log pi(y-|x,z) of every item, [n, 2]; about `rows` of them at a time, all in one shape."""
    encoded = [pair_row(system, item) for item in items]
    lengths = [row.tokens for row in encoded]
    length = bin_length(system, lengths)
    bins = packing.fill_bins(lengths, length)
    n_bins = packing.round_up(-(-len(bins) * min(rows, len(items)) // len(items)), _shards(system))
    parts = [bins[start : start + n_bins] for start in range(0, len(bins), n_bins)]
    members = [[i for own in part for i in own] for part in parts]
    shape = packing.BinShape(n_bins, length, _shards(system))
    scored = max(packing.most_scored(encoded, part, shape) for part in parts)
    most = max(map(len, members))
    logps = np.zeros((len(items), 2), np.float32)
    for part, chosen in zip(parts, members, strict=True):
        place = {item: r for r, item in enumerate(chosen)}
        own = [[place[item] for item in part_bin] for part_bin in part]
        some = [encoded[i] for i in chosen] + [packing.Row([], [[], []])] * (most - len(chosen))
        packed = packing.pack_bins(some, own, shape, scored=scored, pad_id=system.tokenizer.pad_id)
        out = _pair_logps(
            system.base,
            theta,
            place_packed(system, packed),
            policy=system.policy,
            reduction=system.config.objective.logp_reduction,
        )
        logps[chosen] = sharding.to_host(out)[: len(chosen)]
    return logps


class References:
    """log pi_ref of query pairs: a constant of the data set, computed in one pass and kept (POPI section 2).

    The file's name is a hash of all that the values depend on but the pairs; each pair is found by its own hash.
    """

    def __init__(self, system: System, folder: pathlib.Path, rows: int):
        self._system, self._rows = system, rows
        config = system.config
        identity = (
            f"{system.fingerprint}|{system.tokenizer.fingerprint}|{config.prompts.generator_instruction}"
            f"|{config.objective.logp_reduction}|{config.model.compute_dtype}"
        )
        self._path = folder / f"reference_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
        self._known: dict[str, np.ndarray] = {}
        if self._path.exists():
            with np.load(self._path, allow_pickle=False) as stored:
                self._known = dict(zip(stored["keys"].tolist(), stored["logps"], strict=True))

    def remember(self, items: Sequence[Item]) -> None:
        """Computes what is not known yet and writes it down."""
        missing = list({_item_key(item): item for item in items if _item_key(item) not in self._known}.items())
        if not missing:
            return
        logps = pair_logps(self._system, None, [item for _, item in missing], self._rows)
        self._known.update(zip([key for key, _ in missing], logps, strict=True))
        if jax.process_index() != 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".tmp.npz")
        np.savez(scratch, keys=np.array(list(self._known)), logps=np.stack(list(self._known.values())))
        scratch.replace(self._path)

    def lookup(self, items: Sequence[Item]) -> np.ndarray:
        """Log pi_ref of y+ and y-, [n, 2]; what `remember` has not seen is computed, in this order, and not kept."""
        unknown = [item for item in items if _item_key(item) not in self._known]
        fresh = iter(pair_logps(self._system, None, unknown, self._rows)) if unknown else iter(())
        return np.stack(
            [self._known[key] if (key := _item_key(item)) in self._known else next(fresh) for item in items]
        )


def _item_key(item: Item) -> str:
    parts = (
        item.query.prompt,
        item.query.chosen,
        item.query.rejected,
        "" if item.context is None else "\0" + item.context,
    )
    return hashlib.sha256("\1".join(parts).encode()).hexdigest()


def reference_item(system: System, query: Query, context: str | None, signals: str) -> Item:
    """What the reference is shown for this row: the question only, unless reference_context says otherwise."""
    which = system.config.objective.reference_context
    return Item(query, {"prompt": None, "summary": context, "signals": signals}[which])


def generator_batch(
    system: System, items: Sequence[Item | None], signals: Sequence[str], references: References, least_bins: int = 0
) -> steps.GeneratorBatch:
    """Rows for the steps, with their reference log-probabilities; a None is a row of padding that keeps its place."""
    ref_logp_Rx2 = np.zeros((len(items), 2), np.float32)
    present = [i for i, item in enumerate(items) if item is not None]
    wanted = [reference_item(system, items[i].query, items[i].context, signals[i]) for i in present]  # type: ignore[union-attr]
    if wanted:
        ref_logp_Rx2[present] = references.lookup(wanted)
    placed = jax.device_put(ref_logp_Rx2, sharding.replicated(system.mesh))
    return steps.GeneratorBatch(pack_pairs(system, items, least_bins), placed)
