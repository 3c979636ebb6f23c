"""The train steps: rewards, accumulation, which model each step updates, one trace, sharding."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from popi_jax.config import changed, parse
from popi_jax.configs import quickstart
from popi_jax.data.batch import Batch, GeneratorBatch, InferenceBatch
from popi_jax.model import sharding
from popi_jax.model.policy import Policy
from popi_jax.modes import programs
from popi_jax.training import scoring, steps
from popi_jax.training.steps import Settings
from tests import tiny

U, K, M = 4, 3, 2


@functools.cache
def settings(lora=None, **changes) -> Settings:
    policy = tiny.policy(lora)
    fields = {
        "policy": policy,
        "tx_phi": optax.sgd(0.1),
        "tx_theta": optax.sgd(0.1),
        "loss": "dpo",
        "beta": 0.1,
        "logp_reduction": "sum",
        "advantage": "rloo",
        "baseline_decay": 0.9,
        "kl": "exact",
        "kl_coef": 0.1,
        "kl_decay": 0.0,
        "total_steps": 10,
        "least_reward": -np.inf,
        "temperature": 1.0,
        "seed": 0,
    }
    return Settings(**(fields | changes))


def test_method_without_an_inference_model_has_no_phi():
    config = settings(tx_phi=None)
    base = config.policy.init_base(jax.random.key(0))
    own, both = (steps.init_state(jax.random.key(1), base, c) for c in (config, settings()))
    assert own.phi is None and own.opt_phi is None
    assert_close(own.theta, both.theta)
    assert config.policy.fuse(base, None) is base
    experiment = parse(quickstart.get_config())
    for method in ("popi", "zero_shot_summary", "raw_signals", "oracle", "population"):
        own = programs.make_settings(changed(experiment, {"method": method}), config.policy)
        assert (own.tx_phi is None) == (method != "popi")


def world(config: Settings, seed=0, users=U, empty=False, n_bins=0, shards=1, micros=(1, 1)):
    """Returns a base model, a state that differs from it, and a batch of users with texts of random lengths.

    The batch's `learned` has the rows of each user's first summary. With `empty` some rows are padding. `micros` are
    the numbers of micro-batches of the inference model and the generator.
    """
    rng = np.random.default_rng(seed)
    base = config.policy.init_base(jax.random.key(0))
    state = steps.init_state(jax.random.key(1), base, config)
    state = dataclasses.replace(state, phi=tiny.perturbed(state.phi, 2, 0.1), theta=tiny.perturbed(state.theta, 3, 0.1))
    rows = tiny.rows(rng, users, K, 6, 4)
    if empty:
        rows.prefix_length_B[3] = 0
    more_UxK = np.zeros((users, K), np.float32)
    inference = stack(InferenceBatch(rows, rng.normal(-2, 1, (users, K, 4)).astype(np.float32), more_UxK), micros[0])
    ref = rng.normal(-9, 1, (users * K * M, 2)).astype(np.float32)
    lines = tiny.rows(rng, users * K * M, 2, 5, 4)
    if empty:
        lines.prefix_length_B[:5] = lines.branch_length_BxN[:5] = 0
    shape = {"micros": micros[1], "n_bins": n_bins, "shards": shards}
    learned = rows_of(*of_summary(0, lines, ref), **shape)
    return base, state, Batch(rows_of(lines, ref, **shape), inference, learned)


def rows_of(lines, ref, micros=1, **shape) -> GeneratorBatch:
    """Returns these rows as a stack of micro-batches."""
    packed = tiny.packed(lines, 24, micros=micros, **shape)
    weight_AxR = weights(lines) * (packed.length_RxN > 0).any(axis=-1)
    return GeneratorBatch(packed, np.broadcast_to(ref, (micros, *ref.shape)), weight_AxR)


def stack(batch, micros):
    return jax.tree.map(lambda x: x.reshape(micros, -1, *x.shape[1:]), batch)


def weights(lines):
    """Returns the weight of each row: M over the number of the user's queries, 0 at padding."""
    valid_UKxM = (lines.branch_length_BxN.sum(axis=1) > 0).reshape(-1, M)
    return (valid_UKxM * M / np.maximum(valid_UKxM.sum(axis=1, keepdims=True), 1)).ravel().astype(np.float32)


def of_summary(k, lines, ref):
    """Returns the rows of each user's summary k, from all rows (u, k, m)."""
    own = np.arange(len(ref)).reshape(-1, K, M)[:, k].ravel()
    return jax.tree.map(lambda x: x[own], lines), ref[own]


def from_all(batch):
    """Returns the same batch, with theta learning from all of its rows."""
    return dataclasses.replace(batch, learned=None)


@functools.cache  # Compilation dominates the time of these tests: compile each step once per settings.
def jitted(fn, config):
    return jax.jit(functools.partial(fn, settings=config))


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("micros", [(4, 1), (1, 8), (2, 4)])
@pytest.mark.parametrize(
    ("fn", "part"),
    [(steps.joint_step, from_all), (steps.joint_step, lambda batch: batch), (steps.inference_step, from_all)],
    ids=["joint", "joint_first", "inference"],
)
def test_micro_batches_equal_one_batch(fn, part, micros):
    config = settings(tiny.LORA)
    base, state, batch_1 = world(config, empty=True)  # With unequal counts, a mean of means would differ.
    _, _, batch_4 = world(config, empty=True, micros=micros)
    state_1, metrics_1 = jitted(fn, config)(state, base, part(batch_1))
    state_4, metrics_4 = jitted(fn, config)(state, base, part(batch_4))
    assert_close(metrics_1, {name: metrics_4[name] for name in metrics_1}, rtol=1e-4)
    assert set(metrics_4) - set(metrics_1) <= {"grad_signal_inference", "grad_noise_inference"}  # One batch gives none.
    assert_close((state_1.phi, state_1.theta), (state_4.phi, state_4.theta))


def test_signal_and_noise_of_the_gradient_come_from_its_micro_batches():
    """From the gradients of each user alone: their mean, and how far it would be from that of other such users."""
    config = dataclasses.replace(settings(tiny.LORA), kl_coef=0.0)
    base, state, batch = world(config, micros=(U, 1))
    _, metrics = jitted(steps.inference_step, config)(state, base, from_all(batch))
    loss_R = steps.generator_loss(state.theta, base, jax.tree.map(lambda x: x[0], batch.generator), config)[1][0]
    reward_UxK = steps.summary_rewards(loss_R, batch.generator.weight_R[0], U, K)

    def gradient(u):
        one = jax.tree.map(lambda x: x[u], batch.inference)
        grads = jax.grad(lambda phi: steps.inference_loss(phi, base, one, reward_UxK[u : u + 1], 0.0, 0.0, config)[0])
        leaves = jax.tree.leaves(grads(state.phi))
        return np.concatenate([np.ravel(leaf) for leaf in leaves]) / K

    gradient_UxP = np.stack([gradient(u) for u in range(U)])
    noise = gradient_UxP.var(axis=0, ddof=1).sum() / U
    np.testing.assert_allclose(metrics["grad_noise_inference"], noise, rtol=1e-3)
    signal = (gradient_UxP.mean(axis=0) ** 2).sum() - noise
    np.testing.assert_allclose(metrics["grad_signal_inference"], signal, rtol=1e-3)


def test_each_step_updates_only_its_models():
    config = settings(tiny.LORA)
    base, state, batch = world(config)
    moved = {}
    for name, fn, rows in (
        ("joint", steps.joint_step, from_all(batch)),
        ("inference", steps.inference_step, from_all(batch)),
        ("generator", steps.generator_step, Batch(batch.generator)),
    ):
        new, _ = jitted(fn, config)(state, base, rows)
        gaps = [
            jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), t, s)
            for t, s in ((new.phi, state.phi), (new.theta, state.theta))
        ]
        moved[name] = tuple(max(jax.tree.leaves(gap)) > 0 for gap in gaps)
        assert int(new.step) == 1
    assert moved == {"joint": (True, True), "inference": (True, False), "generator": (False, True)}


@pytest.mark.parametrize("learned", ["all", "first"])
def test_joint_step_equals_both_steps_on_the_same_batch(learned):
    config = settings(tiny.LORA)
    base, state, batch = world(config)
    joint, metrics = jitted(steps.joint_step, config)(state, base, from_all(batch) if learned == "all" else batch)
    inference, alone = jitted(steps.inference_step, config)(state, base, from_all(batch))
    rows = batch.generator if learned == "all" else batch.learned
    generator, _ = jitted(steps.generator_step, config)(state, base, Batch(rows))
    assert_close(joint.phi, inference.phi)
    assert_close(joint.theta, generator.theta)
    np.testing.assert_allclose(metrics["loss"], alone["loss"], rtol=1e-6)  # The logged loss is over all rows.


def test_gradient_of_one_summary_per_user_is_unbiased():
    # Averaged over which summary is learned from, theta's gradient is that of all rows.
    config = settings(tiny.LORA)
    base, state, batch = world(config)
    inference, ref = batch.inference, batch.generator.ref_logp_Rx2[0]
    lines = tiny.rows(np.random.default_rng(5), U * K * M, 2, 5, 4)
    everything = rows_of(lines, ref)
    step = jitted(steps.joint_step, config)
    whole, _ = step(state, base, Batch(everything, inference))
    moves = []
    for k in range(K):
        learned = rows_of(*of_summary(k, lines, ref))
        moves.append(step(state, base, Batch(everything, inference, learned))[0].theta)
    assert_close(jax.tree.map(lambda *leaves: sum(leaves) / K, *moves), whole.theta)


def test_rewards_by_hand():
    loss_R = jnp.array([1.0, 3.0, 5.0, 7.0, 2.0, 4.0, 6.0, 8.0])  # (u, k, m), 2 x 2 x 2
    weight_R = jnp.array([1.0, 1.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0])  # One query of the second summary is padding.
    np.testing.assert_allclose(steps.summary_rewards(loss_R, weight_R, 2, 2), [[-2.0, -5.0], [-3.0, -7.0]])


def test_users_have_equal_weight_whatever_their_number_of_queries():
    """Theta's loss is minus the mean over users of phi's rewards, POPI section 3."""
    config = settings(tiny.LORA)
    base, state, batch = world(config)
    inference, generator = batch.inference, batch.generator
    lines = tiny.rows(np.random.default_rng(5), U * K * M, 2, 5, 4)
    few = np.arange(U * K * M).reshape(U, K, M)[0, :, 1:].ravel()  # The first user has one query.
    lines.prefix_length_B[few], lines.branch_length_BxN[few] = 0, 0
    generator = rows_of(lines, generator.ref_logp_Rx2[0])
    _, metrics = jitted(steps.joint_step, config)(state, base, Batch(generator, inference))
    np.testing.assert_allclose(metrics["loss"], -metrics["reward"], rtol=1e-6)
    by_row = dataclasses.replace(generator, weight_R=(generator.weight_R > 0).astype(np.float32))
    _, metrics = jitted(steps.joint_step, config)(state, base, Batch(by_row, inference))
    assert abs(metrics["loss"] + metrics["reward"]) > 1e-3


def test_policy_equal_to_its_reference_has_zero_margin():
    config = settings(tiny.LORA)
    base, _, batch = world(config)
    generator = batch.generator
    state = steps.init_state(jax.random.key(1), base, config)
    bins = jax.tree.map(lambda x: x[0], generator.bins)
    ref = scoring.response_logps(config.policy.bind(base, None), bins, "sum")[None]
    rows = Batch(dataclasses.replace(generator, ref_logp_Rx2=ref))
    _, metrics = jitted(steps.generator_step, config)(state, base, rows)
    np.testing.assert_allclose(metrics["loss"], np.log(2) / 0.1, rtol=1e-5)
    np.testing.assert_allclose(metrics["margin"], 0.0, atol=1e-5)


def test_generator_loss_falls_and_inference_follows_its_reward():
    config = settings(tiny.LORA, tx_theta=optax.adam(5e-2), kl_coef=0.0)
    base, state, batch = world(config)
    step = jitted(steps.generator_step, config)
    losses = []
    for _ in range(12):
        state, metrics = step(state, base, Batch(batch.generator))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.2

    own = jax.tree.map(lambda x: x[0], batch.inference)
    loss_R = np.zeros((U, K, M), np.float32)
    loss_R[:, 1:] = 5.0  # The first summary of every user has the highest reward.
    reward = steps.summary_rewards(jnp.asarray(loss_R.ravel()), jnp.ones(loss_R.size), U, K)
    grad = jax.jit(jax.grad(lambda phi: steps.inference_loss(phi, base, own, reward, jnp.float32(0), 0.0, config)[0]))
    phi = jax.tree.map(lambda p, g: p - 0.02 * g, state.phi, grad(state.phi))
    before, after = (scoring.score(config.policy.bind(base, p), own.lines).logp_BxNxS.sum(-1) for p in (state.phi, phi))
    gain = np.asarray(after - before)
    assert (gain[:, 0].mean() > 0) and (gain[:, 1:].mean() < gain[:, 0].mean())


def test_step_is_traced_once():
    config = settings(tiny.LORA)
    base, state, batch = world(config)
    traces = []

    def counted(state, base, batch):
        traces.append(1)
        return steps.joint_step(state, base, from_all(batch), settings=config)

    step = jax.jit(counted)
    for _ in range(3):
        state, _ = step(state, base, batch)
    assert len(traces) == 1


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("lora", [tiny.LORA, None])
def test_sharded_equals_one_device(sizes, lora):
    config = settings(lora)
    base, state, batch = world(config, users=8, n_bins=32, shards=8)
    batch = batch if lora else from_all(batch)  # Covers `learned` and all rows.
    alone, metrics = jitted(steps.joint_step, config)(state, base, batch)
    mesh = sharding.make_mesh(*sizes)
    policy = config.policy
    placed_base, delta = jax.device_put(base, policy.base_shardings(mesh)), policy.delta_shardings(mesh)
    placed = dataclasses.replace(state, phi=jax.device_put(state.phi, delta), theta=jax.device_put(state.theta, delta))
    rows = jax.device_put(batch, sharding.stack_sharding(mesh))  # Users and rows divide over the devices.
    split = dataclasses.replace(config, policy=dataclasses.replace(policy, mesh=mesh))
    sharded, sharded_metrics = jitted(steps.joint_step, split)(placed, placed_base, rows)
    assert_close(metrics, sharded_metrics, rtol=1e-4, atol=1e-5)
    assert_close((alone.phi, alone.theta), (sharded.phi, sharded.theta), rtol=1e-5, atol=1e-5)


def bfloat16(**changes) -> Settings:
    model = dataclasses.replace(tiny.CONFIG, trained_dtype="bfloat16", qkv_bias=True, **changes)
    return settings(policy=Policy(model))


def gradients(config, state, base, batch, params):
    """Returns the gradients of both roles at these weights."""
    state = dataclasses.replace(state, phi=params, theta=params)
    theta, _, loss_R = steps._generator_sums(state, base, batch.generator, config)
    return theta, steps._inference_sums(state, base, batch, loss_R, config)[0]


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_bfloat16_weights_equal_those_of_float32_weights(tied, monkeypatch):
    """Frequent tokens and many chunks of logits: sums in bfloat16 would be off by percents."""
    monkeypatch.setattr(scoring, "_default_chunk", lambda decoder: 4)
    config = bfloat16(tie_embeddings=tied)
    base, state, batch = world(config, users=16)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.theta)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    found = jax.jit(functools.partial(gradients, config))(state, base, batch, rounded)
    wanted = jax.jit(functools.partial(gradients, config))(state, base, batch, exact)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        # One rounding to bfloat16 of what was summed in float32.
        np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


def test_no_gradient_is_gathered_or_summed_in_bfloat16():
    config = bfloat16(compute_dtype="bfloat16")
    base, state, batch = world(config)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.theta)
    summed = set()

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("scatter-add", "reduce_sum", "cumsum"):
                summed.add((eqn.primitive.name, eqn.outvars[0].aval.dtype.name))
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                visit(getattr(inner, "jaxpr", inner))

    visit(jax.make_jaxpr(functools.partial(gradients, config))(state, base, batch, rounded).jaxpr)
    assert ("scatter-add", "float32") in summed and ("reduce_sum", "float32") in summed
    assert not [(name, dtype) for name, dtype in summed if dtype == "bfloat16"]
