"""Checkpoints are restored exactly, on any mesh, or not at all."""

import json
import os
import pathlib
import subprocess
import sys
import time

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


def test_resuming_before_a_damaged_step_writes_it_again(tmp_path, caplog):
    write(tmp_path, [1, 2, 3])
    flip_byte(tmp_path / "3")
    write(tmp_path, [3], after=2)
    assert "removing checkpoint 3" in caplog.text
    assert_same(checkpoint.restore(tmp_path, abstract(make_state()), step=3).state, make_state(3))


def test_checksum_depends_on_every_bit_and_on_the_order():
    x = np.random.default_rng(1).integers(0, 2**32, (3, 5), dtype=np.uint32)
    checksum = jax.jit(checkpoint.checksum)
    base = int(checksum(x))
    for index in np.ndindex(x.shape):
        for bit in range(32):
            y = x.copy()
            y[index] ^= np.uint32(1 << bit)
            assert int(checksum(y)) != base
    swapped = x.copy()
    swapped[0, 0], swapped[0, 1] = x[0, 1], x[0, 0]
    assert int(checksum(swapped)) != base
    # Computed independently with Python integers.
    flat = [int(v) for v in x.reshape(-1)]
    assert base == sum(v * ((i * 2654435761 + 1) % 2**32 | 1) for i, v in enumerate(flat)) % 2**32


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
    assert record["checksums"].keys() == record["tree"].keys()
