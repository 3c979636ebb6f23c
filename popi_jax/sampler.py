"""Draws K continuations per prompt from one prefill: a jitted while-loop over a KV cache. No tokenizer, no strings.

Shapes: B prompts, T prompt length, N continuations per prompt (K summaries of a user), S tokens at most, V vocabulary,
D model width; X any axes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from popi_jax.model.decoder import Cache, Decoder

# A token's attention reads every slot of the branches' cache that the compiled loop knows, filled or not. So a long
# continuation is drawn in several loops, each of which knows no more slots than it can fill; few, for each is compiled.
_LOOP_TOKENS, _MOST_LOOPS = 512, 4


def loop_tokens(max_tokens: int) -> int:
    """How many tokens each of the loops that draw `max_tokens` draws at most."""
    loops = min(_MOST_LOOPS, -(-max_tokens // _LOOP_TOKENS))
    return -(-max_tokens // loops)


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
    token_BxN: jax.Array  # The newest.
    tokens_BxNxS: jax.Array
    logp_BxNxS: jax.Array
    length_BxN: jax.Array
    done_BxN: jax.Array
    cache: Cache


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

    A prompt of length 0 is padding: nothing is drawn for it. All arguments after `key` are static under jit.
    """
    B, T = prompt_BxT.shape
    N, S = branches, max_tokens
    index_1xT = jnp.arange(T)[None, :]
    segments_BxT = jnp.where(index_1xT < prompt_length_B[:, None], 0, -1)
    positions_BxT = jnp.broadcast_to(index_1xT, (B, T))
    hidden_BxTxD, cache = decoder.prefill(prompt_BxT, positions_BxT, segments_BxT, N, S)
    last_B = jnp.maximum(prompt_length_B - 1, 0)
    last_Bx1xD = jnp.take_along_axis(hidden_BxTxD, last_B[:, None, None], axis=1)
    logits_BxNxV = jnp.broadcast_to(decoder.logits(last_Bx1xD), (B, N, decoder.config.vocab_size))

    def draw(state: _DecodeState, logits_BxNxV: jax.Array) -> _DecodeState:
        logp_BxNxV = truncate(logits_BxNxV, temperature=temperature, top_p=top_p)
        noise_BxNxV = jax.random.gumbel(jax.random.fold_in(key, state.index), logp_BxNxV.shape)
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

    def draw_until(end: int, state: _DecodeState) -> _DecodeState:
        def unfinished(state: _DecodeState) -> jax.Array:
            return (state.index < end) & ~jnp.all(state.done_BxN)

        def advance(state: _DecodeState) -> _DecodeState:
            slot = state.index - 1
            positions_BxN = jnp.broadcast_to(prompt_length_B[:, None] + slot, (B, N))
            hidden_BxNxD, cache = decoder.decode(state.token_BxN, positions_BxN, state.cache, slot, end)
            return draw(dataclasses.replace(state, cache=cache), decoder.logits(hidden_BxNxD))

        return jax.lax.while_loop(unfinished, advance, state)

    empty_BxN = jnp.broadcast_to(prompt_length_B[:, None] == 0, (B, N))
    state = _DecodeState(
        index=jnp.int32(0),
        token_BxN=jnp.full((B, N), pad_id, jnp.int32),
        tokens_BxNxS=jnp.full((B, N, S), pad_id, jnp.int32),
        logp_BxNxS=jnp.zeros((B, N, S), jnp.float32),
        length_BxN=jnp.zeros((B, N), jnp.int32),
        done_BxN=empty_BxN,
        cache=cache,
    )
    state = draw(state, logits_BxNxV)
    step = loop_tokens(S)
    for end in [*range(step, S, step), S]:
        state = draw_until(end, state)
    return Samples(state.tokens_BxNxS, state.length_BxN, state.logp_BxNxS, state.done_BxN & ~empty_BxN)
