"""Draws K continuations per prompt from one prefill: jitted while-loops over a KV cache. No tokenizer, no strings.

Shapes: B prompts, T prompt length, N continuations per prompt (K summaries of a user), S tokens at most, V vocabulary,
D model width; E prompts on each of G devices, B = G * E, of which P are picked; X, Y any axes.
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

# A token's attention reads every slot of the branches' cache that the compiled loop knows, filled or not. So a long
# continuation is drawn in several loops, each of which knows no more slots than it can fill; few, for each is compiled.
_LOOP_TOKENS, _MOST_LOOPS = 512, 4

# How often the prompts that are not done go on by themselves, in a batch of half the size.
_HALVINGS = 2


def turns(max_tokens: int) -> tuple[int, ...]:
    """The turns of each loop, in order, where every continuation takes `max_tokens`: those of halved batches none."""
    ends = _loop_ends(max_tokens)
    return (*(end - max(1, start) for start, end in zip((0, *ends), ends, strict=False)), *(0,) * _HALVINGS)


def _loop_ends(max_tokens: int) -> tuple[int, ...]:
    """How many tokens there are at the end of each loop over the whole batch, the first token included."""
    loops = min(_MOST_LOOPS, -(-max_tokens // _LOOP_TOKENS))
    step = -(-max_tokens // loops)
    return (*range(step, max_tokens, step), max_tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """What was drawn.

    Attributes:
        tokens_BxNxS: int32; the stop token is included, `pad_id` follows it.
        length_BxN: int32, the tokens drawn, the stop token counted.
        logp_BxNxS: float32 log-probability, in nats, of each token under the distribution that it was really drawn
            from (after temperature and top-p); 0 at padding.
        finished_BxN: False where the limit S cut a continuation short, and in rows of padding.
    """

    tokens_BxNxS: jax.Array
    length_BxN: jax.Array
    logp_BxNxS: jax.Array
    finished_BxN: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _DecodeState:
    index: jax.Array  # Tokens drawn so far.
    place_B: jax.Array  # Which of its device's prompts each is.
    prompt_length_B: jax.Array
    token_BxN: jax.Array  # The newest.
    tokens_BxNxS: jax.Array
    logp_BxNxS: jax.Array
    length_BxN: jax.Array
    done_BxN: jax.Array
    cache: Cache

    def pick(self, place_GxP: jax.Array) -> "_DecodeState":
        """That of some of each device's prompts."""
        of_prompts: dict[str, Any] = {name: _pick(value, place_GxP) for name, value in self._of_prompts().items()}
        # Of the cache, the keys and values have the layers first.
        cache = jax.tree.map(lambda x: _pick(x, place_GxP, axis=0 if x.ndim == 2 else 1), self.cache)
        return dataclasses.replace(self, cache=cache, **of_prompts)

    def put_back(self, place_GxP: jax.Array, picked: "_DecodeState") -> "_DecodeState":
        """With what those prompts have drawn since; the cache stays behind: nothing more is drawn."""
        more = picked._of_prompts()
        values: dict[str, Any] = {name: _put_back(x, place_GxP, more[name]) for name, x in self._of_prompts().items()}
        return dataclasses.replace(self, **values)

    def _of_prompts(self) -> dict[str, jax.Array]:
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name not in ("index", "cache")}


def _pick(x_XxBxY: jax.Array, place_GxP: jax.Array, axis: int = 0) -> jax.Array:
    """Takes P of each device's prompts; nothing goes from one device to another."""
    G, P = place_GxP.shape
    before, after = x_XxBxY.shape[:axis], x_XxBxY.shape[axis + 1 :]
    x_XxGxExY = x_XxBxY.reshape(*before, G, -1, *after)
    pick = jax.vmap(lambda own_XxExY, place_P: own_XxExY.take(place_P, axis, mode="clip"), (axis, 0), axis)
    return pick(x_XxGxExY, place_GxP).reshape(*before, G * P, *after)


def _put_back(x_BxY: jax.Array, place_GxP: jax.Array, picked_BxY: jax.Array) -> jax.Array:
    """Undoes `_pick` of the first axis, with other values."""
    G, P = place_GxP.shape
    rest = x_BxY.shape[1:]
    put = jax.vmap(lambda own_ExY, place_P, picked_PxY: own_ExY.at[place_P].set(picked_PxY))
    return put(x_BxY.reshape(G, -1, *rest), place_GxP, picked_BxY.reshape(G, P, *rest)).reshape(x_BxY.shape)


def truncate(logits_XxV: jax.Array, *, temperature: float, top_p: float) -> jax.Array:
    """Log-probabilities of the distribution sampled from: softmax(logits / temperature), cut to its nucleus.

    The nucleus is the smallest set of most likely tokens with a total probability of at least top_p (Holtzman et al.
    2020); the rest gets -inf, and what remains is normalised. Temperature 0 puts all on the most likely token.
    """
    if temperature == 0:
        best_XxV = jax.nn.one_hot(_first_largest(logits_XxV), logits_XxV.shape[-1], dtype=jnp.bool_)
        return jnp.where(best_XxV, 0.0, -jnp.inf)
    logp_XxV = jax.nn.log_softmax(logits_XxV.astype(jnp.float32) / temperature, axis=-1)
    if top_p >= 1:
        return logp_XxV
    sorted_XxV = -jnp.sort(-logp_XxV, axis=-1)
    mass_before_XxV = jnp.cumsum(jnp.exp(sorted_XxV), axis=-1) - jnp.exp(sorted_XxV)
    kept_XxV = mass_before_XxV < top_p
    threshold_X = jnp.min(jnp.where(kept_XxV, sorted_XxV, jnp.inf), axis=-1)
    return jax.nn.log_softmax(jnp.where(logp_XxV >= threshold_X[..., None], logp_XxV, -jnp.inf), axis=-1)


def _first_largest(x_XxV: jax.Array) -> jax.Array:
    """Argmax over the last axis in two plain reductions, which vectorise; XLA's own does not on the CPU."""
    V = x_XxV.shape[-1]
    largest_Xx1 = jnp.max(x_XxV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(x_XxV == largest_Xx1, jnp.arange(V), V - 1), axis=-1)


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

    On each device the prompts that are not done go on by themselves once they are no more than half, and once more once
    they are half of those. What is drawn does not depend on it, but for rounding.
    A prompt of length 0 is padding: nothing is drawn for it. All arguments after `key` are static under jit.
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
    """`sample` with the decoder that `policy` makes of these weights: what is jitted, see modes/programs.py."""
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
    """Draws the next token of each continuation, whose noise is that of its place among all `prompts`."""
    with jax.named_scope("logits"):
        logp_BxNxV = truncate(logits_BxNxV, temperature=temperature, top_p=top_p)
    noise_BxNxV = jax.random.gumbel(jax.random.fold_in(key, state.index), (prompts, *logp_BxNxV.shape[1:]))
    if len(logp_BxNxV) < prompts:
        noise_BxNxV = _pick(noise_BxNxV, state.place_B.reshape(devices, -1))
    token_BxN = _first_largest(logp_BxNxV + noise_BxNxV)  # jax.random.categorical's, which takes argmax.
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


def _draw_all(
    state: _DecodeState,
    advance: Callable[[int, _DecodeState], _DecodeState],
    ends: Sequence[int],
    halvings: int,
    devices: int,
) -> _DecodeState:
    """Advances until all are done, or have as many tokens as the last of `ends`."""
    G = devices
    E = len(state.done_BxN) // G
    P = -(-E // 2) if halvings and E > 1 else 0

    def waiting_GxE(state: _DecodeState) -> jax.Array:
        return ~jnp.all(state.done_BxN, axis=1).reshape(G, E)

    for end in ends:

        def unfinished(state: _DecodeState, end: int = end) -> jax.Array:
            return (state.index < end) & (jnp.max(jnp.sum(waiting_GxE(state), axis=1)) > P)

        state = jax.lax.while_loop(unfinished, functools.partial(advance, end), state)
    if not P:
        return state
    place_GxP = jnp.argsort(~waiting_GxE(state), axis=1, stable=True)[:, :P]
    return state.put_back(place_GxP, _draw_all(state.pick(place_GxP), advance, ends[-1:], halvings - 1, G))
