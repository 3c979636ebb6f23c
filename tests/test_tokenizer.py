"""Chat templates, special tokens, and unusable folders."""

import json
import pathlib
import subprocess
import sys

import pytest
import tokenizers

from popi_jax.errors import UserError
from popi_jax.model.tokenizer import Tokenizer

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
USER = [{"role": "user", "content": "Tea?"}]
SPECIAL = ["<bos>", "<turn>", "<end>", "<eos>", "<more>"]
BOS_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def make_folder(folder: pathlib.Path, template: str | None = BOS_TEMPLATE, **config: object) -> pathlib.Path:
    """Writes a byte-level tokenizer that, like Llama's, prepends <bos> by default."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", **config}
    if template is not None:
        fields["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def test_render_writes_bos_once_and_turns_as_tokens(tmp_path: pathlib.Path):
    tokenizer = Tokenizer.load(make_folder(tmp_path))
    text = [len(SPECIAL) + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()).index(c) for c in "userĊTea?"]
    prompt = tokenizer.render(USER)
    assert prompt[: len(text) + 3] == [0, 1, *text, 2]
    assert prompt[len(text) + 3] == 1
    assert prompt.count(0) == 1


def test_a_template_without_bos_gets_none(tmp_path: pathlib.Path):
    tokenizer = Tokenizer.load(make_folder(tmp_path, BOS_TEMPLATE.removeprefix("{{ bos_token }}")))
    assert 0 not in tokenizer.render(USER)


def test_render_adds_no_turn_of_its_own(tmp_path: pathlib.Path):
    tokenizer = Tokenizer.load(make_folder(tmp_path))
    assert tokenizer.render(USER).count(1) == 2  # The user's turn and the opened answer.


def test_content_cannot_end_its_own_turn(tmp_path: pathlib.Path):
    tokenizer = Tokenizer.load(make_folder(tmp_path))
    turns = [{"role": "user", "content": text} for text in ("\ue000popi\ue000", " Tea?<end>\n", "<turn>", "Tea?")]
    ids = tokenizer.render(turns)
    assert [ids.count(token) for token in range(len(SPECIAL))] == [1, 5, 4, 0, 0]
    assert tokenizer.decode(ids) == "user\n\ue000popi\ue000user\n Tea?<end>\nuser\n<turn>user\nTea?assistant\n"


def test_encode_treats_special_tokens_as_text(tmp_path: pathlib.Path):
    tokenizer = Tokenizer.load(make_folder(tmp_path))
    ids = tokenizer.encode("a<end>")
    assert len(ids) == 6
    assert min(ids) >= len(SPECIAL)
    assert tokenizer.decode(ids) == "a<end>"
    assert tokenizer.render(USER).count(2) == 1  # encode leaves no state behind.


@pytest.mark.parametrize("text", ["Plain.", " two  spaces \n\n", "naïve café, 你好 🙂", "it 's , odd .", ""])
def test_decode_inverts_encode(text: str, tmp_path: pathlib.Path):
    tokenizer = Tokenizer.load(make_folder(tmp_path))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *ids, 2, 3]) == text


def test_end_of_turn_follows_the_template(tmp_path: pathlib.Path):
    tokenizer = Tokenizer.load(make_folder(tmp_path, pad_token="<more>"))
    assert (tokenizer.end_id, tokenizer.stop_ids, tokenizer.pad_id) == (2, (2, 3), 4)


def test_end_of_turn_falls_back_to_eos(tmp_path: pathlib.Path):
    plain = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    tokenizer = Tokenizer.load(make_folder(tmp_path, plain))
    assert (tokenizer.end_id, tokenizer.stop_ids, tokenizer.pad_id) == (3, (3,), 3)


def test_generation_config_adds_stop_ids(tmp_path: pathlib.Path):
    folder = make_folder(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert Tokenizer.load(folder).stop_ids == (2, 3, 4)


def test_date_and_thinking_are_fixed(tmp_path: pathlib.Path):
    template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%s') %}{% endif %}"
        "{{ date_string }}{% for message in messages %}<turn>{{ message['content'] }}<end>{% endfor %}"
        "{% if enable_thinking is not defined or enable_thinking %}<more>{% endif %}"
    )
    tokenizer = Tokenizer.load(make_folder(tmp_path, template))
    ids = tokenizer.render(USER)
    assert tokenizer.decode(ids) == "26 Jul 2024Tea?"
    assert SPECIAL.index("<more>") not in ids


def test_ids_stay_below_the_vocabulary_size():
    tokenizer = Tokenizer.load(FIXTURES / "llama3")
    assert tokenizer.vocab_size == 260
    assert max(tokenizer.encode("".join(map(chr, range(32, 500))))) < 260


def test_fingerprint_follows_the_template(tmp_path: pathlib.Path):
    first = Tokenizer.load(make_folder(tmp_path)).fingerprint
    assert Tokenizer.load(make_folder(tmp_path)).fingerprint == first
    assert Tokenizer.load(make_folder(tmp_path, BOS_TEMPLATE + " ")).fingerprint != first


def refused(folder: pathlib.Path) -> str:
    with pytest.raises(UserError) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_tokenizer(tmp_path: pathlib.Path):
    assert f"{tmp_path}/tokenizer.json: no such file" in refused(tmp_path)


def test_broken_tokenizer(tmp_path: pathlib.Path):
    (make_folder(tmp_path) / "tokenizer.json").write_text("{}")
    assert f"{tmp_path}/tokenizer.json: not a readable tokenizer" in refused(tmp_path)


@pytest.mark.parametrize("name", ["eos_token", "bos_token", "unk_token"])
def test_a_named_token_that_does_not_exist(name: str, tmp_path: pathlib.Path):
    message = refused(make_folder(tmp_path, **{name: "<nosuch>"}, pad_token="<neither>"))
    assert f"{name} '<nosuch>' is not in tokenizer.json; name a token that is there" in message


def test_a_padding_token_that_does_not_exist_is_left_out(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
    plain = Tokenizer.load(make_folder(tmp_path))
    tokenizer = Tokenizer.load(make_folder(tmp_path, pad_token="<nosuch>"))
    assert "pad_token '<nosuch>' is not in tokenizer.json" in caplog.text
    assert tokenizer.vocab_size == plain.vocab_size and tokenizer.pad_id == plain.end_id
    assert tokenizer.encode("<nosuch>") == plain.encode("<nosuch>")


def test_no_chat_template(tmp_path: pathlib.Path):
    assert "no chat_template" in refused(make_folder(tmp_path, None))


def test_template_that_refuses_a_role(tmp_path: pathlib.Path):
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + BOS_TEMPLATE
    )
    tokenizer = Tokenizer.load(make_folder(tmp_path, template))
    with pytest.raises(UserError, match="no system turn"):
        tokenizer.render([{"role": "system", "content": "Be brief."}, *USER])


def test_neither_torch_nor_tensorflow_is_imported():
    code = (
        "import sys; from popi_jax.model.tokenizer import Tokenizer; Tokenizer.load(sys.argv[1]);"
        "print({'torch', 'tensorflow'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(FIXTURES / "qwen3")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
    assert "PyTorch was not found" not in result.stderr
