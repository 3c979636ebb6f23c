"""Checkpoints are restored exactly, on any mesh, or not at all."""

import json
import os
import pathlib
import subprocess
import sys
import time
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from popi_jax import checkpoint
from popi_jax.errors import UserError

WIDTH = 2000  # Wide enough that the middle byte of the largest file belongs to an array, not to the index.


def make_state(seed: int = 0, width: int = WIDTH) -> dict:
    rng = np.random.default_rng(seed)
    params = {
        "w": jnp.asarray(rng.normal(size=(4, width, 3)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(16, width)), jnp.bfloat16),
        "mask": jnp.asarray(rng.integers(0, 2, 5), bool),
    }
    trained = {name: x for name, x in params.items() if name != "mask"}
    return {"params": params, "opt_state": optax.adam(1e-3).init(trained), "step": jnp.asarray(7, jnp.int32)}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def write(folder, numbers, keep=10, after=0, meta=None):
    with checkpoint.Writer(folder, keep=keep, after=after) as writer:
        for n in numbers:
            writer.save(n, make_state(n), {"data": {"next_index": 10 * n}, **(meta or {})})


def data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d" and p.stat().st_size > 200]


def flip_byte(folder: pathlib.Path) -> None:
    """Changes one byte in the middle of the largest file, which holds arrays, as a bad disk might."""
    path = max(data_files(folder), key=lambda p: p.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def test_round_trip_is_exact_and_reads_the_newest(tmp_path):
    write(tmp_path, [10, 20])
    restored = checkpoint.restore(tmp_path, abstract(make_state()))
    assert (restored.step, restored.meta) == (20, {"data": {"next_index": 200}})
    assert_same(restored.state, make_state(20))
    assert checkpoint.restore(tmp_path, abstract(make_state()), step=10).step == 10


def test_folder_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(pathlib.Path("runs/a"), [1])
    assert checkpoint.restore("runs/a", abstract(make_state())).step == 1
    assert checkpoint.steps("runs/a") == [1]


def test_missing_folder_has_no_checkpoints(tmp_path):
    assert checkpoint.restore(tmp_path / "none", abstract(make_state())) is None
    assert checkpoint.steps(tmp_path / "none") == []


def test_keeps_the_newest(tmp_path):
    write(tmp_path, [1, 2, 3, 4], keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]


def test_arrays_may_be_donated_after_save(tmp_path):
    state = {"x": jnp.arange(2**20, dtype=jnp.float32)}
    expected, want = {"x": np.arange(2**20, dtype=np.float32)}, abstract(state)
    with checkpoint.Writer(tmp_path, keep=1, after=0) as writer:
        writer.save(1, state, {})
        jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state))
    assert_same(checkpoint.restore(tmp_path, want).state, expected)


def test_restores_onto_another_mesh(tmp_path):
    def sharded(shape, spec):
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        return NamedSharding(mesh, spec)

    value = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    state = {"x": jax.device_put(value, sharded((2, 2, 2), PartitionSpec(("data", "fsdp"), "tensor")))}
    with checkpoint.Writer(tmp_path, keep=1, after=0) as writer:
        writer.save(1, state, {})
    for shape, spec in [((4, 1, 2), PartitionSpec("tensor", "data")), ((1, 2, 1), PartitionSpec(None, "fsdp"))]:
        target = sharded(shape, spec)
        want = {"x": jax.ShapeDtypeStruct((8, 12), jnp.float32, sharding=target)}
        got = checkpoint.restore(tmp_path, want).state["x"]
        assert got.sharding == target
        np.testing.assert_array_equal(np.asarray(got), value)


def test_flipped_byte_falls_back_with_a_warning(tmp_path, caplog):
    write(tmp_path, [1, 2])
    flip_byte(tmp_path / "2")
    restored = checkpoint.restore(tmp_path, abstract(make_state()))
    assert restored.step == 1
    assert_same(restored.state, make_state(1))
    assert "checkpoint 2" in caplog.text and "damaged" in caplog.text
    with pytest.raises(UserError, match="checkpoint 2 is damaged"):
        checkpoint.restore(tmp_path, abstract(make_state()), step=2)


def test_orbax_alone_does_not_detect_a_flipped_byte(tmp_path):
    """The reason for our checksums. If this fails, Orbax has learnt to detect it."""
    state = {"x": jnp.asarray(np.random.default_rng(0).integers(0, 2**31, 2**16), jnp.int32)}
    with checkpoint.Writer(tmp_path, keep=1, after=0) as writer:
        writer.save(1, state, {})
    flip_byte(tmp_path / "1")
    loaded = checkpoint.v1.load_checkpointables(tmp_path / "1", {"state": abstract(state)})["state"]["x"]
    assert np.sum(np.asarray(loaded) != np.asarray(state["x"])) == 1
    with pytest.raises(UserError, match=r"checkpoints are damaged \(steps \[1\]\)"):
        checkpoint.restore(tmp_path, abstract(state))


@pytest.mark.parametrize("damage", ["truncate", "record", "no_record"])
def test_other_damage_falls_back(tmp_path, damage):
    write(tmp_path, [1, 2])
    folder = tmp_path / "2"
    if damage == "truncate":
        for path in data_files(folder):
            path.write_bytes(path.read_bytes()[:50])
    else:
        path = folder / "_CHECKPOINT_METADATA"
        assert '\\"next_index\\": 20' in path.read_text()
        if damage == "record":
            path.write_text(path.read_text().replace('\\"next_index\\": 20', '\\"next_index\\": 21'))
        else:
            path.unlink()
    assert checkpoint.restore(tmp_path, abstract(make_state())).step == 1


DAMAGED = """
import gc, pathlib, sys
from popi_jax import checkpoint
from tests.test_checkpoint import abstract, data_files, make_state, write
folder = pathlib.Path(sys.argv[1])
write(folder, [1, 2])
whole = {path: path.read_bytes() for path in [*data_files(folder / "2"), folder / "2" / "state" / "manifest.ocdbt"]}
for path, data in whole.items():
    for length in (0, 50, len(data) // 2):
        path.write_bytes(data[:length])
        assert checkpoint.restore(folder, abstract(make_state())).step == 1
        gc.collect()
    path.write_bytes(data)
"""


def test_a_damaged_checkpoint_is_told_on_one_line(tmp_path):
    """Orbax, asyncio and uvloop would print pages, some of them later."""
    command = [sys.executable, "-c", DAMAGED, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    lines = done.stderr.splitlines()
    assert len(lines) >= 6 and all(line.startswith("WARNING:root:checkpoint 2 in ") for line in lines), done.stderr


def test_resuming_before_a_damaged_step_writes_it_again(tmp_path, caplog):
    write(tmp_path, [1, 2, 3])
    flip_byte(tmp_path / "3")
    write(tmp_path, [3], after=2)
    assert "removing checkpoint 3" in caplog.text
    assert_same(checkpoint.restore(tmp_path, abstract(make_state()), step=3).state, make_state(3))


def crc32c(data: bytes) -> int:
    """The checksum of RFC 3720, bit by bit."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ 0x82F63B78 * (register & 1)
    return register ^ 0xFFFFFFFF


def test_checksums_are_crc32c_of_the_bytes():
    assert crc32c(b"123456789") == 0xE3069283
    arrays = {"x": jnp.asarray(np.random.default_rng(1).normal(size=(3, 5)), jnp.float32)}
    arrays |= {"half": arrays["x"].astype(jnp.bfloat16), "mask": arrays["x"] > 0, "scalar": jnp.int32(7)}
    sums = checkpoint._checksums(arrays | {"empty": jnp.zeros((0, 3))})
    assert sums == {name: crc32c(np.asarray(x).tobytes()) for name, x in arrays.items()} | {"empty": 0}


def test_checksum_depends_on_every_bit_and_on_the_order():
    x = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)

    def of(x: np.ndarray) -> int:
        return checkpoint._checksums({"x": jnp.asarray(x)})["x"]

    swapped, two_signs, nan, payload = x.copy(), x.copy(), x.copy(), x.copy()
    swapped[0, :2] = x[0, 1::-1]
    two_signs[[0, 2], [1, 3]] *= -1
    nan.view(np.uint32)[1, 1], payload.view(np.uint32)[1, 1] = 0x7FC00000, 0x7FC00001
    changed = [swapped, two_signs, -x, nan, payload, np.where(x == x[0, 0], 0.0, x), np.where(x == x[0, 0], -0.0, x)]
    for index in np.ndindex(x.shape):
        for bit in range(32):
            changed.append(x.copy())
            changed[-1].view(np.uint32)[index] ^= np.uint32(1 << bit)
    sums = [of(y) for y in (x, *changed)]
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize("chunk", [8, 100, 2**20])
def test_checksum_is_independent_of_the_mesh_and_of_the_processes(chunk, monkeypatch):
    monkeypatch.setattr(checkpoint, "_CHUNK", chunk)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    value = np.random.default_rng(0).normal(size=(8, 12, 2)).astype(np.float32)
    for spec in ((), ("fsdp",), (None, "tensor"), (("data", "fsdp"), "tensor"), ("tensor", None, "fsdp")):
        placed = jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))
        assert checkpoint._checksums({"x": placed}) == {"x": crc32c(value.tobytes())}
        for count in (2, 4, 8):  # Processes, each with some of the devices; the first need not hold the first part.
            parts = []
            for process in range(count):
                monkeypatch.setattr(jax, "process_index", lambda process=process: process)
                own = [s for s in placed.addressable_shards if (s.device.id * 3 + 1) % count == process]
                part = types.SimpleNamespace(shape=value.shape, dtype=value.dtype, addressable_shards=own)
                parts.append(checkpoint._of_own_part(part))
            monkeypatch.setattr(jax, "process_index", lambda: 0)
            assert np.bitwise_xor.reduce(parts) == crc32c(value.tobytes())


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path):
    write(tmp_path, [1])
    path = tmp_path / "1" / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    record = json.loads(metadata["custom_metadata"]["record"])
    record["checksums"] = record.pop("crc32c")
    text = json.dumps(record)
    metadata["custom_metadata"] = {"record": text, "crc32": zlib.crc32(text.encode())}
    path.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="/1 is a checkpoint of an earlier version") as error:
        checkpoint.restore(tmp_path, abstract(make_state()))
    assert "\n" not in str(error.value)


def test_checkpoint_of_another_model_or_config_is_refused(tmp_path):
    meta = {"model": "abc", "config": {"lora": {"rank": 8, "targets": ("q", "v")}, "seed": 0}}
    write(tmp_path, [1], meta=meta)
    assert checkpoint.restore(tmp_path, abstract(make_state()), expect=meta).step == 1  # A tuple equals a JSON list.

    with pytest.raises(UserError) as error:
        checkpoint.restore(tmp_path, abstract(make_state(width=WIDTH + 1)))
    assert "opt_state/0/mu/half is bfloat16[16, 2000] in the checkpoint and bfloat16[16, 2001]" in str(error.value)
    assert "and 3 more" in str(error.value)

    other = {"model": "abc", "config": {"lora": {"rank": 4, "targets": ("q", "v")}, "seed": 0}}
    with pytest.raises(UserError, match="config.lora.rank is 8 in the checkpoint and 4") as error:
        checkpoint.restore(tmp_path, abstract(make_state()), expect=other)
    assert "\n" not in str(error.value)

    smaller = abstract(make_state())
    del smaller["params"]["mask"]
    with pytest.raises(UserError, match="params/mask is only in the checkpoint"):
        checkpoint.restore(tmp_path, smaller)
    with pytest.raises(UserError, match=r"no checkpoint of step 5; .*\[1\]"):
        checkpoint.restore(tmp_path, abstract(make_state()), step=5)


CHILD = """
import sys, time, jax.numpy as jnp
from popi_jax import checkpoint
folder, kind = sys.argv[1:]
if kind == "save":
    with checkpoint.Writer(folder, keep=2, after=0) as writer:
        writer.save(1, {"x": jnp.full((2**24,), 1.0)}, {"n": 1})
        writer.wait()
        print("saving", flush=True)
        writer.save(2, {"x": jnp.full((2**24,), 2.0)}, {"n": 2})
"""


def start_child(folder, kind):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), kind], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path):
    with start_child(tmp_path, "save") as child:
        assert child.stdout.readline() == "saving\n"
        while not any("tmp" in p.name for p in tmp_path.iterdir()) and not (tmp_path / "2").exists():
            time.sleep(0.001)
        child.kill()
    killed_while_writing = not (tmp_path / "2").exists()
    want = abstract({"x": jnp.zeros((2**24,))})
    restored = checkpoint.restore(tmp_path, want)
    assert restored.step == restored.meta["n"] == (1 if killed_while_writing else 2)
    assert float(restored.state["x"].min()) == float(restored.state["x"].max()) == restored.step
    with checkpoint.Writer(tmp_path, keep=2, after=1) as writer:
        writer.save(3, {"x": jnp.full((2**24,), 3.0)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]  # The incomplete checkpoint is gone.
    assert float(checkpoint.restore(tmp_path, want).state["x"][0]) == 3.0


def test_record_is_plain_json(tmp_path):
    write(tmp_path, [1])
    custom = json.loads((tmp_path / "1" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    record = json.loads(custom["record"])
    assert record["tree"]["params/w"] == "float32[4, 2000, 3]"
    assert record["crc32c"].keys() == record["tree"].keys()
