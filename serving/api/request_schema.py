"""The bodies that clients send, validated strictly. Knows no tokenizer and no engine.

Invariant: nothing that changes the output is ignored. A field that is unknown, or known and not supported, is
refused by name unless its value is the neutral one; null means unset everywhere. Every list is checked up to
its first fault only, because only one fault is reported and a body of a megabyte may hold a hundred thousand.
"""

import difflib
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from serving.api.unsupported import HARMLESS, NEUTRAL_VALUES

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_PROMPTS = 4096
MAX_MESSAGES = 4096
MAX_BIASES = 4096
MAX_METADATA = 16

_TEMPLATE_CONTROLS = frozenset(
    "add_generation_prompt chat_template continue_final_message conversation documents max_length messages "
    "padding return_assistant_tokens_mask return_dict return_tensors tokenize tokenizer_kwargs tools "
    "truncation".split()
)

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")


def fault(param: str, message: str) -> PydanticCustomError:
    """A validation error that names the field at fault."""
    return PydanticCustomError("everdraft", message.replace("{", "{{").replace("}", "}}"), {"param": param})


def refuse_broken_text(data: Any) -> None:
    """Refuses half of a surrogate pair, which JSON can escape but no encoding and no tokenizer can hold."""
    rest = [data]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise PydanticCustomError("everdraft", "a text holds half of a surrogate pair") from None


def at_most(num_entries: int) -> BeforeValidator:
    """For mappings: refuses more entries before the first of them is validated."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > num_entries:
            raise ValueError(f"has {len(value)} entries; at most {num_entries} are allowed")
        return value

    return BeforeValidator(check)


def prompt_shape(prompt: Any) -> str | None:
    """Which of the allowed types a prompt has, by its first item; None: none of them."""
    if isinstance(prompt, str):
        return "str"
    if not isinstance(prompt, list):
        return None
    first = prompt[0] if prompt else ""
    return "list[str]" if isinstance(first, str) else "list[list]" if isinstance(first, list) else "list[int]"


Prompt = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("list[str]")]
    | Annotated[list[TokenId], Field(fail_fast=True), Tag("list[int]")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("list[list]")],
    Discriminator(prompt_shape),
]


class StrictBody(BaseModel):
    """Refuses unknown fields and coerced types; drops nulls and harmless fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_be_ignored(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        return {name: value for name, value in given.items() if not cls._may_drop(name, value)}

    @classmethod
    def _may_drop(cls, name: Any, value: Any) -> bool:
        """Whether the field may be left out. Raises for one that may not and cannot be kept."""
        if name in cls.model_fields:
            return False
        if name in NEUTRAL_VALUES:
            if any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL_VALUES[name]):
                return True
            raise fault(name, "is not supported yet; the request was not started")
        if name in HARMLESS:
            return True
        close = difflib.get_close_matches(str(name), cls.model_fields, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise fault(str(name), f"is no field that is known here{hint}; the request was not started")


class RequestBody(StrictBody):
    """A whole body, in which every text is one."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_broken_text(cls, data: Any) -> Any:
        refuse_broken_text(data)
        return data


class StreamOptions(StrictBody):
    include_usage: bool = False


class GenerationBody(RequestBody):
    """What both generation endpoints share."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] = (
        Field(default_factory=list)
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], at_most(MAX_BIASES)] = Field(
        default_factory=dict
    )
    """Token id to what its logit gains. -100 as good as bans a token, but is finite like any other;
    `allowed_token_ids` is strict."""
    user: str | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, str] | None, at_most(MAX_METADATA)] = None

    top_k: int = Field(default=0, ge=-1, lt=2**31)
    """0 and -1 are off."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, fail_fast=True)] | None = None
    min_tokens: int = Field(default=0, ge=0)
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] = Field(
        default_factory=list, max_length=128
    )
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    """So many of the most likely tokens beside each token of the prompt, which is then computed whole."""
    return_token_ids: bool = False
    return_weight_versions: bool = False
    num_draft_tokens: int | None = Field(default=None, ge=0)
    """Caps the draft length; 0 turns speculation off for this request."""

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_token_ids(cls, biases: dict[str, float]) -> dict[str, float]:
        wrong = next((key for key in biases if not _TOKEN_ID.fullmatch(key)), None)
        if wrong is not None:
            raise ValueError(f"key {wrong[:20]!r} is no token id; the request was not started")
        return biases

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_prompt_logprobs(self) -> int | None:
        """What the engine is asked for."""
        return self.prompt_logprobs

    @model_validator(mode="after")
    def _prompt_logprobs_come_whole(self) -> Self:
        if self.stream and self.prompt_logprobs is not None:
            raise fault("prompt_logprobs", "is not available when stream is true")
        return self

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise fault("stream_options", "is only allowed when stream is true")
        return self


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Prompt
    max_tokens: int | None = Field(default=None, ge=0)
    """0: the prompt alone."""
    echo: bool = False
    """With `logprobs`, those of the prompt come first."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise fault("best_of", f"={self.best_of} other than n={self.n} is not supported yet")
        if isinstance(self.prompt, list) and not self.prompt:
            raise fault("prompt", "is empty; there is nothing to complete")
        return self

    @property
    def num_prompt_logprobs(self) -> int | None:
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((count for count in asked if count is not None), default=None)


class ContentPart(StrictBody):
    type: Literal["text"]
    text: str


class ChatMessage(StrictBody):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    type: Literal["text"] | None = None
    """What lm-eval before 0.4.10 says of every message."""
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] = ""
    name: str | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        parts = self.content
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(
        min_length=1, max_length=MAX_MESSAGES
    )
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise fault("top_logprobs", "needs logprobs to be true")
        return self

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_variables(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        reserved = _TEMPLATE_CONTROLS.intersection(arguments)
        if reserved:
            raise ValueError(
                f"{sorted(reserved)} are not variables of a template; the request was not started"
            )
        return arguments

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeBody(RequestBody):
    """`POST /tokenize`: a text, or messages as chat would see them."""

    model: str | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None
    ) = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise fault("prompt", "or messages must be given, and not both")
        return self


class DetokenizeBody(RequestBody):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds
