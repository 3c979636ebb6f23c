"""Rematerialisation: every choice computes the same function, in less memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.config import parse
from popi_jax.configs import quickstart
from popi_jax.errors import UserError
from popi_jax.model import remat
from popi_jax.model.config import LORA_TARGETS, LoraConfig, ModelConfig
from popi_jax.model.policy import Policy
from popi_jax.modes.cost import flops

# Long enough for attention's scores to dominate memory, as they do when rematerialisation matters.
B, L = 4, 128
CONFIG = ModelConfig(vocab_size=9, d_model=16, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=8, d_ff=32)
NAMES = list(remat.CHOICES)


def batch():
    tokens_BxL = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, L)).astype(np.int32)
    return tokens_BxL, np.tile(np.arange(L, dtype=np.int32), (B, 1)), np.zeros((B, L), np.int32)


@functools.cache
def compiled(name, n_layers=CONFIG.n_layers):
    """Returns the compiled value and gradient of a loss with respect to base and adapter, and these weights."""
    policy = Policy(dataclasses.replace(CONFIG, remat=name, n_layers=n_layers), LoraConfig(2, 4.0, LORA_TARGETS))
    rng = np.random.default_rng(0)

    def draw(leaf):
        return rng.normal(0.0, 0.3, leaf.shape).astype(np.float32)

    weights = jax.tree.map(draw, (policy.abstract_base(), policy.abstract_delta()))

    def loss(weights):
        return jnp.mean(jnp.sin(policy.bind(*weights)(*batch())))

    return jax.jit(jax.value_and_grad(loss)).lower(weights).compile(), weights


def planned(name, n_layers=CONFIG.n_layers):
    """Returns the bytes of temporaries that the compiler plans."""
    return compiled(name, n_layers)[0].memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_is_the_same_function(name):
    (fn, weights), (plain, _) = compiled(name), compiled("none")
    value, grads = fn(weights)
    want, want_grads = plain(weights)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    # The same sums, but the compiler may fuse them in another order.
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=1e-6 * np.abs(w).max()), grads, want_grads)


def test_each_choice_stores_less_than_the_previous():
    none, dots, full = (planned(name) for name in NAMES)
    layer_inputs = CONFIG.n_layers * B * L * CONFIG.d_model * 4
    assert layer_inputs < full < 0.8 * dots
    assert dots < 0.9 * none


@pytest.mark.parametrize("name", NAMES)
def test_no_choice_stores_attention_scores(name):
    more_layers = planned(name, 2 * CONFIG.n_layers) - planned(name)
    assert more_layers < CONFIG.n_layers * B * CONFIG.n_heads * L * L * 4  # Less than one array of scores per layer.


def test_recomputed_flops_by_hand():
    def products(name):
        policy = Policy(dataclasses.replace(CONFIG, remat=name))

        def loss(base):
            return jnp.sum(policy.bind(base, None)(*batch()))

        traced = jax.make_jaxpr(jax.grad(loss))(policy.abstract_base())
        return flops.count(traced, recomputed=False), flops.count(traced)

    n, D, F, H, Kv, Dh = 4, 16, 32, 8, 2, 8
    scores = 2 * n * B * H * L * L * Dh  # The average of the values takes the same.
    # Without `down`, which ends a layer: its result is not needed.
    weights = 2 * n * B * L * (2 * D * H * Dh + 2 * D * Kv * Dh + 2 * D * F)
    own = {name: products(name) for name in NAMES}
    assert len({once for once, _ in own.values()}) == 1  # The model's own work is the same for each.
    # Attention's backward pass recomputes its scores; "full" recomputes the whole layer before that.
    assert {name: executed - once for name, (once, executed) in own.items()} == {
        "none": scores,
        "dots": scores,
        "full": 3 * scores + weights,
    }


def test_unknown_names_raise_a_user_error():
    with pytest.raises(UserError, match="model.remat='layers': choose one of none, dots, full"):
        dataclasses.replace(CONFIG, remat="layers")
    config = quickstart.get_config("runlocal")
    config.model.remat = "True"  # The value that the flag --config.model.remat=True sets.
    with pytest.raises(UserError, match="config.model.remat is 'True'; choose one of none, dots, full"):
        parse(config)
    with pytest.raises(TypeError, match="remat"):
        config.model.remat = True
