"""Layouts: the text around signals, summaries and prompts, as data.

A layout is a JSON file. Its texts have placeholders in braces, such as {prompt}; other braces stand for themselves, and
what fills a placeholder is never searched for placeholders again. `plain` is ours. The published layouts have the
sections, headings and white space of the public code for the benchmarks (POPI section 5a). Their instructions are
worded anew, those of the config included. Another layout is used by giving the path of its file.
"""

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import pydantic
import pydantic_core
from pydantic import Field

from popi_jax.config import Section, local_path
from popi_jax.data import checks
from popi_jax.data.schema import Signal, SignalKind
from popi_jax.errors import UserError, shown

Messages = list[dict[str, str]]

PAIR_FIELDS = ("prompt", "chosen", "rejected")

_FOLDER = pathlib.Path(__file__).parents[1] / "assets/layouts"
NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))
_KNOWN = ("number", "fields", "prompt", "chosen", "rejected", "text", "signals", "context", "instruction")
_PLACEHOLDER = re.compile(rf"\{{({'|'.join(_KNOWN)})\}}")


_REQUESTS = ("inference", "summary", "raw_signals", "direct")


def _filled(template: str, /, **values: str) -> str:
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), template)


@dataclasses.dataclass(frozen=True)
class Told:
    """What the generator is told of a user: a summary or persona, or the user's signals themselves."""

    text: str
    raw_signals: bool = False


class SignalSection(Section):
    """Signals of some kinds, under a heading, numbered from 1. `empty` stands where there are none."""

    kinds: Annotated[tuple[SignalKind, ...], Field(min_length=1)]
    heading: str
    empty: str


class Turns(Section):
    """A request: a system turn, unless it is "", and a user turn."""

    system: str
    user: str

    def messages(self, **values: str) -> Messages:
        """Returns the chat messages, with the placeholders of the user turn filled."""
        turns = [{"role": "user", "content": _filled(self.user, **values)}]
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns


class Layout(Section):
    """How signals and queries are laid out; see the module.

    Attributes:
        sections: where each kind of signal stands.
        pair: a preference pair: {number} and {fields}.
        pair_fields: the fields of a pair in their order, joined by a line end unless they end with one.
        comment: {number}, {prompt}, {text}.
        profile: {number}, {text}.
        separator: between two signals of a section.
        inference: the request for a summary: {signals}, {instruction}.
        summary: the request for a response, given a summary or a persona: {context}, {instruction}, {prompt}.
        raw_signals: the same, given the signals themselves.
        direct: the request for a response to {prompt} alone, which the reference reads, too.
    """

    sections: tuple[SignalSection, ...]
    pair: str
    pair_fields: dict[Literal["prompt", "chosen", "rejected"], str]
    comment: str
    profile: str
    separator: str
    inference: Turns
    summary: Turns
    raw_signals: Turns
    direct: Turns

    @pydantic.model_validator(mode="after")
    def _has_its_placeholders(self) -> Self:
        texts = {
            "pair": (self.pair, "fields"),
            "comment": (self.comment, "prompt text"),
            "profile": (self.profile, "text"),
            "inference.user": (self.inference.user, "signals instruction"),
            "summary.user": (self.summary.user, "context instruction prompt"),
            "raw_signals.user": (self.raw_signals.user, "context instruction prompt"),
            "direct.user": (self.direct.user, "prompt"),
            **{f"pair_fields.{name}": (text, name) for name, text in self.pair_fields.items()},
            "separator": (self.separator, ""),
            **{f"{name}.system": (getattr(self, name).system, "") for name in _REQUESTS},
            **{f"sections.{i}.heading": (section.heading, "") for i, section in enumerate(self.sections)},
            **{f"sections.{i}.empty": (section.empty, "") for i, section in enumerate(self.sections)},
        }
        for key, (text, names) in texts.items():
            items = key in ("pair", "comment", "profile") or key.startswith("pair_fields.")
            found = [name for name in _PLACEHOLDER.findall(text) if name != "number" or not items]
            if sorted(found) != sorted(names.split()):
                wanted = " and ".join(f"{{{name}}}" for name in names.split()) or "no placeholder"
                raise ValueError(f"{key} must have {wanted}, each once, and no other placeholder")
        kinds = [kind for section in self.sections for kind in section.kinds]
        if sorted(kinds) != ["comment", "pair", "profile"] or set(self.pair_fields) != {"prompt", "chosen", "rejected"}:
            raise ValueError("sections must have each of pair, comment and profile once, and pair_fields all three")
        return self

    def signals_text(self, signals: Sequence[Signal], pair_fields: Sequence[str] = PAIR_FIELDS) -> str:
        """Lays signals out in order. q_phi reads this text, and method raw_signals tells it to the generator.

        Args:
            signals: of one user.
            pair_fields: which of a pair's prompt, chosen and rejected are shown; `chosen` alone has no label.
        """
        return "".join(self._section(section, signals, pair_fields) for section in self.sections)

    def inference_messages(
        self, signals: Sequence[Signal], instruction: str, pair_fields: Sequence[str] = PAIR_FIELDS
    ) -> Messages:
        """The request to q_phi for a summary z of the signals s (POPI section 1)."""
        return self.inference.messages(signals=self.signals_text(signals, pair_fields), instruction=instruction)

    def generator_messages(self, prompt: str, told: Told | None, instruction: str) -> Messages:
        """The request to pi_theta for a response to `prompt`.

        Args:
            prompt: the query's x.
            told: what is said of the user. None gives `direct`, without `instruction`, which the reference pi_ref (POPI
                section 2) and methods base and population read.
            instruction: how to use what is told.
        """
        if told is None:
            return self.direct.messages(prompt=prompt)
        turns, context = (self.raw_signals, told.text) if told.raw_signals else (self.summary, told.text.strip())
        return turns.messages(context=context, instruction=instruction, prompt=prompt)

    def _section(self, section: SignalSection, signals: Sequence[Signal], pair_fields: Sequence[str]) -> str:
        own = [signal for signal in signals if signal.kind in section.kinds]
        items = [self._item(signal, str(number), pair_fields) for number, signal in enumerate(own, start=1)]
        return section.heading + (self.separator.join(items) or section.empty)

    def _item(self, signal: Signal, number: str, pair_fields: Sequence[str]) -> str:
        if signal.kind != "pair":
            template = self.comment if signal.kind == "comment" else self.profile
            return _filled(template, number=number, prompt=signal.prompt, text=signal.text)
        if tuple(pair_fields) == ("chosen",):
            fields = [signal.chosen]
        else:
            values = {"prompt": signal.prompt, "chosen": signal.chosen, "rejected": signal.rejected}
            fields = [
                _filled(text, number=number, **{name: values[name]})
                for name, text in self.pair_fields.items()
                if name in pair_fields
            ]
        return _filled(self.pair, number=number, fields=_joined(fields))


def _joined(fields: list[str]) -> str:
    """Joins the fields of a pair: each begins a line."""
    text = ""
    for field in fields:
        text += field if not text or text.endswith("\n") else f"\n{field}"
    return text


@functools.cache
def load(name: str) -> Layout:
    """Returns the layout of this name (one of NAMES) or file (a path that ends in .json).

    Raises:
        UserError: an unknown name, or a file that is no layout; the message names the file and the key.
    """
    path = _FOLDER / f"{name}.json" if name in NAMES else local_path(name, "config.prompts.layout")
    if name not in NAMES and path.suffix != ".json":
        raise UserError(
            f"config.prompts.layout is {shown(name)}; use {', '.join(NAMES)}, or the path of a .json file with a layout"
        )
    remedy = f"see {_FOLDER.name}/plain.json in the package for an example"
    value = checks.as_object(checks.parse_json(checks.read_text(path, remedy), str(path), remedy=remedy), str(path))
    if path.name == "popi.json":  # Of an export, which has other things beside its layout.
        value = checks.as_object(value.get("layout"), f"{path}: layout")
    try:
        layout = Layout.model_validate(_tuples(value))
        layout.model_dump_json()
        return layout
    except pydantic_core.PydanticSerializationError:
        raise UserError(f"{path}: a text has half a surrogate pair (\\ud800-\\udfff); remove it") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the layout"
        reason = str(first.get("ctx", {}).get("error") or first["msg"])
        raise UserError(f"{path}: {key}: {reason}; {remedy}") from None


def fingerprint(name: str) -> str:
    """Identifies the layout's content."""
    return hashlib.sha256(load(name).model_dump_json().encode()).hexdigest()[:16]


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


PLAIN = load("plain")
