"""A run's summaries, steps and evaluation do not depend on its mesh, and its checkpoints load on any mesh.

The programs are jitted and placed as in a run, and each is traced once. Everything is float32.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import optax
import pytest

from popi_jax import checkpoint
from popi_jax.config import parse
from popi_jax.configs import quickstart
from popi_jax.data.batch import Batch, GeneratorBatch, InferenceBatch
from popi_jax.data.encoding import Encoder
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.data.shapes import batch_shardings
from popi_jax.errors import UserError
from popi_jax.model import hub
from popi_jax.model.config import ModelConfig
from popi_jax.model.tokenizer import Tokenizer
from popi_jax.modes import setup
from popi_jax.rollout import sampler, text
from popi_jax.training import scoring, steps
from tests import tiny

# Every axis is divisible by 8; each of the 8 kv heads serves two query heads.
MODEL = ModelConfig(
    vocab_size=1024, d_model=16, n_layers=2, n_heads=16, n_kv_heads=8, head_dim=4, d_ff=24, tie_embeddings=True
)
ALONE = (1, 1, 1)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (2, 4, 1)]
RANKS = {"lora": 3, "full": 0}
USERS, K, M = 8, 2, 1
READERS = 6  # Users of an evaluation; a mesh that splits rows over eight devices pads them.
# Relative to the largest entry of the array: another order of summation changes each entry by a rounding error of its
# terms, which are as large for a small entry as for the largest.
TOLERANCE = 1e-5


def cases(often, *rest):
    """Returns all combinations of meshes and `rest`; those not in `often` are slow, compiling up to three programs."""
    return [
        pytest.param(
            *case,
            marks=() if case in often else pytest.mark.slow,
            id="-".join(["x".join(map(str, case[0])), *case[1:]]),
        )
        for case in itertools.product(MESHES, *rest)
    ]


# A joint step includes a generator step; full fine-tuning and LoRA differ in the arrays that they communicate.
STEP_CASES = cases(
    [
        *((sizes, "lora", "joint") for sizes in MESHES),
        *((sizes, "full", "joint") for sizes in [(1, 1, 8), (2, 2, 2)]),
        ((2, 2, 2), "lora", "inference"),
    ],
    RANKS,
    ["joint", "inference", "generator"],
)
EVALUATION_CASES = cases([(sizes, "lora") for sizes in [(8, 1, 1), (1, 1, 8), (2, 2, 2)]], RANKS)


def make_run(sizes, rank, model=MODEL) -> setup.Run:
    """Returns a run with the given model, whose weights are drawn on the host: the same on every mesh."""
    config = quickstart.get_config("runlocal")
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
    config.lora.rank = rank
    # A single length of bins and prompts, so that there is one shape to compile.
    config.limits.update({"signals": 96, "prompt": 96, "response": 32, "summary": 4, "bin": 96, "buckets": (96,)})
    config.eval.users_per_batch, config.eval.summaries_per_user, config.eval.top_p = READERS, K, 0.9
    config = parse(config)
    mesh = setup.make_mesh(config)
    own = setup.make_programs(config, mesh, model)
    # Adam divides by sqrt(v) + eps. With the usual eps, 1e-8, an entry whose gradient is pure rounding error moves by
    # the full rate in a random direction; with an eps of the gradients' size, updates are as exact as the gradients. At
    # this rate an update is a tenth of a weight.
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.02, eps=1e-2))
    own = dataclasses.replace(own, settings=dataclasses.replace(own.settings, tx_phi=tx, tx_theta=tx))
    base = jax.device_put(drawn(own.policy.abstract_base(), 0), own.policy.base_shardings(mesh))
    encoder = Encoder(Tokenizer.load(hub.STYLEBOOK), config.prompts, config.limits)
    return setup.Run(config, own, base, str(model), encoder, "", config.limits.buckets)


def drawn(abstract, seed):
    """Returns a random tree of these shapes: a fresh adapter's zeros would hide mistakes.

    Entries have the size of initial weights: larger ones would magnify each other's rounding errors.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if jax.tree_util.keystr(path).endswith("['scale']") else 0.0
        return np.asarray(rng.normal(centre, 0.1, leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def trained(run):
    """Returns phi and theta, different from the base, on the host."""
    abstract = run.programs.policy.abstract_delta()
    return drawn(abstract, 1), drawn(abstract, 2)


def make_state(run):
    """Returns the state before a run's first step, except for phi and theta."""
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), run.programs.abstract_state())
    phi, theta = trained(run)
    return jax.device_put(dataclasses.replace(empty, phi=phi, theta=theta), run.programs.state_shardings)


def assert_placed(run, state):
    """Asserts that every leaf is placed as Programs.state_shardings says."""
    for leaf, placed in zip(jax.tree.leaves(state), jax.tree.leaves(run.programs.state_shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(placed, leaf.ndim), (leaf.shape, leaf.sharding, placed)


def examples():
    """Returns users with signals and prompts of all lengths, and one query each."""
    return [
        Example(
            user=f"user{u}",
            split="test",
            signals=(Signal("profile", text="She likes tea" + " and cake" * u),),
            queries=(Query(f"What is {'very ' * (u % 3)}good?", "This is. " * (1 + u % 4), "That." * (1 + u % 2)),),
        )
        for u in range(READERS)
    ]


class Counted:
    """Wraps a function and counts its traces."""

    def __init__(self, fn):
        self.fn, self.traces = fn, 0

    def __call__(self, *args, **kwargs):
        self.traces += 1
        return self.fn(*args, **kwargs)


def make_batch(run, kind):
    """Returns the Batch of a step of this kind, placed as in a run; some users and rows are padding."""
    rng = np.random.default_rng(0)
    signals, responses = tiny.rows(rng, USERS, K, 6, 4), tiny.rows(rng, USERS * K * M, 2, 5, 4)
    signals.prefix_length_B[-1] = 0
    responses.prefix_length_B[-K * M :] = responses.branch_length_BxN[-K * M :] = 0
    sampler_logp_UxKxS = rng.normal(-2.0, 1.0, (USERS, K, 4)).astype(np.float32)
    ref_logp_Rx2 = rng.normal(-9.0, 1.0, (USERS * K * M, 2)).astype(np.float32)
    weight_R = (responses.prefix_length_B > 0).astype(np.float32)
    # Shards for 8 devices, which divide over every mesh.
    bins = tiny.packed(responses, 24, micros=1, n_bins=16, shards=8)
    generator = GeneratorBatch(bins, ref_logp_Rx2[None], weight_R[None])
    more_UxK = rng.normal(size=(USERS, K)).astype(np.float32)
    inference = InferenceBatch(*jax.tree.map(lambda x: x[None], (signals, sampler_logp_UxKxS, more_UxK)))
    batch = Batch(generator, None if kind == "generator" else inference)
    return jax.device_put(batch, batch_shardings(batch, run.programs.mesh))


@functools.cache
def two_steps(sizes, tuning, kind):
    """Returns phi and theta after two steps, their changes, the optimizer states and the metrics, on the host."""
    run = make_run(sizes, RANKS[tuning])
    batch = make_batch(run, kind)
    counted = Counted(steps.STEPS[kind])
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(steps.STEPS, kind, counted)
        step = run.programs.train_steps[kind]
    state = make_state(run)
    logged = {}
    for n in range(2):
        state, metrics = step(state, run.base, batch)
        logged |= {f"{name} of step {n}": float(value) for name, value in jax.device_get(metrics).items()}
    # Compiled once, too: a state that is returned in another layout would be compiled again.
    assert (counted.traces, step._cache_size()) == (1, 1)
    assert_placed(run, state)
    after, optimizers = jax.device_get(((state.phi, state.theta), (state.opt_phi, state.opt_theta)))
    # Square roots of the second moments: the relative error of a square is twice as large.
    optimizers = jax.tree.map_with_path(
        lambda path, leaf: np.sqrt(leaf) if ".nu" in jax.tree_util.keystr(path) else leaf, optimizers
    )
    return after, jax.tree.map(np.subtract, after, trained(run)), optimizers, logged


def assert_close(got, want, moved=None):
    """Asserts that every leaf is within TOLERANCE, relative to its largest entry.

    For weights it is relative to the largest change in `moved`, plus two roundings of the weights, one per update:
    relative to its change, the rounding of a large weight exceeds TOLERANCE.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    sizes = jax.tree.leaves(want if moved is None else moved)
    for (path, leaf), other, size in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), sizes, strict=True):
        limit = TOLERANCE * np.abs(size).max() + (0.0 if moved is None else 2 * np.spacing(np.abs(leaf).max()))
        gap = np.abs(np.asarray(other) - leaf).max()
        assert gap <= limit, f"{jax.tree_util.keystr(path)}: {gap}, with {np.abs(size).max()} the largest"


@pytest.mark.parametrize(("sizes", "tuning", "kind"), STEP_CASES)
def test_steps_do_not_depend_on_the_mesh(sizes, tuning, kind):
    (got, _, optimizers, logged), want = two_steps(sizes, tuning, kind), two_steps(ALONE, tuning, kind)
    assert_close(got, want[0], moved=want[1])
    assert_close(optimizers, want[2])
    assert logged.keys() == want[3].keys()
    for name, value in logged.items():
        # Or TOLERANCE nats: metrics come from log-probabilities of a few nats each, and may be their differences.
        np.testing.assert_allclose(value, want[3][name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@functools.cache
def evaluated(sizes, tuning, folder):
    """Returns an evaluation's summaries, their tokens and log-probabilities, scores, and the rest of its records."""
    run = make_run(sizes, RANKS[tuning])
    state, readers = make_state(run), examples()
    evaluator = run.evaluator(run.references(folder / "-".join(map(str, (*sizes, tuning)))))
    draws, scores = Counted(sampler.sample), Counted(scoring.score_packed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sampler, "sample", draws)
        patched.setattr(scoring, "score_packed", scores)
        summaries = run.sampler.summaries(state.phi, readers, jax.random.key(0), text.in_use(run.config), k=K)
        for _ in range(2):
            records = evaluator.records(state.phi, state.theta, readers, 0)
            # The pairs are scored once under the policy and once under the reference, whose scores are then cached.
            assert (draws.traces, scores.traces) == (1, 2)
    tokens, logps = (np.asarray(x)[:READERS] for x in (summaries.samples.tokens_BxNxS, summaries.samples.logp_BxNxS))
    values = np.array([(record.h, record.h_signals_ref) for record in records])
    others = [dataclasses.replace(record, h=0.0, h_signals_ref=0.0) for record in records]
    return summaries.texts_UxK, tokens, logps, values, others


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


@pytest.mark.parametrize(("sizes", "tuning"), EVALUATION_CASES)
def test_sampler_and_evaluation_do_not_depend_on_the_mesh(sizes, tuning, folder):
    texts, tokens, logps, values, others = evaluated(sizes, tuning, folder)
    want = evaluated(ALONE, tuning, folder)
    assert texts == want[0] and len(set(sum(texts, []))) > READERS
    np.testing.assert_array_equal(tokens, want[1])
    assert_close(logps, want[2])
    assert_close(values, want[3])
    assert others == want[4]


def saved(workdir, run, state):
    """Writes a checkpoint as the training loop does."""
    meta = run.identity | {"config": run.config.model_dump(mode="json")}
    with checkpoint.Writer(workdir / "checkpoints", keep=1, after=0) as writer:
        writer.save(1, vars(state), meta)


@pytest.mark.parametrize("tuning", RANKS)
def test_a_checkpoint_moves_from_mesh_to_mesh(tuning, tmp_path):
    meshes = [(2, 2, 2), (8, 1, 1), ALONE, (1, 1, 8)]
    run = make_run(meshes[0], RANKS[tuning])
    want = drawn(run.programs.abstract_state(), 3)  # With nonzero moments.
    state = jax.device_put(want, run.programs.state_shardings)
    for n, sizes in enumerate(meshes[1:]):
        saved(tmp_path / str(n), run, state)
        run = make_run(sizes, RANKS[tuning])
        state, _ = run.restore(tmp_path / str(n))
        assert_placed(run, state)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), want)


WIDER = dataclasses.replace(MODEL, d_model=32)
OTHERS = {
    "full to lora": ((0, MODEL), (3, MODEL), "config.lora.rank is 0 in the checkpoint and 3 in this run"),
    "lora to full": ((3, MODEL), (0, MODEL), "config.lora.rank is 3 in the checkpoint and 0 in this run"),
    "another rank": ((3, MODEL), (5, MODEL), "config.lora.rank is 3 in the checkpoint and 5 in this run"),
    "another model": ((3, MODEL), (3, WIDER), "model is .*d_model=16.* in the checkpoint and .*d_model=32.*"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_model_raises_a_user_error(name, tmp_path):
    there, here, shown = OTHERS[name]
    run = make_run(ALONE, *there)
    saved(tmp_path, run, make_state(run))
    with pytest.raises(UserError, match=f"{shown}; use the config of that run, or another --workdir") as error:
        make_run((2, 2, 2), *here).restore(tmp_path)
    assert "\n" not in str(error.value)
