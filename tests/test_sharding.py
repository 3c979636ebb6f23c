"""The mesh and the rules; a sharded model equals a model on one device (8 virtual CPU devices)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

from popi_jax.errors import UserError
from popi_jax.model import sharding, weights
from popi_jax.model.config import LORA_TARGETS, LoraConfig, ModelConfig
from popi_jax.model.policy import Policy
from popi_jax.modes.cost import traffic

CONFIG = ModelConfig(
    vocab_size=32,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=24,
    tie_embeddings=True,
    qkv_bias=True,
)
CASES = [("full", (2, 2, 2)), ("full", (8, 1, 1)), ("full", (1, 8, 1)), ("lora", (2, 2, 2))]
POLICIES = {"full": Policy(CONFIG), "lora": Policy(CONFIG, LoraConfig(4, 8.0, LORA_TARGETS))}


def rows(batch=8, length=6):
    tokens_BxL = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (batch, length)).astype(np.int32)
    segments_BxL = np.zeros((batch, length), np.int32)
    segments_BxL[::3, -2:] = -1
    return tokens_BxL, np.tile(np.arange(length, dtype=np.int32), (batch, 1)), segments_BxL


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(policy, base, delta, batch):
    def loss(delta):
        decoder = policy.bind(base, delta)
        logits_BxLxV = decoder.logits(decoder(*batch))
        return jnp.mean(jnp.where(batch[2][..., None] >= 0, jnp.sin(logits_BxLxV), 0.0)), logits_BxLxV

    (value, logits_BxLxV), grads = jax.value_and_grad(loss, has_aux=True)(delta)
    return value, logits_BxLxV, grads


def param_shardings(policy, mesh):
    return policy.base_shardings(mesh), policy.delta_shardings(mesh)


def trees(policy):
    rng = np.random.default_rng(1)

    def draw(leaf):
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree.map(draw, policy.abstract_base()), jax.tree.map(draw, policy.abstract_delta())


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_a_sharded_model_equals_one_device(name, sizes):
    policy = POLICIES[name]
    base, delta = trees(policy)
    want = loss_and_grads(policy, base, delta, rows())
    mesh = sharding.make_mesh(*sizes)
    base_shardings, delta_shardings = param_shardings(policy, mesh)
    base = jax.device_put(base, base_shardings)
    delta = jax.device_put(delta, delta_shardings)
    batch = jax.device_put(rows(), sharding.batch_sharding(mesh))
    q_piece = CONFIG.d_model // sizes[1], CONFIG.n_heads // sizes[2]
    assert base["layers"]["q"]["kernel"].addressable_shards[0].data.shape == (2, *q_piece, 8)
    got = loss_and_grads(policy, base, delta, batch)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-6), got[2], want[2])


def test_activations_are_split_by_rows():
    policy = POLICIES["full"]
    base, _ = trees(policy)
    want = policy.bind(base, None)(*rows())
    mesh = sharding.make_mesh(2, 2, 2)
    base = jax.device_put(base, param_shardings(policy, mesh)[0])
    batch = jax.device_put(rows(), sharding.batch_sharding(mesh))

    def forward(policy, base):
        return policy.bind(base, None)(*batch)

    split = dataclasses.replace(policy, mesh=mesh)
    assert "sharding_constraint" in str(jax.make_jaxpr(forward, static_argnums=0)(split, base))
    got = jax.jit(forward, static_argnums=0)(split, base)
    with pytest.raises(UserError, match="'batch' of size 3 does not divide over mesh.data=2 x mesh.fsdp=2"):
        jax.eval_shape(lambda b: split.bind(b, None)(*rows(3)), base)
    assert "sharding_constraint" not in str(jax.make_jaxpr(forward, static_argnums=0)(policy, base))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert got.sharding.is_equivalent_to(sharding.batch_sharding(mesh), got.ndim)


def test_sharded_decode_equals_one_device():
    policy = POLICIES["full"]
    base, _ = trees(policy)
    batch = rows()

    @jax.jit
    def decode(base, batch):
        decoder = policy.bind(base, None)
        _, cache = decoder.prefill(*batch, 3, 2)
        for index in range(2):
            hidden_BxNxD, cache = decoder.decode(
                batch[0][:, :3], jnp.full((8, 3), 6 + index), cache, jnp.asarray(index)
            )
        return hidden_BxNxD

    want = decode(base, batch)
    mesh = sharding.make_mesh(2, 2, 2)
    base = jax.device_put(base, param_shardings(policy, mesh)[0])
    got = decode(base, jax.device_put(batch, sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_decoding_sends_rows_instead_of_weights():
    """Decoding uses the pieces of a weight that fsdp splits in place; a batch of many tokens gathers them."""
    policy = Policy(dataclasses.replace(CONFIG, d_model=64, d_ff=256, vocab_size=512))
    base, _ = trees(policy)
    batch = rows(8, 64)

    @functools.partial(jax.jit, static_argnums=0)
    def prefill(policy, base, batch):
        return policy.bind(base, None).prefill(*batch, 1, 2)[1]

    @functools.partial(jax.jit, static_argnums=0)
    def decode(policy, base, cache):
        decoder = policy.bind(base, None)
        hidden_BxNxD, _ = decoder.decode(jnp.full((8, 1), 3), jnp.full((8, 1), 64), cache, jnp.asarray(0))
        return decoder.logits(hidden_BxNxD)

    want = decode(policy, base, prefill(policy, base, batch))
    mesh = sharding.make_mesh(1, 8, 1)
    base = jax.device_put(base, param_shardings(policy, mesh)[0])
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    split = dataclasses.replace(policy, mesh=mesh)
    cache = prefill(split, base, batch)
    got = decode(split, base, cache)
    texts = [fn.lower(split, base, rest).compile().as_text() for fn, rest in ((prefill, batch), (decode, cache))]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    read, decoded = (traffic.measure(text).collectives for text in texts)
    layers = sum(x.nbytes for x in jax.tree.leaves(base["layers"]))
    assert read["all-gather"].bytes > 0.8 * layers
    assert 0 < sum(sent.bytes for sent in decoded.values()) < 0.5 * layers
    # A sum over the pieces is sent to the devices of its rows, not to all.
    assert "all-reduce" not in decoded or decoded["all-reduce"].bytes < 0.1 * decoded["reduce-scatter"].bytes


@pytest.mark.parametrize(
    ("kind", "sizes"), [("lora", (1, 8, 1)), ("lora", (2, 2, 2)), ("full", (2, 4, 1)), ("full", (2, 2, 2))]
)
def test_sent_rows_give_the_results_of_one_device(kind, sizes):
    """Logits of a decoded token, and gradients of all trained weights; 8 rows are too few to gather any weight."""
    policy = dataclasses.replace(
        POLICIES[kind], config=dataclasses.replace(CONFIG, d_model=64, d_ff=256, vocab_size=512, qkv_bias=True)
    )
    base, delta = trees(policy)
    batch = rows()

    def total(delta, base, batch, policy):
        decoder = policy.bind(base, delta)
        _, cache = decoder.prefill(*batch, 1, 2)
        hidden_BxNxD, _ = decoder.decode(batch[0][:, :1], jnp.full((8, 1), 6), cache, jnp.asarray(0))
        logits_BxNxV = decoder.logits(hidden_BxNxD)
        return jnp.mean(jnp.sin(logits_BxNxV)), logits_BxNxV

    step = jax.value_and_grad(total, has_aux=True)
    want = jax.jit(step, static_argnums=3)(delta, base, batch, policy)
    mesh = sharding.make_mesh(*sizes)
    base, delta = jax.device_put((base, delta), param_shardings(policy, mesh))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    split = dataclasses.replace(policy, mesh=mesh)
    assert "reduce_scatter" in str(jax.make_jaxpr(step, static_argnums=3)(delta, base, batch, split))
    got = jax.jit(step, static_argnums=3)(delta, base, batch, split)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max()), got, want)


def test_embeddings_are_looked_up_in_pieces(capfd):
    """The compiler reshards pieces of the table to rows of the stream, and back, without replicating either.

    It warns if it cannot.
    """
    policy = POLICIES["full"]
    base, _ = trees(policy)

    def total(base, batch, policy):
        return jnp.mean(jnp.square(policy.bind(base, None)(*batch)))

    want = jax.jit(jax.value_and_grad(total), static_argnums=2)(base, rows(), policy)
    mesh = sharding.make_mesh(2, 4, 1)
    shardings = param_shardings(policy, mesh)[0]
    step = jax.jit(jax.value_and_grad(total), static_argnums=2, out_shardings=(None, shardings))
    placed = jax.device_put(rows(), sharding.batch_sharding(mesh))
    got = step(jax.device_put(base, shardings), placed, dataclasses.replace(policy, mesh=mesh))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)
    assert "rematerialization" not in capfd.readouterr().err


def test_initial_weights_do_not_depend_on_the_mesh():
    declared = {"gate": weights.Weight((2, 16, 24), ("layers", "embed", "mlp"), 1.0)}
    shardings = sharding.param_shardings(
        weights.axes_tree(declared), weights.abstract_tree(declared), sharding.make_mesh(2, 2, 2)
    )
    want = weights.init_tree(declared, jax.random.key(3))
    got = jax.jit(lambda key: weights.init_tree(declared, key), out_shardings=shardings)(jax.random.key(3))
    np.testing.assert_allclose(got["gate"], want["gate"], rtol=1e-6)
    assert got["gate"].addressable_shards[0].data.shape == (2, 8, 12)


@pytest.mark.parametrize(
    ("sizes", "shape"), [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, -1), (1, 4, 2))]
)
def test_minus_one_takes_the_remaining_devices(sizes, shape):
    mesh = sharding.make_mesh(*sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_smaller_mesh_takes_the_first_devices():
    assert list(sharding.make_mesh(1, 2, 1).devices.flat) == jax.devices()[:2]
    assert list(sharding.make_mesh(-1, 1, 1, jax.devices()[4:6]).devices.flat) == jax.devices()[4:6]


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (16, 1, 1), (-1, -1, 1), (0, 1, 1), (-2, 1, 1)])
def test_bad_meshes_raise_a_user_error(sizes):
    with pytest.raises(UserError, match=f"mesh.data={sizes[0]}, mesh.fsdp={sizes[1]}, mesh.tensor={sizes[2]}"):
        sharding.make_mesh(*sizes)


@pytest.mark.parametrize(
    ("change", "sizes", "message"),
    [
        ({"n_kv_heads": 2}, (2, 1, 4), "layers/k/.*: 'kv_heads' of size 2 does not divide over mesh.tensor=4"),
        ({"d_model": 20}, (1, 8, 1), "embed/embedding: 'embed' of size 20 does not divide over mesh.fsdp=8"),
        ({"vocab_size": 33}, (2, 2, 2), "embed/embedding: 'vocab' of size 33 does not divide over mesh.tensor=2"),
    ],
)
def test_indivisible_weights_raise_naming_weight_axis_and_sizes(change, sizes, message):
    policy = Policy(dataclasses.replace(CONFIG, **change))
    with pytest.raises(UserError, match=message):
        param_shardings(policy, sharding.make_mesh(*sizes))


def test_two_axes_on_one_mesh_axis_raise():
    abstract = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    with pytest.raises(UserError, match="w: 'heads' and 'mlp' both lie on mesh axis 'tensor'"):
        sharding.param_shardings({"w": ("heads", "mlp")}, abstract, sharding.make_mesh(2, 2, 2))


def test_optimizer_moments_are_sharded_like_their_weights():
    policy = POLICIES["full"]
    mesh = sharding.make_mesh(2, 2, 2)
    shardings = param_shardings(policy, mesh)[1]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 10)))
    opt_shardings = sharding.optimizer_shardings(tx, policy.abstract_delta(), shardings, mesh)
    params = jax.device_put(trees(policy)[1], shardings)
    state = jax.jit(tx.init, out_shardings=opt_shardings)(params)
    adam = state[1][0]
    for moment in (adam.mu, adam.nu):
        jax.tree.map(lambda leaf, weight: leaf.sharding == weight.sharding or pytest.fail(str(leaf)), moment, params)
    assert adam.count.sharding == sharding.replicated(mesh)
    assert adam.mu["layers"]["q"]["kernel"].addressable_shards[0].data.shape == (2, 8, 2, 8)
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(opt_shardings))
