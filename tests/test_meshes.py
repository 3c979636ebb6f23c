"""What a run computes does not depend on its mesh: summaries, steps, evaluation; and its checkpoints fit any of them.

The programs are those of a run, jitted and placed as the run does it, each traced once. Everything is float32.
"""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import optax
import pytest

from configs import quickstart
from popi_jax import checkpoint
from popi_jax.data.encoding import Encoder
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError
from popi_jax.evaluation import evaluate
from popi_jax.model import hub, sharding
from popi_jax.model.config import ModelConfig
from popi_jax.model.tokenizer import Tokenizer
from popi_jax.modes import setup as system_lib
from popi_jax.modes import train
from popi_jax.rollout import pairs, sampler
from popi_jax.rollout import text as rollout
from popi_jax.rollout.references import References
from popi_jax.training import scoring, steps
from tests import tiny

# Every axis is divisible by 8; the heads by 8 kv heads of two query heads each.
MODEL = ModelConfig(
    vocab_size=1024, d_model=16, n_layers=2, n_heads=16, n_kv_heads=8, head_dim=4, d_ff=24, tie_embeddings=True
)
ALONE = (1, 1, 1)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (2, 4, 1)]
RANKS = {"lora": 3, "full": 0}
USERS, K, M = 8, 2, 1
READERS = 6  # Of an evaluation; a mesh whose rows are split in eight fills them up.
# Of the largest entry of the array: a sum in another order is rounded otherwise, each entry by about the size of the
# terms, which an entry that happens to be small has in common with the largest.
TOLERANCE = 1e-5


def cases(often, *rest):
    """Every mesh with every one of the rest; those that are not in `often` are slow: a compilation each, or three."""
    return [
        pytest.param(
            *case,
            marks=() if case in often else pytest.mark.slow,
            id="-".join(["x".join(map(str, case[0])), *case[1:]]),
        )
        for case in itertools.product(MESHES, *rest)
    ]


# A joint step has what a generator step has; a program of full fine-tuning differs from one of LoRA in what it moves.
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


def make_system(sizes, rank, model=MODEL) -> system_lib.System:
    """A loaded config, but for its model, whose weights are drawn on the host: the same on every mesh."""
    config = quickstart.get_config("runlocal")
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
    config.lora.rank = rank
    # One length of bins and of prompts: one shape to compile.
    config.limits.update({"signals": 96, "prompt": 96, "response": 32, "summary": 4, "bin": 96, "buckets": (96,)})
    config.eval.users_per_batch, config.eval.summaries_per_user, config.eval.top_p = READERS, K, 0.9
    mesh = system_lib.make_mesh(config)
    jax.set_mesh(mesh)
    plan = system_lib.make_plan(config, mesh, model)
    # Adam divides by sqrt(v) + eps. With its usual eps, 1e-8, an entry whose gradient is nothing but rounding moves by
    # the full rate in a direction that rounding decides; with one of the gradients' own size updates are as exact as
    # gradients are. At this rate an update is a tenth of a weight.
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.02, eps=1e-2))
    plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, tx_phi=tx, tx_theta=tx))
    policy = plan.policy
    base = jax.device_put(
        drawn(policy.abstract_base(), 0),
        sharding.param_shardings(policy.logical_axes_base(), policy.abstract_base(), mesh),
    )
    tokenizer = Tokenizer.load(hub.STYLEBOOK)
    encoder = Encoder(tokenizer, config.prompts, config.limits)
    return system_lib.System(
        **vars(plan), tokenizer=tokenizer, tokenizer_path="", base=base, fingerprint=str(model), encoder=encoder
    )


def drawn(abstract, seed):
    """A tree of these shapes in which every entry counts: a fresh adapter's zeros would hide mistakes.

    As large as weights are where a model is started: larger ones would magnify each other's rounding.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if jax.tree_util.keystr(path).endswith("['scale']") else 0.0
        return np.asarray(rng.normal(centre, 0.1, leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def trained(system):
    """Phi and theta, away from the base; on the host."""
    abstract = system.policy.abstract_delta()
    return drawn(abstract, 1), drawn(abstract, 2)


def make_state(system):
    """The state before a run's first step, but for phi and theta."""
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), train.abstract_state(system))
    phi, theta = trained(system)
    return jax.device_put(dataclasses.replace(empty, phi=phi, theta=theta), train.state_shardings(system))


def assert_placed(system, state):
    """Every leaf lies where train.state_shardings says."""
    for leaf, placed in zip(jax.tree.leaves(state), jax.tree.leaves(train.state_shardings(system)), strict=True):
        assert leaf.sharding.is_equivalent_to(placed, leaf.ndim), (leaf.shape, leaf.sharding, placed)


def examples():
    """Users with signals and prompts of all lengths, and a query each."""
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
    """Stands in for a function that is traced, and counts how often it is."""

    def __init__(self, fn):
        self.fn, self.traces = fn, 0

    def __call__(self, *args, **kwargs):
        self.traces += 1
        return self.fn(*args, **kwargs)


def make_batch(system, kind):
    """What the step of this kind reads, laid over the mesh as batches.py does it; some users and rows are padding."""
    rng = np.random.default_rng(0)
    signals, responses = tiny.rows(rng, USERS, K, 6, 4), tiny.rows(rng, USERS * K * M, 2, 5, 4)
    signals.prefix_length_B[-1] = 0
    responses.prefix_length_B[-K * M :] = responses.branch_length_BxN[-K * M :] = 0
    sampler_logp_UxKxS = rng.normal(-2.0, 1.0, (USERS, K, 4)).astype(np.float32)
    ref_logp_Rx2 = rng.normal(-9.0, 1.0, (USERS * K * M, 2)).astype(np.float32)
    weight_R = (responses.prefix_length_B > 0).astype(np.float32)
    # The groups of bins of 8 devices, which divide over every mesh.
    bins = tiny.packed(responses, 24, micros=1, n_bins=16, groups=8)
    split = sharding.stack_sharding(system.mesh)
    inference = steps.InferenceBatch(*jax.tree.map(lambda x: x[None], (signals, sampler_logp_UxKxS)))
    inference = jax.device_put(inference, split)
    bins = jax.device_put(bins, pairs.packed_shardings(system.mesh, split))
    own = jax.device_put((ref_logp_Rx2[None], weight_R[None]), sharding.replicated(system.mesh))
    generator = steps.GeneratorBatch(bins, *own)
    return {"joint": (inference, generator, None), "inference": (inference, generator), "generator": generator}[kind]


@functools.cache
def two_steps(sizes, tuning, kind):
    """Phi and theta after two steps, how far they moved, the optimizers' states, and the metrics; on the host."""
    system = make_system(sizes, RANKS[tuning])
    batch = make_batch(system, kind)
    counted = Counted(train.STEP_FUNCTIONS[kind])
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(train.STEP_FUNCTIONS, kind, counted)
        step = train.make_steps(system)[kind]
    state = make_state(system)
    logged = {}
    for n in range(2):
        state, metrics = step(state, system.base, batch)
        logged |= {f"{name} of step {n}": float(value) for name, value in jax.device_get(metrics).items()}
    # Nor compiled again, as it would be for a state that comes back laid out otherwise than it went in.
    assert (counted.traces, step._cache_size()) == (1, 1)
    assert_placed(system, state)
    after, optimizers = jax.device_get(((state.phi, state.theta), (state.opt_phi, state.opt_theta)))
    # Of the second moments the roots: a square is off by twice as much of itself.
    optimizers = jax.tree.map_with_path(
        lambda path, leaf: np.sqrt(leaf) if ".nu" in jax.tree_util.keystr(path) else leaf, optimizers
    )
    return after, jax.tree.map(np.subtract, after, trained(system)), optimizers, logged


def assert_close(got, want, moved=None):
    """Every leaf within TOLERANCE of its largest entry.

    Weights within TOLERANCE of the most that they moved by and two roundings of their own: they had two updates, beside
    which a large weight's rounding is more than TOLERANCE.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    sizes = jax.tree.leaves(want if moved is None else moved)
    for (path, leaf), other, size in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), sizes, strict=True):
        limit = TOLERANCE * np.abs(size).max() + (0.0 if moved is None else 2 * np.spacing(np.abs(leaf).max()))
        gap = np.abs(np.asarray(other) - leaf).max()
        assert gap <= limit, f"{jax.tree_util.keystr(path)}: {gap}, with {np.abs(size).max()} the largest"


@pytest.mark.parametrize(("sizes", "tuning", "kind"), STEP_CASES)
def test_steps(sizes, tuning, kind):
    (got, _, optimizers, logged), want = two_steps(sizes, tuning, kind), two_steps(ALONE, tuning, kind)
    assert_close(got, want[0], moved=want[1])
    assert_close(optimizers, want[2])
    assert logged.keys() == want[3].keys()
    for name, value in logged.items():
        # Or of a nat: what is logged is made from log-probabilities of some nats each, and may be their difference.
        np.testing.assert_allclose(value, want[3][name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@functools.cache
def evaluated(sizes, tuning, folder):
    """An evaluation's summaries, tokens and their log-probabilities, scores, and the rest of its records."""
    system = make_system(sizes, RANKS[tuning])
    state, readers = make_state(system), examples()
    references = References(system, folder / "-".join(map(str, (*sizes, tuning))), READERS * K)
    draws, scores = Counted(sampler.sample), Counted(scoring.score_packed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sampler, "sample", draws)
        patched.setattr(scoring, "score_packed", scores)
        summaries = rollout.draw_summaries(
            system, state.phi, readers, jax.random.key(0), rollout.in_use(system.config), k=K
        )
        for _ in range(2):
            records = evaluate.evaluate(system, state.phi, state.theta, readers, references, 0)
            # The pairs once under the policy and once under the reference, which knows them after that.
            assert (draws.traces, scores.traces) == (1, 2)
    tokens, logps = (np.asarray(x)[:READERS] for x in (summaries.samples.tokens_BxNxS, summaries.samples.logp_BxNxS))
    values = np.array([(record.h, record.h_signals_ref) for record in records])
    others = [dataclasses.replace(record, h=0.0, h_signals_ref=0.0) for record in records]
    return summaries.texts_UxK, tokens, logps, values, others


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


@pytest.mark.parametrize(("sizes", "tuning"), EVALUATION_CASES)
def test_sampler_and_evaluation(sizes, tuning, folder):
    texts, tokens, logps, values, others = evaluated(sizes, tuning, folder)
    want = evaluated(ALONE, tuning, folder)
    assert texts == want[0] and len(set(sum(texts, []))) > READERS
    np.testing.assert_array_equal(tokens, want[1])
    assert_close(logps, want[2])
    assert_close(values, want[3])
    assert others == want[4]


def saved(workdir, system, state):
    """Writes a checkpoint as the training loop does."""
    meta = {"model": system.fingerprint, "tokenizer": system.tokenizer.fingerprint}
    meta["config"] = json.loads(system.config.to_json_best_effort())
    with checkpoint.Writer(workdir / "checkpoints", keep=1, after=0) as writer:
        writer.save(1, vars(state), meta)


@pytest.mark.parametrize("tuning", RANKS)
def test_a_checkpoint_moves_from_mesh_to_mesh(tuning, tmp_path):
    meshes = [(2, 2, 2), (8, 1, 1), ALONE, (1, 1, 8)]
    system = make_system(meshes[0], RANKS[tuning])
    want = drawn(train.abstract_state(system), 3)  # Moments that are not zero, too.
    state = jax.device_put(want, train.state_shardings(system))
    for n, sizes in enumerate(meshes[1:]):
        saved(tmp_path / str(n), system, state)
        system = make_system(sizes, RANKS[tuning])
        state, _ = train.restore(system, tmp_path / str(n))
        assert_placed(system, state)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), want)


WIDER = dataclasses.replace(MODEL, d_model=32)
OTHERS = {
    "full to lora": ((0, MODEL), (3, MODEL), "config.lora.rank is 0 there and 3 here"),
    "lora to full": ((3, MODEL), (0, MODEL), "config.lora.rank is 3 there and 0 here"),
    "another rank": ((3, MODEL), (5, MODEL), "config.lora.rank is 3 there and 5 here"),
    "another model": ((3, MODEL), (3, WIDER), "model is .*d_model=16.* there and .*d_model=32.* here"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_model_is_one_line(name, tmp_path):
    there, here, shown = OTHERS[name]
    system = make_system(ALONE, *there)
    saved(tmp_path, system, make_state(system))
    with pytest.raises(
        UserError, match=f"{shown}; use the config that it was made with, or another --workdir"
    ) as error:
        train.restore(make_system((2, 2, 2), *here), tmp_path)
    assert "\n" not in str(error.value)
