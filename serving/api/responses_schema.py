"""The body of `POST /v1/responses`, and what it means as a chat. Knows no tokenizer and no engine.

Answers are not kept, so that nothing can refer to an earlier one: a client sends the whole conversation.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from serving.api.messages import MessageBody, content_shape
from serving.api.output_form import Schema
from serving.api.request_schema import MAX_MESSAGES, MAX_METADATA, ChatBody
from serving.api.strict_body import RequestBody, StrictBody, at_most
from serving.api.tools import MAX_TOOLS, FunctionName


class InputText(MessageBody):
    type: Literal["input_text", "output_text"]
    text: str


Texts = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[InputText], Field(fail_fast=True), Tag("list")],
    Discriminator(content_shape),
]


class InputMessage(MessageBody):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Texts
    status: str | None = None


class InputCall(MessageBody):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: str | None = None


class InputCallOutput(MessageBody):
    type: Literal["function_call_output"]
    call_id: str
    output: Texts
    status: str | None = None


def _item_kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return {"function_call": "a call", "function_call_output": "a result"}.get(str(kind), "a message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("a message")]
    | Annotated[InputCall, Tag("a call")]
    | Annotated[InputCallOutput, Tag("a result")],
    Discriminator(_item_kind),
]


class ResponsesTool(StrictBody):
    """Not a Function with a type: its type must be the first to be found wrong."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesToolChoice(StrictBody):
    type: Literal["function"]
    name: FunctionName


class TextFormat(StrictBody):
    """`schema` and `name` belong to `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, min_length=1, max_length=64)
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(StrictBody):
    format: TextFormat | None = None


class ResponsesStreamOptions(StrictBody):
    include_obfuscation: bool | None = None
    """As in a chat's `stream_options`."""


class ResponsesBody(RequestBody):
    """`POST /v1/responses`."""

    model: str | None = None
    input: Annotated[
        Annotated[str, Tag("str")]
        | Annotated[
            list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), Tag("list")
        ],
        Discriminator(content_shape),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stream: bool = False
    stream_options: ResponsesStreamOptions | None = None
    text: TextConfig | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default_factory=list
    )
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("by a word")]
            | Annotated[ResponsesToolChoice, Tag("by a name")],
            Discriminator(lambda value: "by a word" if isinstance(value, str) else "by a name"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool = True
    metadata: Annotated[dict[str, str] | None, at_most(MAX_METADATA)] = None
    user: str | None = None
    store: bool | None = None
    """False: the request is not recorded for learning. Answers are never kept."""

    def as_chat(self) -> dict[str, Any]:
        """The fields of a ChatBody; those that are unset stay so."""
        same = ("model", "temperature", "top_p", "seed", "metadata", "user", "store")
        chat: dict[str, Any] = {name: getattr(self, name) for name in same}
        chat |= {"stream": self.stream, "max_completion_tokens": self.max_output_tokens}
        chat |= {"messages": list(self._messages()), "parallel_tool_calls": self.parallel_tool_calls}
        if self.text is not None and self.text.format is not None:
            chat["response_format"] = _chat_format(self.text.format)
        if self.stream_options is not None:
            chat["stream_options"] = self.stream_options.model_dump(exclude_none=True)
        if self.tools:
            functions = (tool.model_dump(exclude={"type"}, exclude_none=True) for tool in self.tools)
            chat["tools"] = [{"type": "function", "function": function} for function in functions]
        choice = self.tool_choice
        if isinstance(choice, ResponsesToolChoice):
            chat["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        elif choice is not None:
            chat["tool_choice"] = choice
        return chat

    def _messages(self) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        if self.instructions is not None:
            said.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*said, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, InputCall):
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                if not (said and said[-1]["role"] == "assistant"):
                    said.append({"role": "assistant", "content": ""})
                said[-1].setdefault("tool_calls", []).append(call)
            elif isinstance(item, InputCallOutput):
                said.append({"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)})
            else:
                said.append({"role": item.role, "content": _joined(item.content)})
        return said


def chat_of(body: ResponsesBody) -> ChatBody:
    """Raises pydantic.ValidationError where the fields exclude each other."""
    return ChatBody.model_validate(body.as_chat())


def _joined(texts: Texts) -> str:
    return texts if isinstance(texts, str) else "".join(part.text for part in texts)


def _chat_format(asked: TextFormat) -> dict[str, Any]:
    if asked.type != "json_schema":
        return {"type": asked.type}
    schema = {"name": asked.name, "schema": asked.schema_, "description": asked.description}
    return {"type": "json_schema", "json_schema": {k: v for k, v in schema.items() if v is not None}}
