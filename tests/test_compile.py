"""--mode=compile: its abstract programs are those of a run, and its figures those that can be had by hand."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import llama3_3b, llama3_8b, quickstart
from popi_jax.cost import chips, traffic
from popi_jax.data import packing, prepared
from popi_jax.errors import UserError
from popi_jax.model import hub, sharding
from popi_jax.modes import compile as compile_lib
from popi_jax.modes import setup as system_lib
from popi_jax.modes import train
from popi_jax.rollout import text as rollout
from popi_jax.rollout.references import References
from popi_jax.training import batches


def small() -> object:
    """The smallest config that has every part: two micro-batches, a share of the summaries for theta, adapters."""
    config = quickstart.get_config("runlocal")
    config.train.users_per_step = 8
    config.train.accumulation_generator = 2
    config.sampling.k, config.sampling.k_generator = 2, 1
    config.lora.rank = 4
    config.mesh.fsdp, config.mesh.data = 4, 1
    return config


def test_abstract_batches_are_what_a_step_reads(tmp_path):
    config = small()
    system = system_lib.load(config)
    sources = prepared.from_config(config, tmp_path)
    state = train.initial_state(system)
    examples = [sources["train"][i] for i in range(config.train.users_per_step)]
    written = batches.WrittenSummaries(tmp_path / "written.jsonl")
    references = References(system, tmp_path / "cache", 8)
    real, _ = batches.make_batch(system, state, examples, 0, "joint", references, written)
    abstract = compile_lib.abstract_batch(system, "joint")
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    for (path, one), other in zip(jax.tree.leaves_with_path(real), jax.tree.leaves(abstract), strict=True):
        name = jax.tree_util.keystr(path)
        assert one.dtype == other.dtype and one.ndim == other.ndim, name
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim), name
        assert all(a <= b for a, b in zip(one.shape, other.shape, strict=True)), (name, one.shape, other.shape)


def test_the_report_on_this_machine():
    config = small()
    config.model.remat = "full"
    found = compile_lib.report(config, compile_lib.HERE)
    rows = {row["program"]: row for row in found["programs"]}
    assert list(rows) == ["sample", "joint step", "evaluate: sample", "evaluate: score", "evaluate: respond"]
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert all(row["fits"] and not row["traffic"]["host_transfers"] for row in rows.values())
    joint = rows["joint step"]
    assert joint["executed_flops_all_devices"] > 1.1 * joint["model_flops_all_devices"]  # Layers are computed again.
    assert "all-gather" in joint["traffic"]["collectives"]  # Weights lie in pieces.
    assert rows["evaluate: score"]["model_flops_all_devices"] == score_flops(config)
    assert "joint step" in compile_lib.table(found)


def score_flops(config) -> float:
    """Of reading the rows of an evaluation's batch once, by hand."""
    model = hub.read_config(hub.STYLEBOOK / "config.json")
    limits, devices = config.limits, 4
    row = limits.prompt + 2 * limits.response
    L = max(limits.bin, packing.bucket(row, tuple(limits.buckets)))
    C = packing.round_up(-(-config.eval.users_per_batch * config.eval.summaries_per_user // (L // row)), devices)
    W = packing.round_up(C // devices * (L // row) * 2 * limits.response, -(-C // devices * L // 4))
    D, H, Kv, Dh, F, r = model.d_model, model.n_heads, model.n_kv_heads, model.head_dim, model.d_ff, config.lora.rank
    weights = 2 * D * H * Dh + 2 * D * Kv * Dh + 3 * D * F
    adapters = r * (2 * (D + H * Dh) + 2 * (D + Kv * Dh) + 3 * (D + F))
    size = max(128, -(-L // 16))
    seen = sum((min(start + size, L) - start) * min(start + size, L) for start in range(0, L, size))
    layer = C * L * (weights + adapters) + C * 2 * H * Dh * seen
    return 2.0 * (model.n_layers * layer + devices * W * D * model.vocab_size)


def test_sampling_shapes_are_those_that_are_drawn():
    config = small()
    system = system_lib.load(config)
    drawn = rollout.draw_text(
        system,
        None,
        [[1, 2, 3]] * 8,
        jax.random.key(0),
        rollout.in_training(config),
        branches=2,
        max_tokens=config.limits.summary,
    )
    (program,) = [p for p in compile_lib.programs(system) if p.name == "sample"]
    abstract = jax.eval_shape(program.fn, *program.args)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn.samples) == jax.tree.map(
        lambda x: (x.shape, np.dtype(x.dtype)), abstract
    )


@pytest.mark.parametrize("module", [llama3_3b, llama3_8b])
@pytest.mark.parametrize("arg", ["full", "lora"])
def test_published_shapes_need_no_weights(module, arg):
    config = module.get_config(arg)
    model = hub.read_config(compile_lib.model_shape(config), compute_dtype="bfloat16", remat="full", attention="splash")
    mesh = jax.sharding.AbstractMesh((1, 16, 1), sharding.AXES)
    plan = system_lib.make_plan(config, mesh, model)
    count = sum(leaf.size for leaf in jax.tree.leaves(plan.policy.abstract_base()))
    assert count == {llama3_3b: 3_212_749_824, llama3_8b: 8_030_261_248}[module]  # As their model cards say.
    assert compile_lib.abstract_batch(plan, "joint")[1].rows.tokens_CxL.shape == (8, 16, 6144)


def test_every_program_compiles_for_a_tpu_slice():
    """The real compiler, without a TPU: no dynamic shape, nothing that Mosaic refuses, no word with the host."""
    pytest.importorskip("libtpu")
    found = compile_lib.report(small(), "v5e:2x2")
    assert found["device"] == "TPU v5 lite" and found["devices"] == 4
    for row in found["programs"]:
        assert row["fits"] and row["traffic"]["host_transfers"] == []
        # Decoding ends when all texts have, which nothing says before; a device's last two prompts may become one.
        assert bool(row["traffic"]["unknown_loops"]) == row["program"].endswith(("sample", "respond"))
        assert row["total_bytes"] < row["hbm_bytes"] and row["bound_s"] > 0
    joint = next(row for row in found["programs"] if row["program"] == "joint step")
    assert joint["traffic"]["collectives"]["all-gather"]["count"] > 1

    def talks(x):
        jax.debug.print("{}", x.sum())
        return x

    mesh = system_lib.make_mesh(small(), compile_lib.slice_devices("v5e:2x2"))
    abstract = jax.ShapeDtypeStruct((8, 128), np.float32, sharding=sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        text = jax.jit(talks).lower(abstract).compile().as_text()
    assert traffic.measure(text).host_transfers


@pytest.mark.parametrize("topology", chips.TOPOLOGIES)
def test_slices_that_a_message_names_have_a_mesh_and_known_peaks(topology):
    pytest.importorskip("libtpu")
    devices = compile_lib.slice_devices(topology)
    config = small()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 4, 1
    assert system_lib.make_mesh(config, devices).size == len(devices)
    assert chips.chip(devices[0].device_kind).flops > 0


def test_what_goes_to_a_sparse_core_is_counted():
    """On v5p a scatter does, and XLA's reader refuses the program's text: JAX cannot print it."""
    pytest.importorskip("libtpu")
    mesh = system_lib.make_mesh(small(), compile_lib.slice_devices("v5p:2x2x1"))
    values, places = (
        jax.ShapeDtypeStruct((51_200,), dtype, sharding=sharding.replicated(mesh)) for dtype in (np.float32, np.int32)
    )
    fn = jax.jit(lambda values, places: jax.ops.segment_sum(values, places, 10))
    with jax.set_mesh(mesh):
        row, moved = compile_lib.compile_program(compile_lib.Program("", fn, (values, places)))
        with pytest.raises(jax.errors.JaxRuntimeError, match="async"):  # Else libtpu need not write anything down.
            fn.lower(values, places).compile().as_text()
    # Both are sorted, read and written, and then read.
    assert moved is not None and moved.hbm_bytes == pytest.approx(6 * 4 * 51_200, rel=1e-3), row
    assert moved.collectives == {} and moved.unknown_loops == []


def test_two_processes_compile_side_by_side():
    """The lock of libtpu is for the chips; the compiler holds none."""
    pytest.importorskip("libtpu")
    command = "from popi_jax import compile; print(len(compile.slice_devices('v5e:2x2')))"
    compile_lib.slice_devices("v5e:2x2")
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "4\n", done.stderr


def test_mistakes_are_told():
    config = small()
    with pytest.raises(UserError, match="--topology=v5e:nonsense: .*such as .*v5e:4x4"):
        compile_lib.report(config, "v5e:nonsense")
    with pytest.raises(UserError, match="config.model.attention"):
        config.model.attention = "splash"
        compile_lib.report(config, compile_lib.HERE)
    config.model.attention = "auto"
    config.model.path = "somebody/model"
    with pytest.raises(UserError, match="set config.model.shape to its config.json"):
        compile_lib.report(config, compile_lib.HERE)


def test_what_the_compiler_cannot_print_has_no_bound():
    row = {"fits": True, "executed_flops_all_devices": 8e15, "model_flops_all_devices": 6e15}
    chip = chips.chip("TPU v5")
    found = compile_lib.at_best(row, None, 4, chip)
    assert found["bounds_s"] == {"compute_s": 2e15 / chip.flops, "memory_s": None, "interconnect_s": None}
    assert found["bound_by"] is None and found["mfu_at_bound"] is None  # Not "compute", which may not be what binds.
    report = {"config": "c", "topology": "t", "device": "d", "devices": 4, "mesh": {"data": 4}}
    sizes = dict.fromkeys(("compile_s", "total_bytes", "arguments_bytes", "temporaries_bytes"), 1)
    row |= found | sizes | {"program": "sample", "traffic": None, "why_no_traffic": "no"}
    assert "at least 4.36 s, for the products alone" in compile_lib.table(report | {"programs": [row]})


@pytest.mark.parametrize(
    "sentence",
    [
        "total memory required for HLO temporaries (19.30G) exceeds available HBM (15.75G).",
        "Used 15.88G of 15.75G hbm.",
    ],
)
def test_what_does_not_fit_says_by_how_much(sentence):
    error = RuntimeError(f"RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: No memory. {sentence} Exceeded by 1M.\nmore")
    assert compile_lib._why_not(error) == sentence
