"""The decoder against a plain float64 reference, and the guarantees of its masks and cache."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from popi_jax.errors import UserError
from popi_jax.model import attention
from popi_jax.model.config import Llama3RopeScaling, ModelConfig
from popi_jax.model.decoder import Decoder, rope_frequencies
from popi_jax.model.policy import Policy

SCALING = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=64)
LLAMA = ModelConfig(
    vocab_size=37, d_model=24, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=8, d_ff=40, rope_theta=500.0, norm_eps=1e-5
)
CONFIGS = {
    "llama2": LLAMA,
    "llama3": dataclasses.replace(LLAMA, rope_scaling=SCALING, tie_embeddings=True),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, tie_embeddings=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_dim=10),
}


@functools.cache
def perturbed(name: str):
    """Returns a policy and weights that differ from 0 and 1, so that each of them matters."""
    policy = Policy(CONFIGS[name])
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(centre, 0.3, leaf.shape), jnp.float32)

    return policy, jax.tree_util.tree_map_with_path(draw, policy.abstract_base())


@functools.partial(jax.jit, static_argnums=0)
def forward(policy, base, tokens_BxL, positions_BxL, segments_BxL):
    decoder = policy.bind(base, None)
    return decoder.logits(decoder(tokens_BxL, positions_BxL, segments_BxL))


def rows(batch: int, length: int, seed: int = 0):
    tokens_BxL = np.random.default_rng(seed).integers(0, LLAMA.vocab_size, (batch, length)).astype(np.int32)
    return tokens_BxL, np.tile(np.arange(length, dtype=np.int32), (batch, 1)), np.zeros((batch, length), np.int32)


# The reference: one token, one head, one key at a time, float64.


def ref_norm(x, scale, eps):
    return x / np.sqrt(sum(v * v for v in x) / len(x) + eps) * scale


def ref_turn(x, position, config):
    """Rotates feature i together with feature i + half."""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        frequency = 1.0 / config.rope_theta ** (2 * i / len(x))
        if config.rope_scaling is not None:
            s = config.rope_scaling
            wavelength = 2 * np.pi / frequency
            if wavelength > s.original_max_length / s.low_freq_factor:
                frequency /= s.factor
            elif wavelength > s.original_max_length / s.high_freq_factor:
                part = s.original_max_length / wavelength - s.low_freq_factor
                part /= s.high_freq_factor - s.low_freq_factor
                frequency = (1 - part) * frequency / s.factor + part * frequency
        angle = position * frequency
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


def ref_heads(config, layers, n, name, normed, heads):
    out = np.empty((heads, config.head_dim))
    for h in range(heads):
        out[h] = normed @ layers[name]["kernel"][n][:, h]
        if config.qkv_bias:
            out[h] += layers[name]["bias"][n][h]
    return out


def ref_attend(config, q_H, keys, values, visible):
    out = np.empty((config.n_heads, config.head_dim))
    for h in range(config.n_heads):
        kv = h // (config.n_heads // config.n_kv_heads)
        weights = [np.exp(np.dot(q_H[h], keys[j][kv]) / np.sqrt(config.head_dim)) for j in visible]
        out[h] = sum(w * values[j][kv] for w, j in zip(weights, visible, strict=True)) / sum(weights)
    return out


def reference_logits(config, params, tokens_L, positions_L, segments_L):
    """Returns the logits of one line; those at padding are zero."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    layers = params["layers"]
    real = [i for i, segment in enumerate(segments_L) if segment >= 0]
    stream = {i: params["embed"]["embedding"][tokens_L[i]] for i in real}
    for n in range(config.n_layers):
        keys, values = {}, {}
        for i in real:
            normed = ref_norm(stream[i], layers["attn_norm"]["scale"][n], config.norm_eps)
            q_H = ref_heads(config, layers, n, "q", normed, config.n_heads)
            k_Kv = ref_heads(config, layers, n, "k", normed, config.n_kv_heads)
            if config.qk_norm:
                q_H = np.stack([ref_norm(q, layers["q_norm"]["scale"][n], config.norm_eps) for q in q_H])
                k_Kv = np.stack([ref_norm(k, layers["k_norm"]["scale"][n], config.norm_eps) for k in k_Kv])
            q_H = np.stack([ref_turn(q, positions_L[i], config) for q in q_H])
            keys[i] = np.stack([ref_turn(k, positions_L[i], config) for k in k_Kv])
            values[i] = ref_heads(config, layers, n, "v", normed, config.n_kv_heads)
            visible = [j for j in real if j <= i and segments_L[j] in (0, segments_L[i])]
            attended = ref_attend(config, q_H, keys, values, visible)
            o = sum(attended[h] @ layers["o"]["kernel"][n][h] for h in range(config.n_heads))
            after = stream[i] + o
            normed = ref_norm(after, layers["mlp_norm"]["scale"][n], config.norm_eps)
            gate = normed @ layers["gate"]["kernel"][n]
            inner = gate / (1 + np.exp(-gate)) * (normed @ layers["up"]["kernel"][n])
            stream[i] = after + inner @ layers["down"]["kernel"][n]
    head = params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
    out = np.zeros((len(tokens_L), config.vocab_size))
    for i in real:
        out[i] = ref_norm(stream[i], params["final_norm"]["scale"], config.norm_eps) @ head
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_a_plain_float64_reference(name):
    policy, base = perturbed(name)
    tokens_BxL, positions_BxL, segments_BxL = rows(2, 9)
    # Row 0: prefix, two branches that restart at position 4, padding. Row 1: large positions, padding in between.
    segments_BxL[0] = [0, 0, 0, 0, 1, 1, 2, 2, -1]
    positions_BxL[0] = [0, 1, 2, 3, 4, 5, 4, 5, 0]
    segments_BxL[1] = [0, 0, -1, 0, 0, 3, 3, 1, 3]
    positions_BxL[1] = [50, 51, 0, 52, 90, 91, 92, 91, 93]
    logits_BxLxV = np.asarray(forward(policy, base, tokens_BxL, positions_BxL, segments_BxL))
    assert logits_BxLxV.dtype == np.float32
    for b in range(2):
        want_LxV = reference_logits(policy.config, base, tokens_BxL[b], positions_BxL[b], segments_BxL[b])
        real_L = segments_BxL[b] >= 0
        np.testing.assert_allclose(
            logits_BxLxV[b][real_L], want_LxV[real_L], rtol=0, atol=3e-5 * np.abs(want_LxV).max()
        )


def test_llama3_scaling_touches_slow_frequencies_only():
    plain, scaled = rope_frequencies(LLAMA), rope_frequencies(CONFIGS["llama3"])
    assert scaled[0] == plain[0]  # 10 turns in 64 tokens.
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-6)  # A tenth of a turn.
    assert plain[1] / 8 < scaled[1] < plain[1]  # 2.2 turns: between the two factors.


@pytest.mark.parametrize("scale", [1, 30, 200])
def test_attention_in_blocks_equals_one_softmax(scale):
    """Lines of 11 tokens fit in one block, 330 tokens take several, 2200 take more than the most blocks of 128."""
    rng = np.random.default_rng(3)
    pattern_BxL = np.array([[0] * 4 + [1] * 3 + [2] * 3 + [-1], [-1, 0, 0, 0, 0, 5, 6, 5, 6, 5, 0]], np.int32)
    segments_BxL = np.repeat(pattern_BxL, scale, axis=1)
    (B, L), H, Kv, Dh = segments_BxL.shape, 4, 2, 6
    q, k, v = (rng.normal(size=(B, L, heads, Dh)).astype(np.float32) for heads in (H, Kv, Kv))
    got = np.asarray(jax.jit(attention.attend)(q, k, v, segments_BxL))
    for b, h in np.ndindex(B, H):
        own_Lx1, key_L = segments_BxL[b, :, None], segments_BxL[b]
        visible_LxL = ((key_L == 0) | (key_L == own_Lx1)) & (key_L >= 0) & np.tri(L, dtype=bool)
        w_LxL = np.exp(q[b, :, h].astype(np.float64) @ k[b, :, h // 2].T / np.sqrt(Dh)) * visible_LxL
        real_L = key_L >= 0
        want = (w_LxL @ v[b, :, h // 2])[real_L] / w_LxL.sum(axis=1, keepdims=True)[real_L]
        np.testing.assert_allclose(got[b, real_L, h], want, atol=2e-6)


def test_gradients_follow_the_mask():
    """The hidden state of token i depends on the embedding of token j if and only if i sees j."""
    policy, base = perturbed("llama3")
    segments_L = np.array([0, 0, -1, 0, 1, 1, 2, 1, 2, -1], np.int32)
    L = len(segments_L)
    _, positions_BxL, _ = rows(1, L)
    tokens_BxL = np.arange(L, dtype=np.int32)[None]  # Distinct, so that only token j uses row j of the embedding.
    untied = dataclasses.replace(policy.config, tie_embeddings=False)
    base = {**base, "head": {"kernel": base["embed"]["embedding"].T}}

    def summed_L(embedding_VxD):
        params = {**base, "embed": {"embedding": embedding_VxD}}
        decoder = Policy(untied).bind(params, None)
        return jnp.sum(decoder(tokens_BxL, positions_BxL, segments_L[None]) ** 2, axis=(0, 2))

    grad_LxVxD = np.asarray(jax.jit(jax.jacrev(summed_L))(base["embed"]["embedding"]))
    depends_LxL = np.abs(grad_LxVxD[:, :L]).max(axis=-1) > 0
    for i in np.flatnonzero(segments_L >= 0):
        seen = [j <= i and segments_L[j] >= 0 and segments_L[j] in (0, segments_L[i]) for j in range(L)]
        np.testing.assert_array_equal(depends_LxL[i], seen, err_msg=f"token {i}")


def test_rows_of_padding_give_finite_values_and_gradients():
    policy, base = perturbed("qwen3")
    tokens_BxL, positions_BxL, segments_BxL = rows(2, 6)
    segments_BxL[0] = -1
    segments_BxL[1, 3:] = -1

    def loss(params):
        return jnp.sum(policy.bind(params, None)(tokens_BxL, positions_BxL, segments_BxL) ** 2)

    value, grads = jax.jit(jax.value_and_grad(loss))(base)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_padding_does_not_reach_real_tokens():
    policy, base = perturbed("llama2")
    tokens_BxL, positions_BxL, segments_BxL = rows(1, 7)
    segments_BxL[0] = [0, 0, -1, 0, 0, -1, -1]
    first = np.asarray(forward(policy, base, tokens_BxL, positions_BxL, segments_BxL))
    tokens_BxL[0, [2, 5, 6]] = (tokens_BxL[0, [2, 5, 6]] + 1) % LLAMA.vocab_size
    second = np.asarray(forward(policy, base, tokens_BxL, positions_BxL, segments_BxL))
    np.testing.assert_array_equal(first[0, [0, 1, 3, 4]], second[0, [0, 1, 3, 4]])
    assert np.abs(first[0, 2] - second[0, 2]).max() > 0


PREFIX_LENGTHS = (5, 3)  # Of T = 5: the second row is padded on the right.


def packed_branches(N: int, S: int, T: int = 5):
    """Returns two rows, each a right-padded prefix followed by N branches of S tokens."""
    tokens_BxL, positions_BxL, segments_BxL = rows(2, T + N * S, seed=2)
    for b, length in enumerate(PREFIX_LENGTHS):
        segments_BxL[b] = [0] * length + [-1] * (T - length) + [n + 1 for n in range(N) for _ in range(S)]
        positions_BxL[b] = [*range(T)] + [length + r for _ in range(N) for r in range(S)]
    return tokens_BxL, positions_BxL, segments_BxL


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_prefill_and_decode_equal_the_full_forward(name):
    policy, base = perturbed(name)
    B, T, N, S = 2, 5, 3, 4
    tokens_BxL, positions_BxL, segments_BxL = packed_branches(N, S)
    want_BxLxV = np.asarray(forward(policy, base, tokens_BxL, positions_BxL, segments_BxL))
    tokens_BxNxS = tokens_BxL[:, T:].reshape(B, N, S)
    positions_BxNxS = positions_BxL[:, T:].reshape(B, N, S)

    @jax.jit
    def incremental(base):
        decoder = policy.bind(base, None)
        prefix = tuple(array[:, :T] for array in (tokens_BxL, positions_BxL, segments_BxL))
        hidden_BxTxD, cache = decoder.prefill(*prefix, N, S)

        def step(cache, xs):
            tokens_BxN, positions_BxN, index = xs
            hidden_BxNxD, cache = decoder.decode(tokens_BxN, positions_BxN, cache, index)
            return cache, decoder.logits(hidden_BxNxD)

        xs = (tokens_BxNxS.transpose(2, 0, 1), positions_BxNxS.transpose(2, 0, 1), jnp.arange(S))
        return decoder.logits(hidden_BxTxD), jax.lax.scan(step, cache, xs)[1]

    prefix_BxTxV, logits_SxBxNxV = map(np.asarray, incremental(base))
    atol = 1e-5 * np.abs(want_BxLxV).max()
    valid_BxT = segments_BxL[:, :T] == 0
    np.testing.assert_allclose(prefix_BxTxV[valid_BxT], want_BxLxV[:, :T][valid_BxT], rtol=0, atol=atol)
    got_BxNSxV = logits_SxBxNxV.transpose(1, 2, 0, 3).reshape(B, N * S, -1)
    np.testing.assert_allclose(got_BxNSxV, want_BxLxV[:, T:], rtol=0, atol=atol)


def test_decode_writes_its_slot_and_leaves_the_prefix_alone():
    policy, base = perturbed("llama2")
    tokens_BxL, positions_BxL, segments_BxL = rows(2, 4)
    decoder = policy.bind(base, None)
    _, before = decoder.prefill(tokens_BxL, positions_BxL, segments_BxL, 3, 5)
    assert before.own_k_nxBxKvxNxSxDh.shape == (3, 2, 2, 3, 5, 8)
    assert before.prefix_k_nxBxKvxDhxT.shape == (3, 2, 2, 8, 4)
    _, after = decoder.decode(tokens_BxL[:, :3], jnp.full((2, 3), 4), before, jnp.asarray(2))
    assert after.prefix_k_nxBxKvxDhxT is before.prefix_k_nxBxKvxDhxT
    written_S = np.abs(np.asarray(after.own_v_nxBxKvxNxSxDh)).min(axis=(0, 1, 2, 3, 5)) > 0
    np.testing.assert_array_equal(written_S, [False, False, True, False, False])


def test_a_decode_loop_updates_the_cache_in_place():
    """The loop's temporaries are smaller than a copy of the branches' cache, which dominates memory."""
    policy, base = perturbed("llama2")
    tokens_BxL, positions_BxL, segments_BxL = rows(2, 4)
    N, S = 8, 512

    def loop(base, cache):
        def body(state):
            index, token_BxN, cache = state
            hidden_BxNxD, cache = policy.bind(base, None).decode(token_BxN, jnp.full((2, N), 4) + index, cache, index)
            return index + 1, jnp.argmax(policy.bind(base, None).logits(hidden_BxNxD), -1), cache

        start = (jnp.asarray(0), jnp.zeros((2, N), jnp.argmax(jnp.zeros(1)).dtype), cache)
        return jax.lax.while_loop(lambda state: state[0] < S, body, start)[2]

    _, cache = policy.bind(base, None).prefill(tokens_BxL, positions_BxL, segments_BxL, N, S)
    memory = jax.jit(loop, donate_argnums=1).lower(base, cache).compile().memory_analysis()
    one_layer = cache.own_k_nxBxKvxNxSxDh.nbytes // policy.config.n_layers
    # Keys and values of one layer, each also transposed for its product, and the scores; no copy of all layers.
    assert memory.temp_size_in_bytes < 4.5 * one_layer
    assert memory.alias_size_in_bytes >= 2 * cache.own_k_nxBxKvxNxSxDh.nbytes


def test_a_shared_prefix_equals_separate_sequences():
    policy, base = perturbed("qwen2")
    T, N, S = 5, 3, 4
    packed = packed_branches(N, S)
    separate = [np.zeros((2 * N, T + S), np.int32) for _ in range(3)]
    for b, length in enumerate(PREFIX_LENGTHS):
        for n in range(N):
            at = T + n * S
            row = np.concatenate([packed[0][b, :length], packed[0][b, at : at + S]])
            separate[0][b * N + n, : length + S] = row
            separate[1][b * N + n] = np.arange(T + S)
            separate[2][b * N + n, length + S :] = -1

    def packed_loss(params):
        decoder = policy.bind(params, None)
        branch_BxNxSxV = decoder.logits(decoder(*packed))[:, T:].reshape(2, N, S, -1)
        return jnp.sum(jnp.sin(branch_BxNxSxV)), branch_BxNxSxV

    def separate_loss(params):
        decoder = policy.bind(params, None)
        logits_BNxLxV = decoder.logits(decoder(*separate))
        branches = [
            logits_BNxLxV[b * N + n, length : length + S] for b, length in enumerate(PREFIX_LENGTHS) for n in range(N)
        ]
        branch_BxNxSxV = jnp.stack(branches).reshape(2, N, S, -1)
        return jnp.sum(jnp.sin(branch_BxNxSxV)), branch_BxNxSxV

    (_, got), got_grads = jax.jit(jax.value_and_grad(packed_loss, has_aux=True))(base)
    (_, want), want_grads = jax.jit(jax.value_and_grad(separate_loss, has_aux=True))(base)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert_trees_close(got_grads, want_grads, 5e-5)


def assert_trees_close(got, want, relative):
    """Asserts that every leaf is within `relative` of its largest entry."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        other = functools.reduce(lambda tree, key: tree[key.key], path, got)
        atol = relative * np.abs(leaf).max()
        np.testing.assert_allclose(other, leaf, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_layers_are_scanned_not_unrolled():
    """The compiled program has the same number of products for any number of layers."""

    def products(n_layers):
        policy = Policy(dataclasses.replace(LLAMA, n_layers=n_layers))
        lowered = jax.jit(lambda base: policy.bind(base, None)(*rows(1, 4))).lower(policy.abstract_base())
        return lowered.compile().as_text().count(" dot(")

    assert products(2) == products(6) > 0


def test_bfloat16_computes_in_bfloat16_and_scores_in_float32():
    policy, base = perturbed("llama3")
    half = Policy(dataclasses.replace(policy.config, compute_dtype="bfloat16"))
    batch = rows(2, 6)
    hidden, cache = jax.eval_shape(lambda base: half.bind(base, None).prefill(*batch, 2, 3), base)
    assert hidden.dtype == cache.own_k_nxBxKvxNxSxDh.dtype == jnp.bfloat16
    logits, want = forward(half, base, *batch), np.asarray(forward(policy, base, *batch))
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - want).max() < 0.1 * np.abs(want).max()


def test_the_module_has_the_declared_tree():
    for config in CONFIGS.values():
        module = nnx.eval_shape(lambda config=config: Decoder(config, None, None, rngs=nnx.Rngs(0)))
        state = nnx.to_pure_dict(nnx.split(module)[1])
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), Policy(config).abstract_base())


HUB = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_from_hub_reads_each_family():
    config = ModelConfig.from_hub(HUB, "config.json")
    assert (config.head_dim, config.n_kv_heads, config.rope_theta, config.tie_embeddings) == (64, 3, 100000, True)
    assert not config.qkv_bias and not config.qk_norm and config.rope_scaling is None
    older = ModelConfig.from_hub({**HUB, "rope_scaling": LLAMA3_ROPE}, "config.json")
    newer = {**HUB, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 100000}}
    del newer["rope_theta"]
    assert older.rope_scaling == Llama3RopeScaling(32.0, 1.0, 4.0, 8192)
    assert ModelConfig.from_hub(newer, "config.json") == older
    qwen2 = {**HUB, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}
    assert ModelConfig.from_hub(qwen2, "config.json").qkv_bias
    qwen3 = ModelConfig.from_hub({**HUB, "model_type": "qwen3", "head_dim": 128}, "config.json")
    assert qwen3.qk_norm and qwen3.head_dim == 128


@pytest.mark.parametrize("name", CONFIGS)
def test_to_hub_and_back(name):
    assert ModelConfig.from_hub(CONFIGS[name].to_hub(), "config.json") == CONFIGS[name]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model_type": "mixtral"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096}, "sliding_window"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 30}, "sliding_window"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding_window=4096"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor"),
        ({"rope_scaling": LLAMA3_ROPE, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "flat"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"head_dim": 63}, "head_dim=63"),
    ],
)
def test_from_hub_refuses_unsupported_features(change, names):
    with pytest.raises(UserError, match=names):
        ModelConfig.from_hub({**HUB, **change}, "config.json")


HUB_FIELDS = (
    *HUB, "head_dim", "hidden_act", "rope_scaling", "rope_parameters", "partial_rotary_factor", "attention_bias",
    "mlp_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
    "original_max_position_embeddings",
)  # fmt: skip
HUB_VALUES = (
    None, True, 0, -1, 1, 7, 2**40, 10**400, 0.5, 64.0, -1e-9, 1e300, math.inf, math.nan, "", "64", [], [1], ["x"], {},
    {"a": 1}, {"rope_type": None}, {"rope_type": []}, {"rope_type": "llama3"}, {"rope_theta": "1"}, {"rope_theta": 0},
    *({**LLAMA3_ROPE, field: value} for field in LLAMA3_ROPE for value in (None, "8", 0, True, math.nan, 10**400)),
)  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("field", HUB_FIELDS)
def test_from_hub_takes_no_value_of_a_wrong_type(field, model_type):
    """Every value gives a usable config or one line that names the file and the field."""
    for value in HUB_VALUES:
        try:
            config = ModelConfig.from_hub({**HUB, "model_type": model_type, field: value}, "config.json")
        except UserError as error:
            line = str(error)
            assert line.startswith("config.json: ") and "\n" not in line and len(line) < 250, line
            assert field in line or "head" in line or "rope" in line or "sliding" in line, line
        else:
            sizes = (config.vocab_size, config.d_model, config.n_layers, config.n_heads, config.n_kv_heads)
            sizes += (config.head_dim, config.d_ff, config.max_length)
            assert all(type(size) is int and 0 < size <= 2**31 for size in sizes)
            assert np.isfinite(rope_frequencies(config)).all() and 0 < config.norm_eps < 1e30
            assert type(config.tie_embeddings) is bool


def test_from_hub_names_the_file_and_the_missing_field():
    hub = {name: value for name, value in HUB.items() if name != "hidden_size"}
    with pytest.raises(UserError, match="some/config.json: hidden_size"):
        ModelConfig.from_hub(hub, "some/config.json")
