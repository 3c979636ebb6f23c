"""Draws N continuations per prompt from one prefill, by jitted while-loops over a KV cache. No tokenizer, no strings.

Shape letters: docs/architecture.md.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from popi_jax.model import sharding
from popi_jax.model.decoder import Cache, Decoder
from popi_jax.model.policy import Policy
from popi_jax.model.weights import Tree

# A token's attention reads every cache slot of the compiled loop, filled or not. A long continuation is therefore drawn
# in several loops, each with only the slots that it can fill. There are few loops, because each one is compiled.
_LOOP_TOKENS, _MOST_LOOPS = 512, 4

# How many times the unfinished prompts move to a batch of half the size.
_HALVINGS = 2


def turns(max_tokens: int) -> tuple[int, ...]:
    """The iterations of each loop, in order, if every continuation has `max_tokens`; halved batches then take none."""
    ends = _loop_ends(max_tokens)
    return (*(end - max(1, start) for start, end in zip((0, *ends), ends, strict=False)), *(0,) * _HALVINGS)


def _loop_ends(max_tokens: int) -> tuple[int, ...]:
    """The number of tokens after each loop over the whole batch, including the first token."""
    loops = min(_MOST_LOOPS, -(-max_tokens // _LOOP_TOKENS))
    step = -(-max_tokens // loops)
    return (*range(step, max_tokens, step), max_tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """The sampled continuations.

    Attributes:
        tokens_BxNxS: int32. The stop token is included, and `pad_id` follows it.
        length_BxN: int32, the number of drawn tokens, including the stop token.
        logp_BxNxS: float32, the log-probability of each token in nats, under the distribution that it was drawn from
            (after temperature and top-p); 0 at padding.
        finished_BxN: False if the limit S cut a continuation short, and for padding rows.
    """

    tokens_BxNxS: jax.Array
    length_BxN: jax.Array
    logp_BxNxS: jax.Array
    finished_BxN: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _DecodeState:
    index: jax.Array  # Number of tokens drawn so far.
    place_B: jax.Array  # Each prompt's index within its shard.
    prompt_length_B: jax.Array
    token_BxN: jax.Array  # The newest token.
    tokens_BxNxS: jax.Array
    logp_BxNxS: jax.Array
    length_BxN: jax.Array
    done_BxN: jax.Array
    cache: Cache

    def pick(self, place_ShxPk: jax.Array) -> "_DecodeState":
        """The state of the picked prompts of each shard."""
        of_prompts: dict[str, Any] = {name: _pick(value, place_ShxPk) for name, value in self._of_prompts().items()}
        # The cache's keys and values have the layer axis first.
        cache = jax.tree.map(lambda x: _pick(x, place_ShxPk, axis=0 if x.ndim == 2 else 1), self.cache)
        return dataclasses.replace(self, cache=cache, **of_prompts)

    def put_back(self, place_ShxPk: jax.Array, picked: "_DecodeState") -> "_DecodeState":
        """This state updated with `picked`, except for the cache, which is no longer needed."""
        more = picked._of_prompts()
        values: dict[str, Any] = {name: _put_back(x, place_ShxPk, more[name]) for name, x in self._of_prompts().items()}
        return dataclasses.replace(self, **values)

    def _of_prompts(self) -> dict[str, jax.Array]:
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name not in ("index", "cache")}


def _pick(values: jax.Array, place_ShxPk: jax.Array, axis: int = 0) -> jax.Array:
    """Takes Pk of each shard's Bs prompts, which lie on `axis` (B = Sh * Bs). Nothing moves between devices."""
    Sh, Pk = place_ShxPk.shape
    before, after = values.shape[:axis], values.shape[axis + 1 :]
    pick = jax.vmap(lambda own, place_Pk: own.take(place_Pk, axis, mode="clip"), (axis, 0), axis)
    return pick(values.reshape(*before, Sh, -1, *after), place_ShxPk).reshape(*before, Sh * Pk, *after)


def _put_back(values: jax.Array, place_ShxPk: jax.Array, picked: jax.Array) -> jax.Array:
    """Writes `picked` to the prompts that `_pick` took from the first axis."""
    Sh, Pk = place_ShxPk.shape
    rest = values.shape[1:]
    put = jax.vmap(lambda own, place_Pk, picked_own: own.at[place_Pk].set(picked_own))
    return put(values.reshape(Sh, -1, *rest), place_ShxPk, picked.reshape(Sh, Pk, *rest)).reshape(values.shape)


def truncate(logits_xV: jax.Array, *, temperature: float, top_p: float) -> jax.Array:
    """Log-probabilities of the sampling distribution: softmax(logits / temperature), truncated to its nucleus.

    The nucleus is the smallest set of most likely tokens with a total probability of at least top_p (Holtzman et al.
    2020). All other tokens get -inf, and the nucleus is normalised. Temperature 0 selects the most likely token.
    """
    if temperature == 0:
        best_xV = jax.nn.one_hot(_first_largest(logits_xV), logits_xV.shape[-1], dtype=jnp.bool_)
        return jnp.where(best_xV, 0.0, -jnp.inf)
    logp_xV = jax.nn.log_softmax(logits_xV.astype(jnp.float32) / temperature, axis=-1)
    if top_p >= 1:
        return logp_xV
    sorted_xV = -jnp.sort(-logp_xV, axis=-1)
    mass_before_xV = jnp.cumsum(jnp.exp(sorted_xV), axis=-1) - jnp.exp(sorted_xV)
    kept_xV = mass_before_xV < top_p
    threshold_x = jnp.min(jnp.where(kept_xV, sorted_xV, jnp.inf), axis=-1)
    return jax.nn.log_softmax(jnp.where(logp_xV >= threshold_x[..., None], logp_xV, -jnp.inf), axis=-1)


def _first_largest(values_xV: jax.Array) -> jax.Array:
    """Argmax over the last axis by two plain reductions, which vectorise on the CPU; XLA's own argmax does not."""
    V = values_xV.shape[-1]
    largest_x1 = jnp.max(values_xV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(values_xV == largest_x1, jnp.arange(V), V - 1), axis=-1)


def sample(
    decoder: Decoder,
    prompt_BxT: jax.Array,
    prompt_length_B: jax.Array,
    key: jax.Array,
    *,
    branches: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Samples:
    """Draws `branches` continuations of each right-padded prompt; stops early when all are done.

    When at most half of each device's prompts are unfinished, they continue in a batch of half the size; this happens
    at most twice. The samples do not depend on it, except for rounding.
    A prompt of length 0 is padding, and nothing is drawn for it. `key` is one key, or [B], one for each prompt, whose
    draws then do not depend on its place. All arguments after `key` are static under jit.
    """
    B, T = prompt_BxT.shape
    N, S = branches, max_tokens
    devices = sharding.row_shards(decoder.mesh)
    index_1xT = jnp.arange(T)[None, :]
    segments_BxT = jnp.where(index_1xT < prompt_length_B[:, None], 0, -1)
    positions_BxT = jnp.broadcast_to(index_1xT, (B, T))
    with jax.named_scope("prefill"):
        hidden_BxTxD, cache = decoder.prefill(prompt_BxT, positions_BxT, segments_BxT, N, S)
    last_B = jnp.maximum(prompt_length_B - 1, 0)
    last_Bx1xD = jnp.take_along_axis(hidden_BxTxD, last_B[:, None, None], axis=1)
    logits_BxNxV = jnp.broadcast_to(decoder.logits(last_Bx1xD), (B, N, decoder.config.vocab_size))
    empty_BxN = jnp.broadcast_to(prompt_length_B[:, None] == 0, (B, N))
    state = _DecodeState(
        index=jnp.int32(0),
        place_B=jnp.arange(B) % (B // devices),
        prompt_length_B=prompt_length_B,
        token_BxN=jnp.full((B, N), pad_id, jnp.int32),
        tokens_BxNxS=jnp.full((B, N, S), pad_id, jnp.int32),
        logp_BxNxS=jnp.zeros((B, N, S), jnp.float32),
        length_BxN=jnp.zeros((B, N), jnp.int32),
        done_BxN=empty_BxN,
        cache=cache,
    )
    draw = functools.partial(
        _draw,
        key=key,
        prompts=B,
        devices=devices,
        temperature=temperature,
        top_p=top_p,
        stop_ids=stop_ids,
        pad_id=pad_id,
    )

    def advance(slots: int, state: _DecodeState) -> _DecodeState:
        slot = state.index - 1
        positions_BxN = jnp.broadcast_to(state.prompt_length_B[:, None] + slot, state.token_BxN.shape)
        hidden_BxNxD, cache = decoder.decode(state.token_BxN, positions_BxN, state.cache, slot, slots)
        return draw(dataclasses.replace(state, cache=cache), decoder.logits(hidden_BxNxD))

    with jax.named_scope("decode"):
        state = _draw_all(draw(state, logits_BxNxV), advance, _loop_ends(S), _HALVINGS, devices)
    return Samples(state.tokens_BxNxS, state.length_BxN, state.logp_BxNxS, state.done_BxN & ~empty_BxN)


def draw(
    base: Tree,
    delta: Tree | None,
    prompt_BxT: jax.Array,
    prompt_length_B: jax.Array,
    key: jax.Array,
    *,
    policy: Policy,
    **options: Any,
) -> Samples:
    """`sample` with the decoder that `policy` makes from these weights. modes/programs.py jits this function."""
    return sample(policy.bind(base, delta), prompt_BxT, prompt_length_B, key, **options)


@jax.named_scope("draw")
def _draw(
    state: _DecodeState,
    logits_BxNxV: jax.Array,
    *,
    key: jax.Array,
    prompts: int,
    devices: int,
    temperature: float,
    top_p: float,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> _DecodeState:
    """Draws the next token of each continuation.

    The noise depends on the prompt's place among all `prompts`, or on its own key.
    """
    with jax.named_scope("logits"):
        logp_BxNxV = truncate(logits_BxNxV, temperature=temperature, top_p=top_p)
    chosen_BxNxV = logp_BxNxV
    if temperature > 0:
        noise_BxNxV = _noise(key, state.index, (prompts, *logp_BxNxV.shape[1:]))
        if len(logp_BxNxV) < prompts:
            noise_BxNxV = _pick(noise_BxNxV, state.place_B.reshape(devices, -1))
        chosen_BxNxV = logp_BxNxV + noise_BxNxV
    token_BxN = _first_largest(chosen_BxNxV)  # As jax.random.categorical, which uses argmax.
    logp_BxN = jnp.take_along_axis(logp_BxNxV, token_BxN[..., None], axis=-1)[..., 0]
    token_BxN = jnp.where(state.done_BxN, pad_id, token_BxN).astype(jnp.int32)
    stopped_BxN = jnp.isin(token_BxN, jnp.asarray(stop_ids, jnp.int32)) & ~state.done_BxN
    return dataclasses.replace(
        state,
        index=state.index + 1,
        token_BxN=token_BxN,
        tokens_BxNxS=state.tokens_BxNxS.at[:, :, state.index].set(token_BxN),
        logp_BxNxS=state.logp_BxNxS.at[:, :, state.index].set(jnp.where(state.done_BxN, 0.0, logp_BxN)),
        length_BxN=state.length_BxN + ~state.done_BxN,
        done_BxN=state.done_BxN | stopped_BxN,
    )


def _noise(key: jax.Array, index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Gumbel noise of this shape for the token of this index, from one key, or from one for each prompt."""
    if key.ndim == 0:
        return jax.random.gumbel(jax.random.fold_in(key, index), shape)
    return jax.vmap(lambda own: jax.random.gumbel(jax.random.fold_in(own, index), shape[1:]))(key)


def _draw_all(
    state: _DecodeState,
    advance: Callable[[int, _DecodeState], _DecodeState],
    ends: Sequence[int],
    halvings: int,
    devices: int,
) -> _DecodeState:
    """Advances until all continuations are done or have the last of `ends` tokens."""
    Sh = devices
    Bs = len(state.done_BxN) // Sh
    Pk = -(-Bs // 2) if halvings and Bs > 1 else 0

    def waiting_ShxBs(state: _DecodeState) -> jax.Array:
        return ~jnp.all(state.done_BxN, axis=1).reshape(Sh, Bs)

    for end in ends:

        def unfinished(state: _DecodeState, end: int = end) -> jax.Array:
            return (state.index < end) & (jnp.max(jnp.sum(waiting_ShxBs(state), axis=1)) > Pk)

        state = jax.lax.while_loop(unfinished, functools.partial(advance, end), state)
    if not Pk:
        return state
    place_ShxPk = jnp.argsort(~waiting_ShxBs(state), axis=1, stable=True)[:, :Pk]
    return state.put_back(place_ShxPk, _draw_all(state.pick(place_ShxPk), advance, ends[-1:], halvings - 1, Sh))
