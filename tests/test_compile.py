"""--mode=compile: its programs are those of a run, and its figures agree with counts by hand."""

import json
import os
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

from popi_jax.config import Config, changed, parse
from popi_jax.configs import llama3_3b, llama3_8b, quickstart
from popi_jax.data import packing, prepared
from popi_jax.data.shapes import Shapes
from popi_jax.errors import UserError
from popi_jax.model import hub, sharding
from popi_jax.modes import compile as compile_lib
from popi_jax.modes import setup
from popi_jax.modes.cost import chips, traffic
from popi_jax.rollout import text
from popi_jax.training import batches
from tests.test_readme import COMMANDS, ROOT

# The smallest config with every part: two micro-batches, fewer summaries for theta, adapters.
SMALL = {
    "train.users_per_step": 8,
    "train.accumulation_generator": 2,
    "sampling.k": 2,
    "sampling.k_generator": 1,
    "lora.rank": 4,
    "mesh.fsdp": 4,
    "mesh.data": 1,
}


def small(**values: object) -> Config:
    values = SMALL | {key.replace("__", "."): value for key, value in values.items()}
    return changed(parse(quickstart.get_config("runlocal")), values)


def test_compile_lowers_the_program_that_a_run_calls(tmp_path, monkeypatch):
    """The very function, and for the shapes of the run's own batch the very text."""
    config = small()
    run = setup.load(config)
    sources = prepared.from_config(config.data, tmp_path)
    state = run.initial_state()
    examples = [sources["train"][i] for i in range(config.train.users_per_step)]
    written = batches.WrittenSummaries(tmp_path / "written.jsonl")
    maker = batches.BatchMaker(config, run.sampler, run.scorer, run.references(tmp_path / "cache"), written)
    asked = []
    step = Shapes.step
    monkeypatch.setattr(Shapes, "step", lambda *args: asked.append(args) or step(*args))
    real, _ = maker.make(state.phi, state.theta, examples, 0, "joint")
    ((shapes, kind, measured),) = asked
    calls = {call.name: call for call in compile_lib.calls(config, run.programs)}
    joint = calls["joint_step"]
    assert joint.fn is run.programs.train_steps["joint"]
    assert calls["sample"].fn is run.sampler.sample and calls["evaluate_score"].fn is run.scorer.score
    same = step(shapes, kind, measured)
    lowered = joint.fn.lower(*joint.args[:2], same)
    assert lowered.as_text() == joint.fn.lower(state, run.base, real).as_text()
    abstract = joint.args[2]
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    for (path, one), other in zip(jax.tree.leaves_with_path(real), jax.tree.leaves(abstract), strict=True):
        name = jax.tree_util.keystr(path)
        assert one.dtype == other.dtype and one.ndim == other.ndim, name
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim), name
        assert all(a <= b for a, b in zip(one.shape, other.shape, strict=True)), (name, one.shape, other.shape)


def test_the_report_on_this_machine():
    config = small(model__remat="full")
    found = compile_lib.report(config, compile_lib.HERE)
    rows = {row["name"]: row for row in found["steps"]}
    assert list(rows) == ["sample", "joint_step", "evaluate_sample", "evaluate_score", "evaluate_respond"]
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert all(row["fits"] and not row["host_transfers"] for row in rows.values())
    joint = rows["joint_step"]
    assert joint["executed_flops_per_device"] > 1.1 * joint["model_flops_per_device"]  # Layers are computed again.
    assert joint["collective_bytes_per_device"]["all-gather"] > 0  # Weights lie in pieces.
    assert 4 * rows["evaluate_score"]["model_flops_per_device"] == score_flops(config)
    assert "joint_step" in compile_lib.table(found)


def score_flops(config) -> float:
    """FLOPs of reading the rows of an evaluation batch once, by hand."""
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


def test_compiled_and_drawn_samples_have_the_same_shapes():
    config = small()
    run = setup.load(config)
    drawn = run.sampler.draw(
        None,
        [[1, 2, 3]] * 8,
        jax.random.key(0),
        text.in_training(config),
        branches=2,
        max_tokens=config.limits.summary,
    )
    (call,) = [call for call in compile_lib.calls(config, run.programs) if call.name == "sample"]
    abstract = call.fn.eval_shape(*call.args, **call.options)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn.samples) == jax.tree.map(
        lambda x: (x.shape, np.dtype(x.dtype)), abstract
    )


@pytest.mark.parametrize("module", [llama3_3b, llama3_8b])
@pytest.mark.parametrize("arg", ["full", "lora"])
def test_published_shapes_need_no_weights(module, arg):
    config = parse(module.get_config(arg))
    model = hub.read_config(compile_lib.model_shape(config), compute_dtype="bfloat16", remat="full", attention="splash")
    mesh = jax.sharding.AbstractMesh((1, 16, 1), sharding.AXES)
    own = setup.make_programs(config, mesh, model)
    count = sum(leaf.size for leaf in jax.tree.leaves(own.policy.abstract_base()))
    assert count == {llama3_3b: 3_212_749_824, llama3_8b: 8_030_261_248}[module]  # As their model cards say.
    batch = Shapes(config, mesh, config.limits.buckets).step("joint")
    assert batch.generator.bins.tokens_CxL.shape == (8, 16, 6144)


def documented_fields() -> set[str]:
    """The fields of a step in docs/reference/command-line.md."""
    page = (ROOT / "docs/reference/command-line.md").read_text()
    rows = page[page.index("## The report of `--mode=compile`") :].split("\n| `")[1:]
    return {name for row in rows for name in re.findall(r"`?(\w+)`", row.split(" | ")[0])}


def test_every_program_compiles_for_a_tpu_slice(tmp_path):
    """The real compiler, without a TPU: no dynamic shape, nothing that Mosaic refuses, no host transfer.

    The command is the one of docs/howto/tpu-slice.md.
    """
    pytest.importorskip("libtpu")
    command = next(command for command in COMMANDS if "--topology=v5e:2x2" in command)
    words = shlex.split(command.replace("quickstart.py", "quickstart.py:runlocal"))
    words[0], words[-1] = sys.executable, f"--output={tmp_path / 'slice.json'}"
    flags = [f"--config.{key}={value}" for key, value in SMALL.items()]
    subprocess.run([*words, *flags], cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, check=True, timeout=900)
    found = json.loads((tmp_path / "slice.json").read_text())
    assert found["device_kind"] == "TPU v5 lite" and found["devices"] == 4
    for row in found["steps"]:
        assert row["fits"] and row["host_transfers"] == [] and row["compiler_flops_per_device"] > 0
        # Decoding ends when all texts have, which nothing says before; a device's last two prompts may become one.
        assert bool(row["unknown_loops"]) == row["name"].endswith(("sample", "respond"))
        assert row["total_bytes_per_device"] < found["hbm_bytes_per_device"] and row["bound_s"] > 0
    fields = {field for row in found["steps"] for field in row} | {"why_not", "why_no_traffic"}
    assert fields == documented_fields()
    joint = next(row for row in found["steps"] if row["name"] == "joint_step")
    assert joint["collective_counts"]["all-gather"] > 1

    def talks(x):
        jax.debug.print("{}", x.sum())
        return x

    mesh = setup.make_mesh(small(), compile_lib.slice_devices("v5e:2x2"))
    abstract = jax.ShapeDtypeStruct((8, 128), np.float32, sharding=sharding.replicated(mesh))
    assert traffic.measure(jax.jit(talks).lower(abstract).compile().as_text()).host_transfers


@pytest.mark.parametrize("topology", chips.TOPOLOGIES)
def test_every_suggested_slice_has_a_mesh_and_known_peaks(topology):
    pytest.importorskip("libtpu")
    devices = compile_lib.slice_devices(topology)
    config = small(mesh__data=-1, mesh__fsdp=4, mesh__tensor=1)
    assert setup.make_mesh(config, devices).size == len(devices)
    assert chips.chip(devices[0].device_kind).flops > 0


def test_sparse_core_traffic_is_counted():
    """On v5p a scatter does, and XLA's reader refuses the program's text: JAX cannot print it."""
    pytest.importorskip("libtpu")
    mesh = setup.make_mesh(small(), compile_lib.slice_devices("v5p:2x2x1"))
    values, places = (
        jax.ShapeDtypeStruct((51_200,), dtype, sharding=sharding.replicated(mesh)) for dtype in (np.float32, np.int32)
    )
    fn = jax.jit(lambda values, places: jax.ops.segment_sum(values, places, 10))
    row, moved = compile_lib.compile_call(compile_lib.Call("", fn, (values, places)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="async"):  # Else libtpu need not write anything down.
        fn.lower(values, places).compile().as_text()
    # Both are sorted, read and written, and then read.
    assert moved is not None and moved.hbm_bytes == pytest.approx(6 * 4 * 51_200, rel=1e-3), row
    assert moved.collectives == {} and moved.unknown_loops == []


def test_two_processes_compile_side_by_side():
    """The lock of libtpu is for the chips; the compiler holds none."""
    pytest.importorskip("libtpu")
    command = "from popi_jax.modes import compile; print(len(compile.slice_devices('v5e:2x2')))"
    compile_lib.slice_devices("v5e:2x2")
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "4\n", done.stderr


@pytest.mark.parametrize(
    "topology",
    ["v5e", "v5e:", "v5e:4", "v5e:2x", "v5e:x2", "v5e:+2x2", "v5e:2x2x2x2", "v5e:97x97", "v5e:2x2\n", ":2x2"],
)
def test_a_slice_of_impossible_sizes_never_reaches_libtpu(monkeypatch, topology):
    monkeypatch.setattr(compile_lib.topologies, "get_topology_desc", lambda **_: pytest.fail("libtpu was asked"))
    with pytest.raises(UserError, match=r"--topology=.*: not the name of a slice .*; give a slice, such as v4:2x2x1"):
        compile_lib.slice_devices(topology)


def test_mistakes_are_reported():
    with pytest.raises(UserError, match="--topology=v5e:nonsense: .*such as .*v5e:4x4"):
        compile_lib.report(small(), "v5e:nonsense")
    with pytest.raises(UserError, match="config.model.attention"):
        compile_lib.report(small(model__attention="splash"), compile_lib.HERE)
    with pytest.raises(UserError, match="set config.model.shape to its config.json"):
        compile_lib.report(small(model__path="somebody/model"), compile_lib.HERE)


def test_unprintable_programs_have_no_bound():
    row = {"fits": True, "executed_flops_per_device": 2e15, "model_flops_per_device": 1.5e15}
    chip = chips.chip("TPU v5")
    found = compile_lib.at_best(row, None, chip)
    assert found["bounds_s"] == {"compute_s": 2e15 / chip.flops, "memory_s": None, "interconnect_s": None}
    assert found["bound_by"] is None and found["mfu_bound"] is None  # Not "compute": another bound may be tighter.
    report = {"config": "c", "topology": "t", "device_kind": "d", "devices": 4, "mesh": {"data": 4}}
    sizes = dict.fromkeys((f"{name}_bytes_per_device" for name in ("total", "argument", "temp")), 1)
    row |= (
        found | sizes | {"name": "sample", "compile_s": 1, "hbm_bytes_moved_per_device": None, "why_no_traffic": "no"}
    )
    report |= {"hbm_bytes_per_device": chip.hbm_bytes, "steps": [row]}
    assert "at least 4.36 s, for the products alone" in compile_lib.table(report)


@pytest.mark.parametrize(
    "sentence",
    [
        "total memory required for HLO temporaries (19.30G) exceeds available HBM (15.75G).",
        "Used 15.88G of 15.75G hbm.",
    ],
)
def test_an_oom_message_keeps_both_figures(sentence):
    error = RuntimeError(f"RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: No memory. {sentence} Exceeded by 1M.\nmore")
    assert compile_lib._why_not(error) == sentence
