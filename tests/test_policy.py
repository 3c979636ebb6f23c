"""Base and delta under one interface: adapters, full copies, the frozen reference, fusion."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from popi_jax.errors import UserError
from popi_jax.model import sharding, weights
from popi_jax.model.config import LORA_TARGETS, LoraConfig, ModelConfig
from popi_jax.model.policy import Policy

CONFIG = ModelConfig(
    vocab_size=31, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=20, qkv_bias=True, qk_norm=True
)
LORA = LoraConfig(rank=3, alpha=6.0, targets=LORA_TARGETS)
FULL = Policy(CONFIG)
ADAPTED = Policy(CONFIG, LORA)
POLICIES = {"full": FULL, "lora": ADAPTED, "some": Policy(CONFIG, LoraConfig(2, 1.0, ("q", "o", "down")))}

TOKENS_BxL = np.random.default_rng(0).integers(0, 31, (2, 7)).astype(np.int32)
POSITIONS_BxL = np.tile(np.arange(7, dtype=np.int32), (2, 1))
SEGMENTS_BxL = np.zeros((2, 7), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits(policy, base, delta):
    decoder = policy.bind(base, delta)
    return decoder.logits(decoder(TOKENS_BxL, POSITIONS_BxL, SEGMENTS_BxL))


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), tree)


BASE = random_like(FULL.abstract_base(), 0)


@pytest.mark.parametrize("name", POLICIES)
def test_a_fresh_delta_changes_nothing(name):
    policy = POLICIES[name]
    delta = policy.init_delta(BASE, jax.random.key(0))
    np.testing.assert_allclose(logits(policy, BASE, delta), logits(policy, BASE, None), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(logits(policy, BASE, None), logits(FULL, BASE, None))


@pytest.mark.parametrize("name", ["lora", "some"])
def test_fused_equals_the_adapter(name):
    policy = POLICIES[name]
    delta = random_like(policy.abstract_delta(), 1)
    adapted = logits(policy, BASE, delta)
    np.testing.assert_allclose(logits(FULL, policy.fuse(BASE, delta), None), adapted, rtol=1e-4, atol=1e-4)
    assert np.abs(adapted - logits(policy, BASE, None)).max() > 0.03


def test_adapters_add_their_scaled_products():
    """By hand: each kernel plus alpha / rank times a b."""
    delta = random_like(ADAPTED.abstract_delta(), 2)
    letters = {"q": "ndr,nrhk->ndhk", "k": "ndr,nrhk->ndhk", "v": "ndr,nrhk->ndhk", "o": "nhkr,nrd->nhkd"}
    letters |= {"gate": "ndr,nrf->ndf", "up": "ndr,nrf->ndf", "down": "nfr,nrd->nfd"}
    layers = dict(BASE["layers"])
    for target in LORA_TARGETS:
        a, b = (np.asarray(delta["layers"][target][name], np.float64) for name in ("a", "b"))
        kernel = np.asarray(layers[target]["kernel"], np.float64) + 6.0 / 3 * np.einsum(letters[target], a, b)
        layers[target] = {**layers[target], "kernel": jnp.asarray(kernel, jnp.float32)}
    by_hand = {**BASE, "layers": layers}
    np.testing.assert_allclose(logits(FULL, by_hand, None), logits(ADAPTED, BASE, delta), rtol=1e-4, atol=1e-4)


def test_full_delta_is_the_weights_and_base_is_ignored():
    delta = random_like(FULL.abstract_delta(), 3)
    nans = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), BASE)
    np.testing.assert_array_equal(logits(FULL, nans, delta), logits(FULL, delta, None))
    assert FULL.fuse(nans, delta) is delta


def test_full_delta_is_a_copy_that_may_be_donated():
    delta = FULL.init_delta(BASE, jax.random.key(0))
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(delta)
    assert np.isfinite(logits(FULL, BASE, None)).all()


@pytest.mark.parametrize("name", ["full", "lora"])
def test_gradients_equal_finite_differences(name):
    policy = POLICIES[name]
    delta = jax.tree.map(lambda leaf: leaf / 3, random_like(policy.abstract_delta(), 4))
    direction = random_like(policy.abstract_delta(), 5)

    @jax.jit
    @jax.value_and_grad
    def loss(delta):
        return jnp.mean(jnp.sin(logits(policy, BASE, delta)))

    step = 3e-3
    ahead, behind = (jax.tree.map(lambda leaf, way, s=s: leaf + s * way, delta, direction) for s in (step, -step))
    along = sum(jnp.vdot(g, way) for g, way in zip(*map(jax.tree.leaves, (loss(delta)[1], direction)), strict=True))
    np.testing.assert_allclose(along, (loss(ahead)[0] - loss(behind)[0]) / (2 * step), rtol=2e-2, atol=1e-4)


def test_a_fresh_adapter_has_gradients_at_b_only():
    delta = ADAPTED.init_delta(BASE, jax.random.key(0))
    grads = jax.grad(lambda d: jnp.sum(logits(ADAPTED, BASE, d) ** 2))(delta)
    for adapter in grads["layers"].values():
        assert np.abs(adapter["b"]).max() > 0
        assert np.abs(adapter["a"]).max() == 0


@pytest.mark.parametrize("name", POLICIES)
def test_abstract_trees_and_shardings_match_the_weights(name):
    policy, mesh = POLICIES[name], sharding.make_mesh(1, 1, 1)
    base = jax.eval_shape(policy.init_base, jax.random.key(0))
    delta = jax.eval_shape(policy.init_delta, base, jax.random.key(1))
    made = (
        (base, policy.abstract_base(), policy.base_shardings(mesh)),
        (delta, policy.abstract_delta(), policy.delta_shardings(mesh)),
    )
    for tree, abstract, shardings in made:
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), abstract
        )
        jax.tree.map(lambda leaf, own: len(own.spec) == leaf.ndim or pytest.fail(str(own)), tree, shardings)
    spec = ADAPTED.delta_shardings(mesh)["layers"]["o"]["a"].spec
    assert spec == PartitionSpec(None, ("tensor",), None, None)  # Layers, heads, head_dim, rank.


def test_shapes_of_the_parameter_trees():
    n, D, H, Kv, Dh, F, V, r = 2, 12, 4, 2, 6, 20, 31, 3
    shapes = jax.tree.map(lambda leaf: leaf.shape, FULL.abstract_base(), is_leaf=lambda x: hasattr(x, "shape"))
    layers = {
        "attn_norm": {"scale": (n, D)},
        "q": {"kernel": (n, D, H, Dh), "bias": (n, H, Dh)},
        "k": {"kernel": (n, D, Kv, Dh), "bias": (n, Kv, Dh)},
        "v": {"kernel": (n, D, Kv, Dh), "bias": (n, Kv, Dh)},
        "o": {"kernel": (n, H, Dh, D)},
        "q_norm": {"scale": (n, Dh)},
        "k_norm": {"scale": (n, Dh)},
        "mlp_norm": {"scale": (n, D)},
        "gate": {"kernel": (n, D, F)},
        "up": {"kernel": (n, D, F)},
        "down": {"kernel": (n, F, D)},
    }
    outside = {"embed": {"embedding": (V, D)}, "final_norm": {"scale": (D,)}, "head": {"kernel": (D, V)}}
    assert shapes == {**outside, "layers": layers}
    delta = jax.tree.map(lambda leaf: leaf.shape, ADAPTED.abstract_delta())["layers"]
    assert set(delta) == set(LORA_TARGETS)
    assert delta["q"] == {"a": (n, D, r), "b": (n, r, H, Dh)}
    assert delta["o"] == {"a": (n, H, Dh, r), "b": (n, r, D)}
    assert delta["down"] == {"a": (n, F, r), "b": (n, r, D)}


def test_initial_weights_depend_only_on_their_path():
    """Weights have the declared spread, differ from each other, and do not change when another is added."""
    base = FULL.init_base(jax.random.key(7))
    tied = Policy(dataclasses.replace(CONFIG, tie_embeddings=True)).init_base(jax.random.key(7))
    np.testing.assert_array_equal(tied["layers"]["q"]["kernel"], base["layers"]["q"]["kernel"])
    assert np.abs(base["layers"]["gate"]["kernel"] - base["layers"]["up"]["kernel"]).max() > 0
    wide = Policy(dataclasses.replace(CONFIG, d_model=256, d_ff=300)).init_base(jax.random.key(0))
    np.testing.assert_allclose(np.std(wide["layers"]["gate"]["kernel"]), 256**-0.5, rtol=0.02)
    np.testing.assert_allclose(np.std(wide["layers"]["down"]["kernel"]), (300 * 4) ** -0.5, rtol=0.02)


def test_a_policy_is_a_static_argument_and_traces_once():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def program(policy, base, delta):
        traces.append(policy)
        return policy.bind(base, delta)(TOKENS_BxL, POSITIONS_BxL, SEGMENTS_BxL)

    for seed in (0, 1):
        policy = Policy(dataclasses.replace(CONFIG), dataclasses.replace(LORA))
        program(policy, BASE, policy.init_delta(BASE, jax.random.key(seed)))
    assert len(traces) == 1
    assert hash(Policy(CONFIG, LoraConfig(3, 6.0, list(LORA_TARGETS)))) == hash(ADAPTED)


@pytest.mark.parametrize(("rank", "targets"), [(0, ("q",)), (4, ()), (4, ("q", "head"))])
def test_bad_adapters_raise_a_user_error(rank, targets):
    with pytest.raises(UserError, match="lora"):
        LoraConfig(rank, 1.0, targets)


def test_trees_that_share_a_leaf_do_not_merge():
    with pytest.raises(ValueError, match="kernel"):
        weights.merge_trees({"q": {"kernel": 1}}, {"q": {"kernel": 2}})
