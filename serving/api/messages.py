"""The messages of a chat, as clients send them.

Invariant: what a client keeps beside a message and sends back never fails; what a message says reaches the
chat template, or is refused.
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from serving.api.strict_body import StrictBody, fault
from serving.api.tools import ToolCall
from serving.api.unsupported import MESSAGE_METADATA

PartType = Literal["text", "input_text", "output_text", "refusal"]


class MessageBody(StrictBody):
    """Ignores what clients keep beside a message."""

    @classmethod
    def _may_drop(cls, name: Any, value: Any) -> bool:
        return name in MESSAGE_METADATA or super()._may_drop(name, value)


class ContentPart(MessageBody):
    """A text; `refusal` has it in the field of that name."""

    type: PartType
    text: str = ""
    refusal: str = ""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind not in get_args(PartType):
            raise fault(
                "type", f"{kind[:40]!r} is no text, and this model reads text only; nothing was started"
            )
        return data

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> Self:
        name = "refusal" if self.type == "refusal" else "text"
        if self.model_fields_set - {"type"} != {name}:
            raise fault(name, f"must be in a part of type {self.type!r}, and no other text")
        return self


def content_shape(content: Any) -> str | None:
    """Which of its two types a content has; None: neither."""
    return "str" if isinstance(content, str) else "list" if isinstance(content, list) else None


Content = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[ContentPart], Field(fail_fast=True), Tag("list")],
    Discriminator(
        content_shape,
        custom_error_type="everdraft",
        custom_error_message="must be a text or a list of parts",
    ),
]


class ChatMessage(MessageBody):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    type: Literal["text"] | None = None
    """What lm-eval before 0.4.10 says of every message."""
    content: Content = ""
    refusal: str = ""
    """Stands for a content that is empty."""
    reasoning_content: str | None = None
    """For the chat template, as `reasoning` is; templates that know neither leave it out."""
    reasoning: str | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] = Field(default_factory=list)
    """Of an earlier answer."""

    @property
    def text(self) -> str:
        parts = self.content
        said = parts if isinstance(parts, str) else "".join(part.text or part.refusal for part in parts)
        return said or self.refusal
