"""A checkpoint's chat template as text: rendered with fixed arguments, and checked before the first use.

The template is used unchanged. Some (SmolLM2, Qwen 2.5) put a default system turn before messages that have none; all
prompts of this package consist of user turns only, so reference and policy both read that turn. Templates that use the
date or a thinking mode get fixed values, so that a prompt has the same tokens every day and after every restart.
"""

import datetime
import functools
import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from transformers.utils.chat_template_utils import _compile_jinja_template

from popi_jax.errors import UserError, first_line

# The date that every template reads. It is the fallback date of Llama 3.2's template.
DATE = datetime.date(2024, 7, 26)
# A summary of a few dozen tokens leaves a model no room to think, so thinking is off: enable_thinking is the name in
# Qwen, GLM and SmolLM3, thinking in DeepSeek and Granite.
ARGUMENTS: dict[str, Any] = {
    "date_string": DATE.strftime("%d %b %Y"),
    "enable_thinking": False,
    "thinking": False,
}
# The directives of strftime, with glibc's for numbers without a zero in front.
_DIRECTIVES = [f"%{letter}" for letter in ("-d", "-m", "e", *"aAbBcdfGHIjmMpSuUVwWxXyY")]
_MARK = "\ue000popi\ue000"  # Placeholder for a message's content, to find the template's text around it.
_QUESTION = "\ue001popi\ue001"
# Text that shows whether a template changes what it is given: white space, markup, quotes, both cases, and length.
_AWKWARD = "Tea  or\n\n\tcoffee & <i>\"two\"</i> 'x' \\n {{ 1 }} [b]Ünï[/b]\r\n" + 4000 * "word " + "END"
_THINK_TAG = re.compile(r"[<\[◁]([^<>\[\]◁▷]*(?:think|thought)[^<>\[\]◁▷]*)[>\]▷]", re.IGNORECASE)
# "<think></think>", "<|START_THINKING|><|END_THINKING|>", Gemma 4's "<|channel>thought\n<channel|>".
_EMPTY_THOUGHT = re.compile(
    r"(?:[<\[◁](?!/|\|?end)[^<>\[\]◁▷]*think[^<>\[\]◁▷]*[>\]▷]|<\|channel>thought)\s*[<\[◁][^<>\[\]◁▷]*[>\]▷]\s*",
    re.IGNORECASE,
)
_CLOSES = re.compile(r"\W*(/|end|no)", re.IGNORECASE)

Turn = tuple[str, str]  # Role and content.


class ChatTemplate:
    """Renders conversations.

    Attributes:
        source: the template.
        head: the text before the first user's content.
        header: the text between a user's content and the response: the generation prompt, and anything else that the
            template writes there, such as an empty think block. Spaces at its end belong to `lead`.
        lead: the spaces between header and response.
        last: the text after a response that ends the conversation.
        next: the text between a response and the next user's content; "" if the template cannot render that.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], where: str):
        """Compiles the template and checks that it keeps all content and continues its own generation prompt.

        Args:
            source: the template.
            special_tokens: the variables bos_token, eos_token and so on.
            where: the template's folder, for messages.

        Raises:
            UserError: the template cannot be used; the message shows what it writes.
        """
        self.source = source
        self._where = where
        self._parts: bool
        self._tools: list[Any] | None
        self._variables = {**special_tokens, **ARGUMENTS, "strftime_now": DATE.strftime, "documents": None}
        try:
            self._template = _compile_jinja_template(source)
        except Exception as error:
            raise UserError(
                f"{where}: the chat template is not valid Jinja ({first_line(error)}); correct it"
            ) from error
        self._edges = functools.lru_cache(self._written_edges)
        # Most templates take a string, and no tools. Some read parts only, or loop over tools without asking for any.
        problems: list[UserError] = []
        for self._parts, self._tools in ((False, None), (True, None), (False, [])):
            try:
                self._learn()
                return
            except UserError as error:
                problems.append(error)
        raise problems[0]

    def fixed(self) -> str:
        """Returns the template with its date and thinking mode fixed in its text, for software that sets neither."""
        read = set(re.findall(r"\w+", self.source))
        values = [f"{name} = {json.dumps(value)}" for name, value in ARGUMENTS.items() if name in read]
        blocks = ["{%- set " + value + " %}" for value in values]
        if "strftime_now" in read:
            filters = "".join(f" | replace({code!r}, {DATE.strftime(code)!r})" for code in _DIRECTIVES)
            blocks.append("{%- macro strftime_now(format) %}{{- format" + filters + " }}{%- endmacro %}")
        # The empty expression keeps Jinja from removing a line end at the start of the template.
        start = "".join([*blocks, '{{- "" }}']) if blocks else ""
        return self.source if self.source.startswith(start) else start + self.source

    def pieces(self, turns: Sequence[Turn]) -> tuple[list[str], list[str]]:
        """Splits a prompt into the template's text and the contents, which follow its pieces one by one.

        The contents lack white space at their ends. The pieces have as much of it as the template leaves.
        """
        contents = [content.strip() for _, content in turns]
        # Occurs in no content, so that the rendered text can be split where the contents belong.
        mark = _MARK
        while any(mark in content for content in contents):
            mark += _MARK
        marked = [(role, _replaced(content, mark)) for role, content in turns]
        *pieces, tail = self._render(marked, add_generation_prompt=True).split(mark)
        if len(pieces) != len(turns) or not tail.endswith(self._generation):
            raise UserError(
                f"{self._where}: the chat template writes {len(turns)} messages as {_clip(mark.join([*pieces, tail]))};"
                " correct the template"
            )
        return [*pieces, tail.removesuffix(self._generation) + self.header], contents

    def response(self, text: str) -> str:
        """Returns the text between header and end of turn that the template writes for this response.

        Raises:
            UserError: the template rewrites the response; it may only remove white space at its ends.
        """
        core = text.strip()
        if not core:
            return self.lead + text
        start = text.index(core)
        before, after = self._edges(text[:start], text[start + len(core) :])
        written = self._render([("user", _QUESTION), ("assistant", text)])
        if before + core + after != written:
            raise UserError(
                f"{self._where}: the chat template rewrites a response: {_clip(text)} becomes"
                f" {_clip(written.rpartition(_QUESTION)[2])}; change the response"
            )
        return before.rpartition(_QUESTION)[2].removeprefix(self._written_header) + core + after.removesuffix(self.last)

    def _written_edges(self, start: str, end: str) -> tuple[str, str]:
        """The conversation before and after a response with this white space at its ends."""
        text = self._render([("user", _QUESTION), ("assistant", start + _MARK + end)])
        before, _, after = text.partition(_MARK)
        return before, after

    def _learn(self) -> None:
        user, answer, more = (f"{name}: {_AWKWARD} {name}" for name in ("Question", "Answer", "More"))
        prompt = self._render([("user", user)], add_generation_prompt=True)
        talk = self._render([("user", user), ("assistant", answer)])
        self.head, self._generation = self._around(prompt, user)
        _, between, self.last = self._around(talk, user, answer)
        self._written_header = between.rstrip(" ")
        bare = _EMPTY_THOUGHT.sub("", self._generation)
        if bare != self._generation and between.startswith(bare) and not talk.startswith(prompt):
            # With thinking off, a prompt has an empty block that the template leaves out of past responses.
            between = self._generation + between.removeprefix(bare)
        differs = (
            f"{self._where}: the chat template ends a prompt with {_clip(self._generation)}, but writes"
            f" {_clip(between)} before a response"
        )
        if not between.startswith(self._generation.rstrip()):
            raise UserError(f"{differs}; correct the template, or take a checkpoint that need not think")
        if not between.startswith(self._generation.rstrip(" ")):
            logging.warning("%s; the latter is used for both", differs)
        self.header = between.rstrip(" ")
        self.lead = between.removeprefix(self.header)
        tags = _THINK_TAG.findall(self.header)
        if tags and not _CLOSES.match(tags[-1]):
            raise UserError(
                f"{self._where}: the chat template opens a think block before a response and does not close it:"
                f" {_clip(self.header)}; take a checkpoint that can answer without thinking, or correct the template"
            )
        try:
            longer = self._render([("user", user), ("assistant", answer), ("user", more)])
            _, self.next, _ = self._around(longer, answer, more)
        except UserError:  # A template for single exchanges.
            self.next = ""

    def _around(self, text: str, *contents: str) -> list[str]:
        """The template's text around the contents, which must occur once each, in this order."""
        pieces = []
        rest = text
        for content in contents:
            before, found, rest = rest.partition(content)
            if not found or content in before + rest:
                raise UserError(
                    f"{self._where}: the chat template loses, changes or repeats the text of a message: it writes"
                    f" {_clip(content)} as {_clip(text)}; correct the template"
                )
            pieces.append(before)
        return [*pieces, rest]

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}] if self._parts else content}
            for role, content in turns
        ]
        try:
            return self._template.render(
                messages=messages, tools=self._tools, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except Exception as error:  # A template can raise anything.
            raise UserError(f"{self._where}: the chat template refuses the messages: {first_line(error)}") from error


def _replaced(content: str, mark: str) -> str:
    """Puts `mark` in place of the content, but keeps the white space at its ends, which templates may trim."""
    core = content.strip()
    return content.replace(core, mark) if core else content + mark


def _clip(text: str) -> str:
    return repr(text) if len(text) <= 120 else f"{text[:80]!r}...{text[-40:]!r}"
