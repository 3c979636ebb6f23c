"""Hub folders: weights load as stored, export and import are exact, bad folders raise one clear line."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from transformers import PreTrainedTokenizerFast

from popi_jax.errors import UserError
from popi_jax.model import hub, sharding
from popi_jax.model.policy import Policy
from popi_jax.model.tokenizer import Tokenizer

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
FAMILIES = ("llama3", "qwen2", "qwen3")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Returns a writable copy of a single-file checkpoint."""
    return pathlib.Path(shutil.copytree(FIXTURES / "qwen3", tmp_path / "qwen3", copy_function=shutil.copyfile))


def rewrite(folder: pathlib.Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (None) removes tensors; "__" stands for "." in names."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    safetensors.numpy.save_file(tensors, path)


def refused(folder: pathlib.Path | str) -> str:
    with pytest.raises(UserError) as caught:
        hub.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_bits(first: hub.Params, second: hub.Params) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_loaded_arrays_equal_the_stored_tensors():
    params = hub.load(FIXTURES / "qwen2").params
    stored = safetensors.numpy.load_file(FIXTURES / "qwen2" / "model.safetensors")
    head_dim, layer, head = 12, 1, 1

    def tensor(name: str) -> np.ndarray:
        return stored[f"model.layers.{layer}.{name}"].astype(np.float32)

    rows = slice(head * head_dim, (head + 1) * head_dim)
    layers = params["layers"]
    for name in ("q", "k", "v"):
        np.testing.assert_array_equal(
            layers[name]["kernel"][layer, :, head], tensor(f"self_attn.{name}_proj.weight")[rows].T
        )
        np.testing.assert_array_equal(layers[name]["bias"][layer, head], tensor(f"self_attn.{name}_proj.bias")[rows])
    np.testing.assert_array_equal(layers["o"]["kernel"][layer, head], tensor("self_attn.o_proj.weight")[:, rows].T)
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(layers[name]["kernel"][layer], tensor(f"mlp.{name}_proj.weight").T)
    np.testing.assert_array_equal(layers["attn_norm"]["scale"][layer], tensor("input_layernorm.weight"))
    np.testing.assert_array_equal(layers["mlp_norm"]["scale"][layer], tensor("post_attention_layernorm.weight"))
    np.testing.assert_array_equal(params["embed"]["embedding"], stored["model.embed_tokens.weight"].astype(np.float32))
    assert stored["model.embed_tokens.weight"].dtype == ml_dtypes.bfloat16
    assert "head" not in params


@pytest.mark.parametrize("frozen_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_tree_equals_the_declared_one(family: str, frozen_dtype: str):
    checkpoint = hub.load(FIXTURES / family, compute_dtype="bfloat16", remat="full", frozen_dtype=frozen_dtype)
    declared = Policy(checkpoint.config).abstract_base()
    assert {leaf.dtype for leaf in jax.tree.leaves(declared)} == {jnp.dtype(frozen_dtype)}
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), checkpoint.params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), declared
    )
    assert (checkpoint.config.compute_dtype, checkpoint.config.remat) == ("bfloat16", "full")
    trained = jax.eval_shape(Policy(checkpoint.config).init_delta, checkpoint.params, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("shard_bytes", [2**30, 60_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_then_import_is_exact(family: str, shard_bytes: int, tmp_path: pathlib.Path):
    first = hub.load(FIXTURES / family)
    hub.save(tmp_path, first.config, first.params, first.tokenizer_path, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes == 2**30)
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {file.name for file in files}
        assert all(file.stat().st_size < shard_bytes + 10_000 for file in files)
    second = hub.load(tmp_path)
    assert second.config == first.config
    assert_same_bits(first.params, second.params)
    assert (tmp_path / "tokenizer.json").read_bytes() == (FIXTURES / family / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [2, 3]


def test_an_exported_tokenizer_neither_cuts_nor_draws(tmp_path: pathlib.Path):
    source = pathlib.Path(shutil.copytree(FIXTURES / "qwen3", tmp_path / "source", copy_function=shutil.copyfile))
    state = json.loads((source / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (source / "tokenizer.json").write_text(json.dumps(state | {"model": state["model"] | {"dropout": 0.9}}))
    checkpoint = hub.load(source)
    hub.save(tmp_path / "export", checkpoint.config, checkpoint.params, source)
    plain, exported = (
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        for folder in (FIXTURES / "qwen3", tmp_path / "export")
    )
    text = "Tea is good, no? " * 9
    assert exported.encode(text).ids == plain.encode(text).ids


# In the manner of Llama 3.2 and of Qwen 3: the date in the system turn, a macro that looks at the thinking mode.
DATED = """
{%- macro turn(role, text) %}<|im_start|>{{ role }}
{{ text }}{% if enable_thinking is not defined or enable_thinking %}<more>{% endif %}<|im_end|>
{% endmacro %}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{{- turn("system", "Today: " + date_string + strftime_now(", %A, %-d.%-m.%y, %H:%M") + "\\n") }}
{%- for message in messages %}{{ turn(message.role, message.content) }}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if not thinking %}<think></think>{% endif %}{% endif %}"""


@pytest.mark.parametrize("place", ["file", "config", "named", "list"])
def test_an_exported_template_writes_what_was_trained_on(place: str, tmp_path: pathlib.Path):
    source = pathlib.Path(shutil.copytree(FIXTURES / "qwen3", tmp_path / "source", copy_function=shutil.copyfile))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "chat_template.jinja").unlink(missing_ok=True)
    if place == "file":
        (source / "chat_template.jinja").write_text(DATED)
    else:
        named = [{"name": "default", "template": DATED}, {"name": "tool_use", "template": "tools"}]
        by_name = {entry["name"]: entry["template"] for entry in named}
        settings["chat_template"] = {"config": DATED, "named": by_name, "list": named}[place]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = hub.load(source)
    hub.save(tmp_path / "export", checkpoint.config, checkpoint.params, source)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "export")
    messages = [{"role": "user", "content": "Hi"}]
    written = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ours = Tokenizer.load(source)
    assert written == ours.show(ours.render(messages))
    assert "Today: 26 Jul 2024, Friday, 26.7.24, 00:00" in written and "<more>" not in written
    again = Tokenizer.load(tmp_path / "export")
    assert again.render(messages) == ours.render(messages) and again.fixed_template == again.template
    if place in ("named", "list"):
        assert theirs.chat_template["tool_use"] == "tools"


def test_a_template_without_a_date_is_exported_as_it_is(tmp_path: pathlib.Path):
    checkpoint = hub.load(FIXTURES / "llama3")
    hub.save(tmp_path, checkpoint.config, checkpoint.params, checkpoint.tokenizer_path)
    first, second = (Tokenizer.load(folder).template for folder in (FIXTURES / "llama3", tmp_path))
    assert first == second


def test_saving_again_leaves_no_old_shard(tmp_path: pathlib.Path):
    checkpoint = hub.load(FIXTURES / "qwen3")
    hub.save(tmp_path, checkpoint.config, checkpoint.params, checkpoint.tokenizer_path, shard_bytes=60_000)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, checkpoint.params)
    hub.save(tmp_path, checkpoint.config, doubled, tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert_same_bits(hub.load(tmp_path).params, doubled)


def test_half_precision_on_disk_comes_back_as_float32(tmp_path: pathlib.Path):
    checkpoint = hub.load(FIXTURES / "qwen3")
    hub.save(tmp_path, checkpoint.config, checkpoint.params, checkpoint.tokenizer_path, dtype="float16")
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float16).astype(np.float32), checkpoint.params)
    assert_same_bits(hub.load(tmp_path).params, expected)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 0.6 * (FIXTURES / "qwen3" / "model.safetensors").stat().st_size


def test_sharded_load_equals_plain_load():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    plain = hub.load(FIXTURES / "llama3")
    policy = Policy(plain.config)
    shardings = policy.base_shardings(mesh)
    sharded = hub.load(FIXTURES / "llama3", mesh=mesh)
    assert_same_bits(plain.params, sharded.params)
    kernel = sharded.params["layers"]["q"]["kernel"]
    assert kernel.sharding.is_equivalent_to(shardings["layers"]["q"]["kernel"], kernel.ndim)
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


def test_a_slice_reads_no_more_than_its_part():
    leaf = next(leaf for leaf in hub.leaves(hub.load(FIXTURES / "qwen3").config) if leaf.path[1] == "o")
    full = np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32)
    reads = []

    class Spy:
        def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
            reads.append(index)
            return leaf.to_hub(full)[index]

    index = (slice(1, 3), slice(4, 8), slice(0, 12))
    np.testing.assert_array_equal(leaf.from_hub(Spy(), index), full[index])
    head_dim = leaf.shape[1]
    assert reads == [(slice(0, 12), slice(head_dim, 3 * head_dim))]


def test_fingerprint_covers_the_weights(folder: pathlib.Path):
    before = hub.load(folder).fingerprint
    assert before == hub.load(FIXTURES / "qwen3").fingerprint
    (folder / "tokenizer_config.json").write_text("{}")
    assert hub.load(folder).fingerprint == before
    rewrite(folder, model__norm__weight=np.ones(48, np.float32))
    ones = hub.load(folder).fingerprint
    rewrite(folder, model__norm__weight=np.full(48, 2, np.float32))
    assert len({before, ones, hub.load(folder).fingerprint}) == 3


def test_harmless_extra_tensors_are_ignored(folder: pathlib.Path):
    plain = hub.load(folder).params
    embedding = safetensors.numpy.load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    inv_freq = np.ones(8, np.float32)
    rewrite(folder, lm_head__weight=embedding, model__layers__0__self_attn__rotary_emb__inv_freq=inv_freq)
    assert_same_bits(hub.load(folder).params, plain)


def test_missing_tensor(folder: pathlib.Path):
    rewrite(folder, model__layers__1__mlp__up_proj__weight=None)
    message = refused(folder)
    assert str(folder / "model.safetensors") in message
    assert "model.layers.1.mlp.up_proj.weight is missing" in message


def test_extra_tensor(folder: pathlib.Path):
    rewrite(folder, model__layers__0__self_attn__q_proj__bias=np.zeros(64, np.float32))
    message = refused(folder)
    assert str(folder / "model.safetensors") in message
    assert "model.layers.0.self_attn.q_proj.bias has no place" in message


def test_tensor_of_another_shape(folder: pathlib.Path):
    rewrite(folder, model__layers__0__mlp__down_proj__weight=np.zeros((80, 48), np.float32))
    message = refused(folder)
    assert str(folder / "model.safetensors") in message
    assert "model.layers.0.mlp.down_proj.weight has shape [80, 48]" in message
    assert "[48, 80]" in message


def test_quantised_tensor(folder: pathlib.Path):
    rewrite(folder, model__norm__weight=np.ones(48, np.int8))
    assert "model.norm.weight is stored as I8" in refused(folder)


def test_truncated_weights(folder: pathlib.Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50_000])
    assert f"{path}: not a readable safetensors file" in refused(folder)


def test_missing_shard(tmp_path: pathlib.Path):
    folder = shutil.copytree(FIXTURES / "llama3", tmp_path / "llama3")
    (tmp_path / "llama3" / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: no such file" in refused(folder)


INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: pathlib.Path) -> pathlib.Path:
    """Returns a writable copy of a checkpoint in two shards."""
    return pathlib.Path(shutil.copytree(FIXTURES / "llama3", tmp_path / "llama3", copy_function=shutil.copyfile))


def test_the_index_says_where_a_tensor_is(sharded: pathlib.Path):
    """Another shard may hold a stale copy."""
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    plain = hub.load(sharded).params
    for name, file in weight_map.items():
        (other,) = set(weight_map.values()) - {file}
        whole = safetensors.numpy.load_file(FIXTURES / "llama3" / other)
        safetensors.numpy.save_file(whole | {name: np.full((3, 3), 7, np.float32)}, sharded / other)
        assert_same_bits(hub.load(sharded).params, plain)
        safetensors.numpy.save_file(whole, sharded / other)


def test_an_index_that_does_not_describe_the_shards(sharded: pathlib.Path):
    index = json.loads((sharded / INDEX).read_text())
    weight_map = index["weight_map"]
    files = sorted(set(weight_map.values()))
    name = next(name for name, file in weight_map.items() if file == files[0])

    def says(changed: object) -> str:
        (sharded / INDEX).write_text(json.dumps({"weight_map": changed}))
        return refused(sharded)

    assert f"{sharded / files[1]}: tensor {name} is missing; weight_map" in says({**weight_map, name: files[1]})
    for file in (
        None,
        3,
        ["x"],
        "",
        "..",
        "../x.safetensors",
        "/x.safetensors",
        "pytorch_model.bin",
        "a/b.safetensors",
    ):
        assert f"gives tensor {name} the file {json.dumps(file)}" in says({**weight_map, name: file})
    for wrong in (None, [], {}, "x", 3):
        assert "weight_map is missing" in says(wrong)
    second = safetensors.numpy.load_file(sharded / files[1])
    safetensors.numpy.save_file(second | {name: np.ones((3, 3), np.float32)}, sharded / files[1])
    unlisted = {other: file for other, file in weight_map.items() if other != name}
    assert f"tensor {name} is also in {sharded / files[0]}" in says(unlisted)


@pytest.mark.parametrize("where", [0, -1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(folder: pathlib.Path, value: float, where: int):
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = safetensors.numpy.load_file(folder / "model.safetensors")[name].copy()
    tensor.flat[where] = value
    rewrite(folder, **{name: tensor})
    assert f"{folder / 'model.safetensors'}: tensor {name} has values that are NaN or infinite" in refused(folder)
    with pytest.raises(UserError, match="NaN or infinite"):
        hub.load(folder, mesh=sharding.make_mesh(data=1, fsdp=4, tensor=2))


def test_weights_beyond_the_range_of_frozen_dtype(folder: pathlib.Path):
    rewrite(folder, model__norm__weight=np.full(48, 3.4e38, np.float32))
    hub.load(folder)
    with pytest.raises(UserError, match=r"model\.norm\.weight has values that are NaN or infinite as bfloat16"):
        hub.load(folder, frozen_dtype="bfloat16")


def damaged(raw: bytes) -> dict[str, bytes]:
    """Returns safetensors files that are not: a wrong header length, header or end."""
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def file(header: object) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + body

    name = next(key for key in header if key != "__metadata__")
    found = {"empty": b"", "short": raw[:5], "no_header": raw[:8], "half_header": raw[: 8 + length // 2]}
    found |= {
        f"length_{n}": n.to_bytes(8, "little") + raw[8:] for n in (0, 1, length - 1, length + 1, 2**40, 2**64 - 1)
    }
    found |= {
        f"text_{i}": file(text) for i, text in enumerate((b"", b"{", b"[]", b"null", b"\xff" * 9, b'{"a":' * 999))
    }
    entry = header[name]
    for key, values in {
        "dtype": (None, 3, "F99", "f32"),
        "shape": (None, "x", [-1], [1.5], [2**40, 2**40], [2**63], [True]),
        "data_offsets": (None, [], [0], [8, 0], [0, 2**60], [-8, 0], ["0", "8"]),
    }.items():
        found |= {f"{key}_{i}": file({**header, name: {**entry, key: value}}) for i, value in enumerate(values)}
        found[f"no_{key}"] = file({**header, name: {k: v for k, v in entry.items() if k != key}})
    found |= {f"entry_{i}": file({**header, name: value}) for i, value in enumerate((None, 3, [], "x"))}
    found |= {"metadata": file({**header, "__metadata__": {"a": 1}}), "cut": raw[:-1], "longer": raw + b"x"}
    return found


def test_damaged_safetensors_files(folder: pathlib.Path):
    path = folder / "model.safetensors"
    for kind, raw in damaged(path.read_bytes()).items():
        path.write_bytes(raw)
        line = refused(folder)
        assert str(path) in line and len(line) < 400, (kind, line)


def test_tied_config_with_another_head(folder: pathlib.Path, caplog):
    embedding = safetensors.numpy.load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lm_head__weight=embedding)
    assert hub.load(folder).config.tie_embeddings and not caplog.text
    changed = embedding.copy()
    changed[-1, -1] += 1
    rewrite(folder, lm_head__weight=changed)
    checkpoint = hub.load(folder)
    np.testing.assert_array_equal(checkpoint.params["head"]["kernel"], changed.T.astype(np.float32))
    assert not checkpoint.config.tie_embeddings and "lm_head.weight differs" in caplog.text
    rewrite(folder, lm_head__weight=changed[:-1])
    assert "lm_head.weight has shape" in refused(folder)


def test_missing_or_broken_config(folder: pathlib.Path):
    (folder / "config.json").write_text("{")
    assert f"{folder}/config.json: not a readable JSON file" in refused(folder)
    for text in ("[]", "3", "null", '{"vocab_size": ' + "1" * 5000 + "}", "[" * 10**5, "\x00"):
        (folder / "config.json").write_text(text)
        assert f"{folder}/config.json: " in refused(folder)
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    assert f"{folder}/config.json: not a readable JSON file" in refused(folder)
    (folder / "config.json").unlink()
    assert f"{folder}/config.json: no such file" in refused(folder)


def test_an_adapter_is_not_ignored(folder: pathlib.Path):
    (folder / "adapter_config.json").write_text("{}")
    assert f"{folder}/adapter_config.json: an adapter is not a model" in refused(folder)
    (folder / "config.json").unlink()
    assert f"{folder}/adapter_config.json: an adapter is not a model" in refused(folder)


def test_a_hub_id_loads_like_a_folder(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append(repo_id)
        return str(folder)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    checkpoint = hub.load("someone/some-model")
    assert asked == ["someone/some-model"]
    assert_same_bits(checkpoint.params, hub.load(FIXTURES / "qwen3").params)


def test_neither_a_folder_nor_on_the_hub(monkeypatch: pytest.MonkeyPatch):
    def download(repo_id: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route to the hub\nand a second line")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    message = refused("checkpoints/no-such-model")
    assert "checkpoints/no-such-model" in message
    assert "no route to the hub" in message


def test_stylebook_is_the_folder_in_the_package():
    assert hub.resolve("stylebook") == pathlib.Path(hub.__file__).parent.parent / "assets" / "stylebook"


PEAK = """
import pathlib, sys, threading, time
import jax
from popi_jax.model import sharding
from popi_jax.model import hub

def held():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    while True:
        peaks.append(held())
        time.sleep(0.002)

mesh = sharding.make_mesh(1, -1, 1)
hub.load("stylebook", mesh)  # JAX's own memory is taken before the measurement.
peaks = [held()]
threading.Thread(target=watch, daemon=True).start()
loaded = hub.load(sys.argv[1], mesh)
size = sum(shard.data.nbytes for x in jax.tree.leaves(loaded.params) for shard in x.addressable_shards)
print((max(peaks) - peaks[0]) / size)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="the process's memory is read from /proc")
@pytest.mark.parametrize("devices", [1, 8])
def test_loading_takes_little_extra_memory(tmp_path: pathlib.Path, devices: int):
    config = hub.read_config(FIXTURES / "llama3" / "config.json")
    config = dataclasses.replace(config, n_layers=12, d_model=512, d_ff=2048, vocab_size=8000)
    params = Policy(config).init_base(jax.random.key(0))
    assert sum(x.nbytes for x in jax.tree.leaves(params)) > 150e6
    hub.save(tmp_path, config, params, FIXTURES / "llama3", shard_bytes=2**26)
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "NPROC": "16"}
    flags["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # Freed memory returns to the system, so that it counts as free.
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        capture_output=True, text=True, check=False, env=os.environ | flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 1.0 < float(done.stdout) < 1.3
