"""The models see what a chat template writes: prompts, responses and their end, in the styles of well-known models.

Expected texts are written by hand. `whole` is transformers' own rendering of the same conversation.
"""

import dataclasses
import datetime
import json
import logging
import pathlib

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from popi_jax import config
from popi_jax.configs import users
from popi_jax.data import encoding, schema
from popi_jax.errors import UserError
from popi_jax.model.tokenizer import Tokenizer
from popi_jax.rollout import preview

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = {"<|im_start|>": True, "<|im_end|>": True, "<eos>": True}
USER = {"role": "user", "content": "Hi"}


def save(folder: pathlib.Path, backend: tokenizers.Tokenizer, template: object, **config: object) -> pathlib.Path:
    backend.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": template, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def byte_level(tokens: dict[str, bool], normalizer: normalizers.Normalizer | None = None) -> tokenizers.Tokenizer:
    """A tokenizer of bytes with these added tokens, which are special or not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merge = ("Ġ", "T")  # " T" is a token, as in a real vocabulary.
    vocab = {token: index for index, token in enumerate([*alphabet, "".join(merge)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[merge]))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for token, special in tokens.items():
        backend.add_tokens([AddedToken(token, special=special, normalized=normalizer is not None)])
    return backend


def sentence_piece(scheme: str, tokens: dict[str, bool]) -> tokenizers.Tokenizer:
    """A tokenizer in the manner of Llama 2: a space is ▁, and a text begins with one."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127)), "▁T", "▁H"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=[("▁", "T"), ("▁", "H")], unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    for token, special in tokens.items():
        backend.add_tokens([AddedToken(token, special=special, normalized=False)])
    return backend


def whole(tokenizer: Tokenizer, response: str, **arguments: object) -> str:
    chat = [USER, {"role": "assistant", "content": response}]
    return tokenizer._backend.apply_chat_template(chat, tokenize=False, **arguments)


def names(tokenizer: Tokenizer, ids: object) -> list[str]:
    return [str(tokenizer._backend.convert_ids_to_tokens(token)) for token in ids]


OPEN = "<|im_start|>assistant\n"
ROLES = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}CLOSE{% endfor %}"
# Style: template, added tokens, the end of a prompt, the response "Tea." as it is scored.
STYLES = {
    "Qwen 3": (
        CHATML.replace("{{ m['content'] }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'].split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m['content'] }}")
        .replace("assistant\n{% endif %}", "assistant\n{% if enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n\n{% endif %}{% endif %}"),
        CHATML_TOKENS | {"<think>": False, "</think>": False},
        "Hi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "Tea.<|im_end|>",
    ),
    "Qwen 3 2507 thinking": (  # The generation prompt opens the block, the conversation closes it.
        CHATML.replace("{{ m['content'] }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}").replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
        CHATML_TOKENS | {"<think>": False, "</think>": False},
        "Hi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "Tea.<|im_end|>",
    ),
    "an empty block in prompts only": (
        CHATML.replace("assistant\n{% endif %}", "assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"),
        CHATML_TOKENS | {"<think>": False, "</think>": False},
        "Hi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "Tea.<|im_end|>",
    ),
    "Gemma 4": (
        "<bos>{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<turn|>"
        "\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n"
        "{% if not enable_thinking | default(false) %}<|channel>thought\n<channel|>{% endif %}{% endif %}",
        dict.fromkeys(("<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<eos>"), True),
        "Hi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>", "Tea.<turn|>",
    ),
    "Command R7B": (
        "<bos>{% for m in messages %}{{ '<|USER|>' + m.content if m.role == 'user' else '<|CHATBOT|><|START_RESPONSE|>'"
        " + m.content + '<|END_RESPONSE|>' }}<|END|>{% endfor %}{% if add_generation_prompt %}<|CHATBOT|>"
        "<|START_THINKING|><|END_THINKING|>{% endif %}",
        dict.fromkeys(("<bos>", "<|USER|>", "<|CHATBOT|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|END|>",
        "<|START_THINKING|>", "<|END_THINKING|>"), True),
        "Hi<|END|><|CHATBOT|><|START_THINKING|><|END_THINKING|><|START_RESPONSE|>", "Tea.<|END_RESPONSE|>",
    ),
    "DeepSeek V3.1": (
        "<b>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|></think>"
        "{{ m.content }}<e>{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>"
        "{{ '<think>' if thinking is not defined or thinking else '</think>' }}{% endif %}",
        {"<b>": True, "<e>": True, "<|User|>": True, "<|Assistant|>": True, "<think>": False, "</think>": False},
        "Hi<|Assistant|></think>", "Tea.<e>",
    ),
    "GLM 4": (  # The next user's turn ends a response; generation_config.json says so.
        "[gMASK]<sop>" + ROLES.replace("CLOSE", "") + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        {"[gMASK]": True, "<sop>": True, "<|user|>": True, "<|assistant|>": True, "<eos>": True},
        "Hi<|assistant|>\n", "Tea.<|user|>",
    ),
    "gpt-oss": (
        "{% for m in messages %}<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>"
        "{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        {"<|start|>": True, "<|channel|>": True, "<|message|>": True, "<|end|>": True, "<|return|>": True},
        "Hi<|end|><|start|>assistant<|channel|>final<|message|>", "Tea.<|end|>",
    ),
    "Llama 3": (
        "{% for m in messages %}{% set c = '<|sh|>' + m.role + '<|eh|>\n\n' + m.content | trim + '<|eot|>' %}"
        "{{ '<|bot|>' + c if loop.first else c }}{% endfor %}"
        "{% if add_generation_prompt %}<|sh|>assistant<|eh|>\n\n{% endif %}",
        {"<|bot|>": True, "<|sh|>": True, "<|eh|>": True, "<|eot|>": True},
        "Hi<|eot|><|sh|>assistant<|eh|>\n\n", "Tea.<|eot|>",
    ),
    "Mistral": (
        "<s>{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content "
        "+ '</s>' }}{% endfor %}",
        {"<s>": True, "</s>": True, "[INST]": True, "[/INST]": True}, "Hi [/INST]", " Tea.</s>",
    ),
    "Llama 2": (  # A space before the end token.
        "{% for m in messages %}{{ '<s>[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content "
        "+ ' </s>' }}{% endfor %}",
        {"<s>": True, "</s>": True}, "Hi [/INST]", " Tea. </s>",
    ),
    "Vicuna": (  # The space after the colon belongs to the first word.
        "{% for m in messages %}{{ 'USER: ' + m.content + ' ' if m.role == 'user' else 'ASSISTANT: ' + m.content "
        "+ '</s>' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
        {"<s>": True, "</s>": True}, "Hi ASSISTANT:", " Tea.</s>",
    ),
    "OLMo 2": (  # The begin token is the end token, and roles are plain text.
        "<eot>" + ROLES.replace("CLOSE", "{{ '<eot>' if m.role == 'assistant' }}\n")
        + "{% if add_generation_prompt %}<|assistant|>\n"
        "{% endif %}",
        {"<eot>": True}, "Hi\n<|assistant|>\n", "Tea.<eot>",
    ),
    "a system turn that ends as a response does": (
        "Be kind.</s>\n{% for m in messages %}{{ 'USER: ' + m.content + '\n' if m.role == 'user' else 'BOT: ' "
        "+ m.content + '</s>\n' }}{% endfor %}{% if add_generation_prompt %}BOT:{% endif %}",
        {"</s>": True}, "Hi\nBOT:", " Tea.</s>",
    ),
    "no end after the last turn": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        CHATML_TOKENS, "Hi<|im_end|>\n" + OPEN, "Tea.<|im_end|>",
    ),
    "no end after the last turn, a default system turn": (
        "<|im_start|>system\nBe kind.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        CHATML_TOKENS, "Hi<|im_end|>\n" + OPEN, "Tea.<|im_end|>",
    ),
    "end token that is not special": (
        CHATML, {"<|im_start|>": False, "<|im_end|>": False, "<eos>": True}, "Hi<|im_end|>\n" + OPEN, "Tea.<|im_end|>",
    ),
    "content in parts": (
        CHATML.replace("{{ m['content'] }}", "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"),
        CHATML_TOKENS, "Hi<|im_end|>\n" + OPEN, "Tea.<|im_end|>",
    ),
    "a loop over tools": (
        "{% for t in tools %}{{ t }}{% endfor %}" + CHATML, CHATML_TOKENS, "Hi<|im_end|>\n" + OPEN, "Tea.<|im_end|>",
    ),
    "no generation prompt": (
        CHATML.partition("{% if add")[0], CHATML_TOKENS, "Hi<|im_end|>\n" + OPEN, "Tea.<|im_end|>",
    ),
    "one exchange only": (
        "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML,
        CHATML_TOKENS, "Hi<|im_end|>\n" + OPEN, "Tea.<|im_end|>",
    ),
}  # fmt: skip

EMPTY_THOUGHTS = ("an empty block in prompts only", "Gemma 4", "Command R7B")


def load_style(folder: pathlib.Path, name: str, make=byte_level) -> Tokenizer:
    template, tokens, _, _ = STYLES[name]
    eos = next(reversed(tokens)) if "<eos>" not in tokens else "<eos>"
    save(folder, make(tokens), template, eos_token=eos)
    if name == "GLM 4":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [259, 261]}))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("name", STYLES)
def test_prompt_response_and_end_are_as_the_template_writes_them(name: str, tmp_path: pathlib.Path, caplog):
    tokenizer = load_style(tmp_path, name)
    _, _, header, scored = STYLES[name]
    prompt = tokenizer.show(tokenizer.render([USER]))
    assert prompt.endswith(header) and prompt.count("Hi") == 1
    response = [*tokenizer.encode("Tea."), tokenizer.end_id]
    assert tokenizer.show(response) == scored
    assert tokenizer.end_id in tokenizer.stop_ids
    assert tokenizer.decode(response).strip() == "Tea."
    others = ("GLM 4", "gpt-oss", "content in parts", "a loop over tools", *EMPTY_THOUGHTS)
    if name not in others and "last turn" not in name:
        assert whole(tokenizer, "Tea.", enable_thinking=False, thinking=False).startswith(prompt + scored)
    assert not caplog.records


@pytest.mark.parametrize("name", ["Mistral", "Llama 2", "Vicuna", "Llama 3", "Qwen 3", "DeepSeek V3.1"])
@pytest.mark.parametrize("scheme", ["normalizer", "first", "always"])
def test_a_response_has_the_tokens_that_it_has_after_the_prompt(name: str, scheme: str, tmp_path: pathlib.Path):
    tokenizer = load_style(tmp_path, name, lambda tokens: sentence_piece(scheme, tokens))
    ours = [*tokenizer.render([USER]), *tokenizer.encode("Tea. Hot"), tokenizer.end_id]
    text = whole(tokenizer, "Tea. Hot", enable_thinking=False, thinking=False)
    theirs = tokenizer._backend.encode(text, add_special_tokens=False)
    assert names(tokenizer, ours) == names(tokenizer, theirs[: len(ours)])
    assert tokenizer.decode(tokenizer.encode("Tea. Hot")).strip() == "Tea. Hot"
    # A control token in the response changes nothing before it, and is read as characters.
    token = next(iter(STYLES[name][1]))
    marked = tokenizer.encode(f"Tea. Hot{token}")
    assert marked[:6] == tokenizer.encode("Tea. Hot")[:6]
    assert not {tokenizer._backend.convert_tokens_to_ids(token)} & set(marked)
    assert tokenizer.decode(marked).strip() == f"Tea. Hot{token}"


def test_text_inside_an_answer_has_no_sentence_start(tmp_path: pathlib.Path):
    tokenizer = load_style(tmp_path, "Llama 3", lambda tokens: sentence_piece("first", tokens))
    assert names(tokenizer, tokenizer.encode_part(".")) == ["."]
    start = tokenizer.encode_start("They like")
    assert names(tokenizer, start)[:2] == ["T", "h"]
    assert tokenizer.encode_start("") == []
    spaced = load_style(tmp_path, "Mistral")
    assert names(spaced, spaced.encode_start("T")) == ["ĠT"] and spaced.encode_start("") == []
    assert "They like" + tokenizer.decode(tokenizer.encode_part(" Tea")) == "They like Tea"


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "a <think>b</think>", " <tool_call>\n", "x<|im_start|>user\n", "<|im_<|im_end|>end|>", "<eos>"],
)
def test_added_tokens_in_a_text_are_characters(text: str, special: bool, tmp_path: pathlib.Path):
    tokens = dict.fromkeys([*CHATML_TOKENS, "<think>", "</think>", "<tool_call>"], special)
    tokenizer = Tokenizer.load(save(tmp_path, byte_level(tokens), CHATML))
    content = [{"role": "user", "content": text}]
    assert [n for n in names(tokenizer, tokenizer.render(content)) if n in tokens] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
    for ids in (tokenizer.encode(text), tokenizer.encode_part(text), tokenizer.encode_start(text)):
        assert not set(tokens) & set(names(tokenizer, ids))
        assert tokenizer.decode(ids) == text


def test_the_characters_of_an_added_token_are_merged_like_any_others(tmp_path: pathlib.Path):
    tokenizer = Tokenizer.load(save(tmp_path, byte_level(CHATML_TOKENS | {"< T>": False}), CHATML))
    assert names(tokenizer, tokenizer.encode("< T>")) == ["<", "ĠT", ">"]


def test_a_normalizer_cannot_make_a_control_token(tmp_path: pathlib.Path):
    tokenizer = Tokenizer.load(save(tmp_path, byte_level(CHATML_TOKENS, normalizers.NFKC()), CHATML))
    content = [{"role": "user", "content": "a＜|im_end|＞b"}]
    assert names(tokenizer, tokenizer.render(content)).count("<|im_end|>") == 1
    assert tokenizer.end_id not in tokenizer.encode("a＜|im_end|＞b")


def test_text_and_template_together_make_no_control_token(tmp_path: pathlib.Path):
    template = CHATML.replace("{{ m['content'] }}", "<{{ m['content'] }}>")
    tokenizer = Tokenizer.load(save(tmp_path, byte_level(CHATML_TOKENS), template))
    ids = tokenizer.render([{"role": "user", "content": "|im_end|"}])
    assert names(tokenizer, ids).count("<|im_end|>") == 1
    assert tokenizer.show(ids).startswith("<|im_start|>user\n<|im_end|><|im_end|>")


def test_a_vocabulary_that_knows_control_tokens_as_words(tmp_path: pathlib.Path):
    pieces = [("<unk>", 0.0), ("<|im_start|>", -1.0), ("<|im_end|>", -1.0), ("<eos>", -1.0)]
    pieces += [(c, -9.0) for c in map(chr, range(32, 127))] + [("\n", -9.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens(["<unk>", *CHATML_TOKENS])
    backend.decoder = decoders.Fuse()
    tokenizer = Tokenizer.load(save(tmp_path, backend, CHATML, unk_token="<unk>"))
    ids = tokenizer.render([{"role": "user", "content": "a<|im_end|>b é"}])
    assert names(tokenizer, ids).count("<|im_end|>") == names(tokenizer, ids).count("<unk>") == 1
    assert tokenizer.show(ids).startswith("<|im_start|>user\na<|im_end|>b <unk><|im_end|>\n")


def test_the_unknown_token_in_a_text_is_characters(tmp_path: pathlib.Path):
    tokens = STYLES["Mistral"][1] | {"<unk>": True}
    tokenizer = Tokenizer.load(save(tmp_path, sentence_piece("first", tokens), STYLES["Mistral"][0], eos_token="</s>"))
    for ids in (tokenizer.encode("a<unk>"), tokenizer.render([{"role": "user", "content": "a<unk>"}])):
        assert "<unk>" not in names(tokenizer, ids)


def test_characters_without_a_token_are_warned_of(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
    backend = byte_level(CHATML_TOKENS)
    state = json.loads(backend.to_str())
    state["model"]["vocab"]["unused"] = state["model"]["vocab"].pop("#")
    Tokenizer.load(save(tmp_path, tokenizers.Tokenizer.from_str(json.dumps(state)), CHATML))
    assert "has no token for # and" in caplog.records[0].getMessage()


def test_a_tokenizer_that_changes_texts_is_warned_of(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
    Tokenizer.load(save(tmp_path, byte_level(CHATML_TOKENS, normalizers.Lowercase()), CHATML))
    (record,) = caplog.records
    assert "/tokenizer.json: changes texts; it reads 'Tea is" in record.getMessage() and "zoe" in record.getMessage()


def test_two_tokens_with_one_id(tmp_path: pathlib.Path):
    state = json.loads(byte_level(CHATML_TOKENS).to_str())
    state["model"]["vocab"]["Ġ"] = state["model"]["vocab"]["e"]
    save(tmp_path, byte_level(CHATML_TOKENS), CHATML)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"/tokenizer\.json: two tokens have the same id"):
        Tokenizer.load(tmp_path)


def test_a_run_shows_its_first_examples_with_the_scored_part_marked(tmp_path: pathlib.Path):
    c = users.get_config("runlocal")
    c.method, c.limits.signals = "zero_shot_summary", 8192
    settings = config.parse(c)
    encoder = encoding.Encoder(load_style(tmp_path, "Llama 2"), settings.prompts, settings.limits)
    signal = schema.Signal("comment", prompt="Tea?", text="Brief\x1b[31m, please. " + "x" * 5000)
    example = schema.Example("Ann", "train", (signal,), (schema.Query("Why?", "Tea.", "No.", ""),))
    shown = preview.of_examples(settings, encoder, [example] * 3)
    assert shown.count("user 'Ann'") == 4  # Two examples, each as both models read it.
    assert ">>>(the summary)</s><<<" in shown and "[/INST]>>> Tea. </s><<<" in shown
    assert "characters ...]" in shown and "\x1b" not in shown and "\\x1b[31m" in shown
    c.method = "oracle"
    told = preview.of_examples(config.parse(c), encoder, [dataclasses.replace(example, persona="Old")])
    assert "Old" in told and "(the summary)" not in told


def test_white_space_tokens_stay_tokens(tmp_path: pathlib.Path):
    tokenizer = Tokenizer.load(save(tmp_path, byte_level(CHATML_TOKENS | {"\n\n": False}), CHATML))
    assert names(tokenizer, tokenizer.encode("a\n\nb")) == ["a", "\n\n", "b"]
    assert names(tokenizer, tokenizer.render([{"role": "user", "content": "a\n\n<eos>"}])).count("\n\n") == 1


def test_a_response_is_trimmed_where_the_template_trims(tmp_path: pathlib.Path):
    template = CHATML.replace("m['content']", "m['content'] | trim")
    tokenizer = Tokenizer.load(save(tmp_path, byte_level(CHATML_TOKENS), template))
    assert tokenizer.decode(tokenizer.encode(" Tea.\n")) == "Tea."
    assert tokenizer.render([{"role": "user", "content": " Hi\n"}]) == tokenizer.render([USER])
    plain = Tokenizer.load(save(tmp_path, byte_level(CHATML_TOKENS), CHATML))
    assert plain.decode(plain.encode(" Tea.\n")) == " Tea.\n"


def test_a_response_that_the_template_rewrites_is_refused(tmp_path: pathlib.Path):
    tokenizer = load_style(tmp_path, "Qwen 3")
    with pytest.raises(
        UserError, match=r"rewrites a response: '<think>\\nHm.\\n</think>Tea.' becomes .*\\nTea.<"
    ) as caught:
        tokenizer.encode("<think>\nHm.\n</think>Tea.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("written", ["strftime_now('%d %b %Y')", "date_string", "strftime_now('%H:%M:%S')"])
def test_the_date_is_fixed(written: str, tmp_path: pathlib.Path):
    tokenizer = Tokenizer.load(save(tmp_path, byte_level(CHATML_TOKENS), "{{ " + written + " }} " + CHATML))
    shown = tokenizer.show(tokenizer.render([USER]))
    assert shown.startswith("00:00:00 " if "%H" in written else "26 Jul 2024 ")


def test_the_fingerprint_has_the_date(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    folder = save(tmp_path, byte_level(CHATML_TOKENS), CHATML)
    before = Tokenizer.load(folder).fingerprint
    monkeypatch.setattr("popi_jax.model.chat_template.DATE", datetime.date(2025, 1, 1))
    assert Tokenizer.load(folder).fingerprint != before


REFUSED = {
    "drops": (CHATML.replace("{{ m['content'] }}", "{{ m['role'] }}"), "loses, changes or repeats"),
    "cuts": (CHATML.replace("m['content']", "m['content'][:2000]"), "loses, changes or repeats"),
    "repeats": (CHATML.replace("{{ m['content'] }}", "{{ m['content'] }} {{ m['content'] }}"), "or repeats"),
    "escapes": (CHATML.replace("m['content']", "m['content'] | e"), "loses, changes or repeats"),
    "quotes": (CHATML.replace("m['content']", "m['content'] | tojson"), "loses, changes or repeats"),
    "changes case": (CHATML.replace("m['content']", "m['content'] | lower"), "loses, changes or repeats"),
    "joins lines": (CHATML.replace("m['content']", "m['content'].split() | join(' ')"), "loses, changes or repeats"),
    "drops the response": (
        CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m.role == 'user' }}"),
        "loses, changes or repeats the text",
    ),
    "leaves a think block open": (
        CHATML.replace("{{ m['role'] }}\n", "{{ m['role'] }}\n{{ '<think>\n' if m.role == 'assistant' }}").replace(
            "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
        ),
        "opens a think block",
    ),
    "always thinks": (
        CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
        "ends a prompt with",
    ),
    "raises": ("{{ raise_exception('never') }}", "refuses the messages: never"),
    "raises a ZeroDivisionError": ("{{ 1 // 0 }}", "refuses the messages: integer division or modulo by zero"),
    "raises a TypeError": ("{{ 'a' + 1 }}", "refuses the messages: can only concatenate"),
    "recurses": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the messages: maximum recursion"),
    "is unsafe": ("{{ ''.__class__.__mro__ }}", "refuses the messages: access to attribute"),
    "is not Jinja": ("{% for %}", "is not valid Jinja"),
    "has no default": ([{"name": "chat", "template": CHATML}, {"name": "rag", "template": CHATML}], "'chat', 'rag'"),
    "is a number": (5, "must be a string, found int"),
    "is a list of nulls": ([None], "not a readable tokenizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_is_refused_in_one_line(name: str, tmp_path: pathlib.Path):
    template, message = REFUSED[name]
    save(tmp_path, byte_level(CHATML_TOKENS | {"<think>": False}), template)
    with pytest.raises(UserError) as caught:
        Tokenizer.load(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_end_that_is_no_token_is_warned_of(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
    tokenizer = Tokenizer.load(save(tmp_path, byte_level({"<eos>": True}), CHATML))
    assert names(tokenizer, [tokenizer.end_id]) == ["<eos>"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "<|im_end|>" in record.getMessage()


def test_the_start_of_a_turn_is_no_end_of_a_response(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
    template, tokens, _, _ = STYLES["GLM 4"]
    tokenizer = Tokenizer.load(save(tmp_path, byte_level(tokens), template))
    assert names(tokenizer, [tokenizer.end_id]) == ["<eos>"]
    assert len(caplog.records) == 1


def test_a_generation_prompt_with_more_white_space_is_warned_of(tmp_path: pathlib.Path, caplog):
    tokenizer = Tokenizer.load(save(tmp_path, byte_level(CHATML_TOKENS), CHATML + "\n\n\n"))
    assert tokenizer.show(tokenizer.render([USER])).endswith(OPEN)
    assert "before a response" in caplog.records[0].getMessage()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["[]", "null", "5", '"a"', "{", "", '{"a": ' * 9999, "\udcff", "9" * 5000])
def test_a_damaged_file_is_named(name: str, content: str, tmp_path: pathlib.Path):
    save(tmp_path, byte_level(CHATML_TOKENS), CHATML)
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=name) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("eos", ["2", True, -1, 10**6, [None], [[2]], 2.0, {"a": 1}])
def test_end_ids_of_a_wrong_kind_are_refused(eos: object, tmp_path: pathlib.Path):
    save(tmp_path, byte_level(CHATML_TOKENS), CHATML)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(UserError, match="generation_config.json: eos_token_id .* is not a token id"):
        Tokenizer.load(tmp_path)


def test_a_template_file_that_is_not_utf8_is_named(tmp_path: pathlib.Path):
    save(tmp_path, byte_level(CHATML_TOKENS), CHATML)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe" + CHATML.encode())
    with pytest.raises(UserError, match="chat_template.jinja"):
        Tokenizer.load(tmp_path)


def test_ids_beyond_the_number_of_tokens_count(tmp_path: pathlib.Path):
    save(tmp_path, byte_level(CHATML_TOKENS), CHATML)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["vocab"]["<|im_start|>"] = 1100
    state["added_tokens"][0]["id"] = 1100
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = Tokenizer.load(tmp_path)
    assert max(tokenizer.render([USER])) == 1100
    assert tokenizer.vocab_size == 1101


def test_truncation_padding_and_dropout_of_the_file_are_off(tmp_path: pathlib.Path):
    backend = byte_level(CHATML_TOKENS)
    text = "A text of more than eight tokens. Tea Tea Tea Tea Tea Tea Tea Tea Tea Tea Tea Tea Tea"
    expected = Tokenizer.load(save(tmp_path, backend, CHATML)).encode(text)
    backend.enable_truncation(8)
    backend.enable_padding(length=16)
    backend.model.dropout = 0.9
    tokenizer = Tokenizer.load(save(tmp_path, backend, CHATML, model_max_length=8))
    assert tokenizer.encode(text) == expected
    assert tokenizer.show(tokenizer.render([{"role": "user", "content": text}])).count(text) == 1
