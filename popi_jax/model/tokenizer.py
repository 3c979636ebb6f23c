"""Text to token ids and back, with the checkpoint's own chat template; transformers' fast tokenizer, never torch.

The template is used unchanged. Some (SmolLM2, Qwen 2.5) put a default system turn before messages that have none; all
prompts of this package consist of user turns only, so reference and policy both read that turn. Templates that use the
date or a thinking mode get fixed values, so that a prompt has the same tokens every day and after every restart.
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

# Without torch, transformers warns every process that no models are available; its models are not used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jinja2  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from popi_jax.errors import UserError, first_line  # noqa: E402

# date_string: Llama 3.2 writes today's date into the system turn; this is its template's fallback date.
# enable_thinking: a summary of a few dozen tokens leaves Qwen 3 no room to think; if off, the answer starts at once.
_TEMPLATE_ARGUMENTS: dict[str, Any] = {"date_string": "26 Jul 2024", "enable_thinking": False}
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_REMEMBERED = 1 << 15  # Number of texts whose ids are cached, in each of the two caches.
_MARK = "\ue000popi\ue000"  # Placeholder for a message's content, to find the template's text around it.


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Attributes:
        vocab_size: all ids are below this.
        pad_id: fills rows; never read, since lengths and masks mark the end of a row.
        end_id: ends every response in training: the token that the chat template puts after an assistant's answer.
        stop_ids: ids that end decoding: end_id and the end-of-sequence ids of tokenizer and generation_config.json.
        fingerprint: sha256 of the tokenizer's files.
    """

    def __init__(self, backend: PreTrainedTokenizerFast, folder: pathlib.Path):
        """Use load()."""
        self._backend = backend
        self._folder = folder
        # The same users, prompts and responses recur at every step, and rendering a template is slow.
        self._render_once = functools.lru_cache(_REMEMBERED)(self._render_ids)
        self._encode_once = functools.lru_cache(_REMEMBERED)(self._encode_ids)
        self._special = {index: str(t) for index, t in backend.added_tokens_decoder.items() if t.special}
        self.vocab_size = len(backend)
        self.end_id = self._find_end_id()
        self.stop_ids = self._find_stop_ids()
        self.pad_id = self.end_id if backend.pad_token_id is None else backend.pad_token_id
        self.fingerprint = _fingerprint(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Loads tokenizer.json and the chat template from a hub folder, offline.

        Raises:
            UserError: tokenizer.json is missing or broken, or the folder has no chat template.
        """
        folder = pathlib.Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}/tokenizer.json: no such file; a fast tokenizer is needed (tokenizer.json)")
        try:
            # Not AutoTokenizer: a model's own class may rebuild the tokenizer and ignore tokenizer.json.
            backend = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # The Rust parser raises bare Exception.
            raise UserError(f"{folder}/tokenizer.json: not a readable tokenizer ({first_line(error)})") from error
        if not backend.chat_template:
            raise UserError(f"{folder}/tokenizer_config.json: no chat_template; take an instruct checkpoint or add one")
        return cls(backend, folder)

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Renders chat messages ({"role", "content"}) with the generation prompt and tokenises the result once.

        Content that looks like a special token is encoded as characters, so that no user can end their own turn. A
        begin-of-sequence token appears only where the template writes it, so it is never doubled.

        Raises:
            UserError: the template rejects the messages (e.g. an unknown role).
        """
        turns = tuple((message["role"], message["content"]) for message in messages)
        return list(self._render_once(turns))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text: nothing is added, and special tokens in it are encoded as characters."""
        return list(self._encode_once(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens."""
        ids = [int(token) for token in ids]
        return str(self._backend.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _render_ids(self, turns: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
        texts = [content for _, content in turns]
        unsafe = [text for text in texts if any(token in text for token in self._special.values())]
        # Occurs in no content, so that the rendered text can be split where the unsafe contents belong.
        mark = _MARK
        while any(mark in text for text in texts):
            mark += _MARK
        messages = [
            {"role": role, "content": text.replace(text.strip(), mark) if text in unsafe else text}
            for role, text in turns
        ]
        first, *rest = self._render_text(messages, add_generation_prompt=True).split(mark)
        ids = self._backend.encode(first, add_special_tokens=False, split_special_tokens=False)
        for content, text in zip(unsafe, rest, strict=True):
            ids += self._encode_ids(content.strip())
            ids += self._backend.encode(text, add_special_tokens=False, split_special_tokens=False)
        return tuple(ids)

    def _encode_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _render_text(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            text = self._backend.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **_TEMPLATE_ARGUMENTS
            )
        except jinja2.TemplateError as error:
            raise UserError(f"{self._folder}: the chat template refuses the messages: {first_line(error)}") from error
        return str(text)

    def _find_end_id(self) -> int:
        turns = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
        text = self._render_text(turns, add_generation_prompt=False)
        tail = text[text.rindex(_MARK) + len(_MARK) :]
        for token in self._backend.encode(tail, add_special_tokens=False, split_special_tokens=False):
            if token in self._special:
                return token
        if self._backend.eos_token_id is None:
            raise UserError(f"{self._folder}: neither the chat template nor eos_token says how a response ends")
        return self._backend.eos_token_id

    def _find_stop_ids(self) -> tuple[int, ...]:
        stop = {self.end_id}
        if self._backend.eos_token_id is not None:
            stop.add(self._backend.eos_token_id)
        path = self._folder / "generation_config.json"
        if path.is_file():
            try:
                eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except ValueError as error:
                raise UserError(f"{path}: not valid JSON ({error})") from error
            stop.update([eos] if isinstance(eos, int) else eos or [])
        return tuple(sorted(stop))


def _fingerprint(folder: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
