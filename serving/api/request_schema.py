"""The bodies that clients send, validated strictly. Knows no tokenizer and no engine.

Every list is checked up to its first fault only, because only one fault is reported and a body of a megabyte
may hold a hundred thousand.
"""

import re
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from serving.api.messages import ChatMessage
from serving.api.output_form import ResponseFormat, StructuredOutputs
from serving.api.strict_body import RequestBody, StrictBody, at_most, fault
from serving.api.tools import NamedTool, ToolChoice, Tools

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


class StreamOptions(StrictBody):
    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Whether events are padded to a multiple of some bytes, so that their sizes tell less. Unset: as the
    service does (`serving.stream_padding_bytes`)."""


class GenerationBody(RequestBody):
    """What both generation endpoints share. `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty`
    that a request leaves out are those of the model's `generation_config.json`, where it has them."""

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
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    """So many of the most likely tokens beside each token of the prompt, which is then computed whole."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the answer's text. A stop string that spells one ends the answer
    either way."""
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    """Log-probabilities name tokens `token_id:123`, so that tokens of equal text can be told apart."""
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

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.structured_outputs is not None and self.response_format is not None:
            raise fault("structured_outputs", "and response_format both ask for a form; give one of them")
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


def _one_end(body: "ChatBody | TokenizeBody") -> None:
    """Refuses a prompt that shall end in two ways."""
    if body.continue_final_message and body.add_generation_prompt:
        raise fault(
            "continue_final_message",
            "needs add_generation_prompt to be false: the prompt ends with the last message, or with the "
            "beginning of a new one; nothing was started",
        )


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(
        min_length=1, max_length=MAX_MESSAGES
    )
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    """None: auto where there are tools."""
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """The answer goes on where the last message ends; `add_generation_prompt` must be false."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        _one_end(self)
        if self.top_logprobs and not self.logprobs:
            raise fault("top_logprobs", "needs logprobs to be true")
        choice, names = self.choice_of_tools, {tool.function.name for tool in self.tools}
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise fault("tool_choice", f"names {choice.function.name!r}, which is none of the tools")
        if choice == "required" and not names:
            raise fault("tool_choice", "=required needs tools")
        if choice != "none" and (self.asks_for_form or self.structured_outputs is not None):
            field = "response_format" if self.asks_for_form else "structured_outputs"
            raise fault(field, "and tools cannot both shape an answer; send tool_choice none, or no form")
        return self

    @property
    def asks_for_form(self) -> bool:
        """Whether `response_format` is more than text."""
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def choice_of_tools(self) -> str | NamedTool:
        """`none` where there are no tools to call."""
        if self.tool_choice is None or self.tool_choice == "auto":
            return "auto" if self.tools else "none"
        return self.tool_choice

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
    continue_final_message: bool = False
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        _one_end(self)
        if (self.prompt is None) == (self.messages is None):
            raise fault("prompt", "or messages must be given, and not both")
        return self


class DetokenizeBody(RequestBody):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds
