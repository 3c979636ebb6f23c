"""Text to token ids and back, with the checkpoint's own chat template; transformers' fast tokenizer, never torch.

A prompt is tokenised as the template writes it. A response is tokenised as the template writes it after the prompt.
Text of users and models never becomes a control token: every added token in it, special or not, is read as characters.
Tokens of only white space, such as Gemma's for two line ends, are not control tokens.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import string
from collections.abc import Sequence
from typing import Any

# Without torch, transformers warns every process that no models are available; its models are not used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from popi_jax.errors import UserError, first_line  # noqa: E402
from popi_jax.model import chat_template  # noqa: E402
from popi_jax.model.chat_template import ChatTemplate, Turn  # noqa: E402

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_REMEMBERED = 1 << 15  # Number of texts whose ids are cached, in each of the caches.
_SAMPLE = "Tea"
_TEXT = 'Tea is  good, no?\n"Yes," said Zoe.'
_LETTERS = string.ascii_letters + string.digits + string.punctuation + "é你🙂"


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Attributes:
        vocab_size: all ids are below this.
        pad_id: fills rows; never read, since lengths and masks mark the end of a row.
        end_id: ends every response in training: the token that the chat template puts after an assistant's answer.
        stop_ids: ids that end decoding: end_id and the end-of-sequence ids of tokenizer and generation_config.json.
        date: the date that the chat template sees, on any day.
        template: the chat template.
        fixed_template: the chat template with its date and thinking mode fixed in its text; see ChatTemplate.fixed.
        fingerprint: sha256 of the tokenizer's files and of the fixed arguments of its template, among them the date.
    """

    date = chat_template.DATE

    def __init__(self, backend: PreTrainedTokenizerFast, folder: pathlib.Path):
        """Use load()."""
        self._backend = backend
        self._folder = folder
        # The same users, prompts and responses recur at every step, and rendering a template is slow.
        self._render_once = functools.lru_cache(_REMEMBERED)(self._render_ids)
        self._encode_once = functools.lru_cache(_REMEMBERED)(self._encode_ids)
        self._piece_once = functools.lru_cache(self._piece_ids)
        self._spelled_once = functools.lru_cache(_REMEMBERED)(self._spelled)
        self._added = {index: str(t) for index, t in backend.added_tokens_decoder.items() if not str(t).isspace()}
        ids = backend.get_vocab().values()
        if len(set(ids)) < len(ids):
            raise UserError(f"{folder}/tokenizer.json: two tokens have the same id; restore the file")
        self.vocab_size = max(ids) + 1
        self._full, self._plain, self._unknown = _encoders(backend.backend_tokenizer, self._added)
        self._chat = ChatTemplate(_default_template(backend, folder), backend.special_tokens_map, str(folder))
        self.template, self.fixed_template = self._chat.source, self._chat.fixed()
        self._header_ids = self._ids(self._full, self._chat.header)
        # SentencePiece begins a text with a space that it does not write in the middle of one.
        self._anchor, self._anchor_ids = "", []
        if self._in_context(self._chat.lead + _SAMPLE) != tuple(self._after(self._plain, self._chat.lead + _SAMPLE)):
            self._anchor, self._anchor_ids = "\n", self._ids(self._plain, "\n")
        if lost := [letter for letter in _LETTERS if not self.encode_part(letter)]:
            logging.warning("%s/tokenizer.json: has no token for %s and leaves them out", folder, " ".join(lost))
        declared = self._declared_stops()
        self.end_id, self._closing = self._find_end(declared)
        self.stop_ids = tuple(sorted({self.end_id, *declared}))
        self.pad_id = self.end_id if backend.pad_token_id is None else backend.pad_token_id
        self.fingerprint = _fingerprint(folder)
        if not lost and (read := self.decode(self.encode_part(_TEXT))) != _TEXT:
            logging.warning("%s/tokenizer.json: changes texts; it reads %r as %r", folder, _TEXT, read)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Loads tokenizer.json and the chat template from a hub folder, offline.

        Raises:
            UserError: a file is missing or broken, the folder has no chat template, or the template is unsuitable.
        """
        folder = pathlib.Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}/tokenizer.json: no such file; a fast tokenizer is needed (tokenizer.json)")
        for name in FILES:
            if name.endswith(".json"):
                _read_object(folder / name)
        backend = _load_backend(folder)
        new = _new_token(backend, folder)
        if new and new[0] == "pad_token":
            logging.warning(
                "%s: pad_token %r is not in tokenizer.json; padding is never read, so it is left out", folder, new[1]
            )
            backend = _load_backend(folder, pad_token=None)
            new = _new_token(backend, folder)
        if new:
            raise UserError(f"{folder}: {new[0]} {new[1]!r} is not in tokenizer.json; name a token that is there")
        return cls(backend, folder)

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Renders chat messages ({"role", "content"}) up to where the response begins and tokenises the result once.

        Content that looks like an added token is encoded as characters, so that no user can end their own turn. A
        begin-of-sequence token appears only where the template writes it, so it is never doubled.

        Raises:
            UserError: the template rejects the messages (e.g. an unknown role).
        """
        turns = tuple((message["role"], message["content"]) for message in messages)
        return list(self._render_once(turns))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a response as the template writes it after the prompt, up to the end token.

        Added tokens in it are encoded as characters.

        Raises:
            UserError: the template would rewrite the response, e.g. because it has a think block.
        """
        return list(self._encode_once(text))

    def encode_start(self, text: str) -> list[int]:
        """Returns the ids of text that begins a response, for the model to continue."""
        return list(self._in_context(self._chat.lead + text)) if text else []

    def encode_part(self, text: str) -> list[int]:
        """Returns the ids of text in the middle of a turn."""
        return self._after(self._plain, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens and without the tokens that end a response."""
        kept = [int(token) for token in ids if int(token) not in self.stop_ids]
        text = self._backend.decode(
            [*self._anchor_ids, *kept], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).removeprefix(self._anchor)

    def show(self, ids: Sequence[int]) -> str:
        """Returns the text of ids with all special tokens, for a reader."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _render_ids(self, turns: tuple[Turn, ...]) -> tuple[int, ...]:
        pieces, contents = self._chat.pieces(turns)
        text = pieces[0] + "".join(content + piece for content, piece in zip(contents, pieces[1:], strict=True))
        ids = self._ids(self._full, text)
        rest = [self._piece_once(piece) for piece in pieces[1:]]
        if self._controls(ids) == self._controls([*self._piece_once(pieces[0]), *itertools.chain(*rest)]):
            return tuple(ids)
        # A content would become a control token, alone or with the template's text around it.
        spaces = len(pieces[0]) - len(pieces[0].rstrip(" "))
        ids = self._ids(self._full, pieces[0].rstrip(" "))
        for content, piece_ids in zip(contents, rest, strict=True):
            ids += self._after(self._plain, " " * spaces + content)
            spaces = 0
            ids += piece_ids
        return tuple(ids)

    def _piece_ids(self, piece: str) -> tuple[int, ...]:
        return tuple(self._after(self._full, piece))

    def _encode_ids(self, text: str) -> tuple[int, ...]:
        return self._in_context(self._chat.response(text) + self._closing)

    def _in_context(self, text: str) -> tuple[int, ...]:
        """The ids that follow the header of a response, if this text does."""
        both, start = self._ids(self._full, self._chat.header + text), len(self._header_ids)
        if both[:start] == self._header_ids and not self._controls(both[start:]):
            return tuple(both[start:])
        # The text has a control token, or would be one token with the end of the header, which no sampler can draw.
        return tuple(self._after(self._plain, text))

    def _after(self, encoder: tokenizers.Tokenizer, text: str) -> list[int]:
        """The ids of text that does not begin a sequence."""
        ids = self._ids(encoder, self._anchor + text)
        start = len(self._anchor_ids)
        ids = ids[start:] if ids[:start] == self._anchor_ids else self._ids(encoder, text)
        if encoder is self._full:
            return ids
        # Some models (Unigram) know control tokens as words of their vocabulary; these are spelled out.
        return [part for token in ids for part in self._spelled_once(token)]

    def _spelled(self, token: int) -> tuple[int, ...]:
        if token not in self._added or token == self._unknown:
            return (token,)
        letters = (self._ids(self._plain, self._anchor + letter) for letter in self._added[token])
        return tuple(part for ids in letters for part in ids[len(self._anchor_ids) :])

    def _controls(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self._added]

    def _ids(self, encoder: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            return list(encoder.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # The Rust library raises bare Exception.
            raise UserError(
                f"{self._folder}/tokenizer.json: cannot encode {text[:40]!r} ({first_line(error)})"
            ) from error

    def _find_end(self, declared: Sequence[int]) -> tuple[int, str]:
        """The token that ends a response, and the template's text between a response and that token."""
        for text, between_turns in ((self._chat.next, True), (self._chat.last, False)):
            encoding = self._full.encode(text, add_special_tokens=False)
            found = next((i for i, token in enumerate(encoding.ids) if token in self._added), None)
            if found is None:
                continue
            token, (start, end) = encoding.ids[found], encoding.offsets[found]
            if not between_turns or token in declared or not self._opens(text[start:], end - start):
                return token, text[:start]
        eos = self._backend.eos_token_id
        if eos is None:
            raise UserError(f"{self._folder}: neither the chat template nor eos_token says how a response ends")
        logging.warning(
            "%s: the chat template writes %r after a response, which has no token of its own for its end; responses end"
            " with eos_token %r",
            self._folder,
            self._chat.next or self._chat.last,
            self._backend.eos_token,
        )
        return eos, ""

    def _opens(self, text: str, length: int) -> bool:
        """Whether the token at the start of `text`, `length` characters long, opens a turn instead of closing one."""
        if not self._chat.head.endswith(text):
            return False
        # "<end>\n<turn>user" after a default system turn closes that turn. In "<turn>user", the role follows.
        following = text[length:].lstrip()
        return not any(following.startswith(content) for content in self._added.values())

    def _declared_stops(self) -> tuple[int, ...]:
        """The end-of-sequence ids of the tokenizer and of generation_config.json."""
        path = self._folder / "generation_config.json"
        named = _read_object(path).get("eos_token_id")
        stops = [] if named is None else named if isinstance(named, list) else [named]
        for stop in stops:
            if type(stop) is not int or not 0 <= stop < self.vocab_size:
                raise UserError(
                    f"{path}: eos_token_id {repr(stop)[:40]} is not a token id of this tokenizer, whose ids end at"
                    f" {self.vocab_size - 1}; correct or remove it"
                )
        own = self._backend.eos_token_id
        return tuple(stops if own is None else [*stops, own])


def _encoders(
    full: tokenizers.Tokenizer, added: dict[int, str]
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer, int | None]:
    """The tokenizer that finds added tokens, one that reads them as characters, and the id of unknown characters."""
    # A file saved in the middle of training may cut and pad every text, and draw its tokens at random.
    full.no_truncation()
    full.no_padding()
    full.encode_special_tokens = False
    state = json.loads(full.to_str())
    model = state["model"]
    if model.get("dropout"):
        full.model.dropout = model["dropout"] = None
    for token in state["added_tokens"]:
        token["special"] = token["id"] in added
    plain = tokenizers.Tokenizer.from_str(json.dumps(state))
    plain.encode_special_tokens = True  # Encodes special tokens like any other text.
    if "unk_id" in model:  # Unigram
        return full, plain, model["unk_id"]
    return full, plain, full.token_to_id(model.get("unk_token") or "")


def _load_backend(folder: pathlib.Path, **options: Any) -> PreTrainedTokenizerFast:
    try:
        # Not AutoTokenizer: a model's own class may rebuild the tokenizer and ignore tokenizer.json.
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, **options)
    except BaseException as error:  # The Rust parser raises bare Exception, and a panic is none.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{folder}/{_broken(folder)}: not a readable tokenizer ({first_line(error)})") from error


def _new_token(backend: PreTrainedTokenizerFast, folder: pathlib.Path) -> tuple[str, str] | None:
    """Returns name and text of a special token that tokenizer.json lacks; None if it has all of them.

    transformers gives such a token an id after all others, which no model knows.
    """
    ids, names = backend.get_vocab(), backend.special_tokens_map
    if max(ids, key=ids.__getitem__) not in names.values():
        return None
    stored = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    new = ((name, token) for name, token in names.items() if stored.token_to_id(token) is None)
    return next(new, None)


def _default_template(backend: PreTrainedTokenizerFast, folder: pathlib.Path) -> str:
    template: Any = backend.chat_template
    place = folder / "chat_template.jinja"
    if not place.is_file():
        place = folder / "tokenizer_config.json"
    if not template:
        raise UserError(f"{place}: no chat_template; take an instruct checkpoint or add one")
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(map(repr, sorted(map(str, template))))
            raise UserError(f"{place}: chat_template has the templates {names}; name the one to use 'default'")
        template = template["default"]
    if not isinstance(template, str):
        raise UserError(f"{place}: chat_template must be a string, found {type(template).__name__}")
    return template


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file, {} if the file does not exist."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({first_line(error)}); restore or remove the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}; restore or remove the file")
    return value


def _broken(folder: pathlib.Path) -> str:
    """Names the file, or the files, because of which a tokenizer cannot be loaded."""
    try:
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except BaseException:  # A panic of the Rust parser is not an Exception.
        return "tokenizer.json"
    try:
        (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError):
        return "chat_template.jinja"
    return " or ".join(name for name in FILES[1:4] if (folder / name).exists())


def _fingerprint(folder: pathlib.Path) -> str:
    digest = hashlib.sha256(json.dumps([chat_template.ARGUMENTS, chat_template.DATE.isoformat()]).encode())
    for name in FILES:
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
