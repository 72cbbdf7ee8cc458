"""Structured output: the form that a request asks of its text, compiled to a constraint on tokens.

llguidance reads schemas, expressions and grammars, and says which tokens may follow a text. Here they are
compiled once and kept, and their errors become ours. Knows no HTTP and no engine; thread-safe.
"""

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import llguidance
import llguidance.numpy
import numpy as np
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray

Kind = Literal["json", "regex", "choice", "grammar"]

_KEPT_GRAMMARS = 64
_QUIET = 0


class GrammarError(ValueError):
    """The form cannot be compiled; the message says why."""


@dataclass(frozen=True)
class StructuredOutput:
    """The form asked for. `text` is a JSON schema, a regular expression, a JSON list of choices, or a grammar
    in Lark's or in GBNF's notation."""

    kind: Kind
    text: str
    spaces: bool = True
    """Of JSON: whether a space may follow a colon or a comma. There is no other whitespace: a model that
    begins with it may never end."""

    def serialised(self) -> str:
        """As llguidance takes it. Raises GrammarError."""
        try:
            text = self.schema_text() if self.kind == "json" else self.text
            return llguidance.grammar_from(self.kind, text)
        except ValueError as error:
            raise GrammarError(str(error)) from None

    def schema_text(self) -> str:
        """The schema with llguidance's options in it, unless it has its own. Raises GrammarError for a text
        that is no schema."""
        try:
            schema = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the schema is no JSON: {error}") from None
        if not isinstance(schema, dict):
            schema = {"allOf": [schema]}
        space = " ?" if self.spaces else ""
        separators = {"key_separator": f":{space}", "item_separator": f",{space}"}
        return json.dumps({"x-guidance": {"whitespace_flexible": False, **separators}, **schema})


@dataclass(frozen=True)
class CompiledGrammar:
    """A TokenConstraint: what `StructuredOutput` allows, for one tokenizer."""

    asked: StructuredOutput
    _matcher: Any = field(repr=False, compare=False)
    _ends_M: NDArray[np.uint8] = field(repr=False, compare=False)

    def start(self) -> "GrammarState":
        return GrammarState(self._matcher.deep_copy(), self._ends_M)


class GrammarState:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: Any, ends_M: NDArray[np.uint8]) -> None:
        """`ends_M`: the mask that allows the end of text alone."""
        self._matcher, self._ends_M = matcher, ends_M

    def allowed(self, drafted: Sequence[int]) -> NDArray[np.uint8] | None:
        """See `ConstraintState.allowed`."""
        matcher = self._matcher
        num_taken = matcher.try_consume_tokens(list(drafted))
        try:
            return self._mask() if num_taken == len(drafted) else None
        finally:
            matcher.rollback(num_taken)

    def advance(self, token_ids: Sequence[int]) -> None:
        """See `ConstraintState.advance`."""
        self._matcher.try_consume_tokens(list(token_ids))

    def _mask(self) -> NDArray[np.uint8] | None:
        matcher = self._matcher
        if matcher.is_error():
            return np.zeros_like(self._ends_M)
        if matcher.is_stopped():
            return None if matcher.stop_reason() == "EndOfSentence" else self._ends_M
        return np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)[: len(self._ends_M)]


class GrammarCompiler:
    """Compiles for one model's tokenizer, whose text ends with `eos_token_ids`."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """`vocab_size`: that of the model's logits, which may be more than the tokenizer's."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._kept: OrderedDict[StructuredOutput, CompiledGrammar] = OrderedDict()

    def prepare(self) -> None:
        """Reads the tokenizer, which holds up every thread for up to seconds: better before there are
        requests. A tokenizer that cannot be used is told of by `compile`."""
        with contextlib.suppress(GrammarError):
            _ = self._wrapped_tokenizer

    def compile(self, asked: StructuredOutput) -> CompiledGrammar:
        """May take a second. Raises GrammarError."""
        with self._lock:
            compiled = self._kept.get(asked)
        if compiled is None:
            compiled = self._compile(asked)
        with self._lock:
            self._kept[asked] = compiled
            self._kept.move_to_end(asked)
            if len(self._kept) > _KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        return compiled

    def _compile(self, asked: StructuredOutput) -> CompiledGrammar:
        matcher = llguidance.LLMatcher(self._wrapped_tokenizer, asked.serialised(), log_level=_QUIET)
        if error := matcher.get_error():
            raise GrammarError(error)
        matcher.compute_bitmask()
        if error := matcher.get_error():
            raise GrammarError(error)
        return CompiledGrammar(asked, matcher, self._ends_M)

    @cached_property
    def _wrapped_tokenizer(self) -> Any:
        if getattr(self._tokenizer, "backend_tokenizer", None) is None:
            raise GrammarError("the model's tokenizer is not of the fast kind, which structured output needs")
        if not self._eos_token_ids:
            raise GrammarError("the model has no end-of-text token, which structured output needs")
        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        except Exception as error:  # of a library in another language, about a file in a format of its own
            raise GrammarError(f"the model's tokenizer does not fit structured output: {error}") from None

    @cached_property
    def _ends_M(self) -> NDArray[np.uint8]:
        is_end_V = np.zeros(-(-self._vocab_size // 8) * 8, dtype=np.uint8)
        is_end_V[self._eos_token_ids] = 1
        return np.packbits(is_end_V, bitorder="little")


def any_object(*, spaces: bool = True) -> StructuredOutput:
    """What `json_object` asks for."""
    return StructuredOutput("json", json.dumps({"type": "object"}), spaces)
