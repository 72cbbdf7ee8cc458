"""Finds the calls of tools in the text that a model writes, as it comes.

One parser for each form that models are trained to write, and one for what `tool_choice` forces. Knows text
alone. Invariant: what the pieces of a text add up to does not depend on where it was cut, and no character is
both content and part of a call.
"""

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

ToolParserName = Literal["hermes", "llama3_json"]


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of the call with this `index` of an answer. `id` and `name` come with its first."""

    index: int
    arguments: str = ""
    """Of the JSON text of its arguments."""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class ParsedText:
    """What became certain of a text."""

    content: str = ""
    calls: tuple[ToolCallDelta, ...] = ()

    def __add__(self, later: "ParsedText") -> "ParsedText":
        return ParsedText(self.content + later.content, self.calls + later.calls)


class ToolParser(Protocol):
    """Of one answer. `feed` its text in order, then `finish` once."""

    @property
    def num_calls(self) -> int: ...

    def feed(self, text: str) -> ParsedText: ...

    def finish(self) -> ParsedText:
        """What was held back."""
        ...


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')
"""The usual order of a call, up to its arguments."""


@dataclass
class _JsonEnd:
    """Where the JSON object, or list, that a text begins with ends."""

    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False

    def find(self, text: str) -> int | None:
        """Index behind it in the next piece of the text; None: it goes on."""
        for index, char in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1
        return None


@dataclass
class _Call:
    """The JSON object of one call, `{"name": …, "arguments": {…}}` with the names in any order."""

    index: int
    text: str = ""
    is_told: bool = False
    """Whether its name was given out, which cannot be taken back."""
    _object: _JsonEnd = field(default_factory=_JsonEnd)
    _arguments: _JsonEnd = field(default_factory=_JsonEnd)
    _arguments_end: bool = False

    def feed(self, text: str) -> tuple[list[ToolCallDelta], str | None]:
        """(its pieces, what follows the object); what follows is None while the object goes on."""
        end = self._object.find(text)
        piece = text if end is None else text[:end]
        self.text += piece
        deltas = self._tell(piece)
        if end is None:
            return deltas, None
        return [*deltas, *(() if self.is_told else self._whole())], text[end:]

    def _tell(self, piece: str) -> list[ToolCallDelta]:
        if self.is_told:
            return [ToolCallDelta(self.index, told)] if (told := self._of_arguments(piece)) else []
        head = _HEAD.match(self.text)
        if head is None or head.end() == len(self.text) or self.text[head.end()] != "{":
            return []
        self.is_told = True
        return [self._first(json.loads(head[1]), self._of_arguments(self.text[head.end() :]))]

    def _of_arguments(self, piece: str) -> str:
        if self._arguments_end:
            return ""
        end = self._arguments.find(piece)
        self._arguments_end = end is not None
        return piece[:end]

    def _whole(self) -> list[ToolCallDelta]:
        """The call, if the object is one."""
        try:
            said = json.loads(self.text)
        except (ValueError, RecursionError):
            return []
        arguments = said.get("arguments", said.get("parameters"))
        if not isinstance(said.get("name"), str) or arguments is None:
            return []
        self.is_told = True
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [self._first(said["name"], text)]

    def _first(self, name: str, arguments: str) -> ToolCallDelta:
        return ToolCallDelta(self.index, arguments, f"call_{uuid.uuid4().hex[:24]}", name)


class HermesParser:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, in and behind text (Hermes, Qwen)."""

    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        self.num_calls = 0
        self._rest = ""
        self._call: _Call | None = None
        self._step: Callable[[], ParsedText | None] = self._outside

    def feed(self, text: str) -> ParsedText:
        self._rest += text
        found = ParsedText()
        while (more := self._step()) is not None:
            found += more
        return found

    def finish(self) -> ParsedText:
        call, rest, self._rest = self._call, self._rest, ""
        if call is not None and not call.is_told:
            rest = self._OPEN + call.text + rest
        elif self._step == self._behind:
            rest = ""
        return ParsedText("" if not rest.strip() and self.num_calls else rest)

    def _outside(self) -> ParsedText | None:
        """Text, up to the next call; space next to calls is none of it."""
        before, found, behind = self._rest.partition(self._OPEN)
        if found:
            self._rest, self._step = behind, self._inside
            return ParsedText(before.rstrip())
        keep = _possible_start(self._rest, self._OPEN)
        text, held = self._rest[: len(self._rest) - keep], self._rest[len(self._rest) - keep :]
        if not text.strip():
            return None
        self._rest = held
        return ParsedText(text)

    def _inside(self) -> ParsedText | None:
        if not self._rest:
            return None
        self._call = self._call or _Call(self.num_calls)
        text, self._rest = self._rest, ""
        deltas, behind = self._call.feed(text)
        if self._call.is_told:
            self.num_calls = self._call.index + 1
        if behind is None:
            return ParsedText(calls=tuple(deltas))
        self._rest, self._step = behind, self._behind
        if self._call.is_told:
            return ParsedText(calls=tuple(deltas))
        return ParsedText(self._OPEN + self._call.text)

    def _behind(self) -> ParsedText | None:
        """The closing tag; what stands there instead of it is text."""
        rest = self._rest.lstrip()
        if len(rest) < len(self._CLOSE) and self._CLOSE.startswith(rest):
            return None
        is_told = self._call is not None and self._call.is_told
        self._call, self._step = None, self._outside
        if rest.startswith(self._CLOSE):
            self._rest = rest[len(self._CLOSE) :]
            return ParsedText("" if is_told else self._CLOSE)
        return ParsedText()


class Llama3JsonParser:
    """An answer that is one call, or several with `;` between: `{"name": …, "parameters": {…}}` (Llama 3)."""

    _TAG = "<|python_tag|>"

    def __init__(self) -> None:
        self.num_calls = 0
        self._rest = ""
        self._call: _Call | None = None
        self._is_text = False

    def feed(self, text: str) -> ParsedText:
        self._rest += text
        found = ParsedText()
        while not self._is_text:
            more = self._next()
            if more is None:
                return found
            found += more
        content, self._rest = self._rest, ""
        return found + ParsedText(content)

    def finish(self) -> ParsedText:
        call, rest = self._call, self._rest
        unfinished = call.text if call is not None and not call.is_told else ""
        rest = unfinished + rest
        return ParsedText("" if self.num_calls and not rest.strip("; \n\t,") else rest)

    def _next(self) -> ParsedText | None:
        if self._call is None:
            begun = self._rest.lstrip()
            if self.num_calls:
                begun = begun.lstrip(";, \n\t\r")
            elif begun.startswith(self._TAG):
                begun = begun[len(self._TAG) :].lstrip()
            if not begun or self._TAG.startswith(begun):
                return None
            if not begun.startswith("{"):
                self._is_text = True
                return ParsedText()
            self._call, self._rest = _Call(self.num_calls), begun
        if not self._rest:
            return None
        text, self._rest = self._rest, ""
        call = self._call
        deltas, behind = call.feed(text)
        if call.is_told:
            self.num_calls = call.index + 1
        if behind is not None:
            self._rest, self._call = behind, None
            if not call.is_told:
                self._rest, self._is_text = call.text + behind, True
        return ParsedText(calls=tuple(deltas))


class ForcedListParser:
    """`[{"name": …, "parameters": {…}}, …]`, which `tool_choice: "required"` forces."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._call: _Call | None = None

    def feed(self, text: str) -> ParsedText:
        calls: list[ToolCallDelta] = []
        rest: str | None = text
        while rest:
            if self._call is None:
                rest = rest.lstrip("[], \n\t\r")
                if not rest:
                    break
                self._call = _Call(self.num_calls)
            deltas, rest = self._call.feed(rest)
            calls += deltas
            self.num_calls = self._call.index + int(self._call.is_told)
            if rest is not None:
                self._call = None
        return ParsedText(calls=tuple(calls))

    def finish(self) -> ParsedText:
        return ParsedText()


class ForcedCallParser:
    """The arguments of the one tool that `tool_choice` names, and nothing else."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.num_calls = 0

    def feed(self, text: str) -> ParsedText:
        if self.num_calls or not text:
            return ParsedText(calls=(ToolCallDelta(0, text),) if text else ())
        self.num_calls = 1
        return ParsedText(calls=(ToolCallDelta(0, text, f"call_{uuid.uuid4().hex[:24]}", self._name),))

    def finish(self) -> ParsedText:
        return ParsedText()


PARSERS: dict[ToolParserName, Callable[[], ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
}


def parser_for(chat_template: str) -> ToolParserName | None:
    """The form that a model's chat template teaches; None: none that is known here."""
    if "<tool_call>" in chat_template:
        return "hermes"
    return "llama3_json" if '"parameters"' in chat_template and "tools" in chat_template else None


def _possible_start(text: str, tag: str) -> int:
    """Length of the longest end of a text with which the tag could begin, and of the space before it."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-length:]):
            break
    else:
        length = 0
    before = text[: len(text) - length]
    return length + len(before) - len(before.rstrip())
