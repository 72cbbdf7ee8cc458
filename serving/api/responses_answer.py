"""How `/v1/responses` answers: a list of items, each a message or a call, whole or as named events.

The stream and the whole answer come from the same steps, so that they cannot differ.
"""

import uuid
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import Field

from serving.api import sse
from serving.api.choices import ChoiceDelta
from serving.api.errors import ApiError
from serving.api.request_plan import RequestPlan
from serving.api.response_schema import Body, Metrics, Usage
from serving.api.responses_schema import ResponsesBody
from serving.api.tool_parsing import ParsedText, ToolCallDelta, ToolParser

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(Body):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str] = Field(default_factory=list)


class OutputMessage(Body):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class OutputCall(Body):
    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str
    status: Status


class InputTokensDetails(Body):
    cached_tokens: int


class OutputTokensDetails(Body):
    reasoning_tokens: int = 0


class ResponsesUsage(Body):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Body):
    reason: Literal["max_output_tokens"]


class ResponseObject(Body):
    """`text`, `tools` and `tool_choice` are those of the request. Never kept, so that `store` is false."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    model: str
    output: list[OutputMessage | OutputCall]
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None = None
    temperature: float
    top_p: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    truncation: Literal["disabled"] = "disabled"
    store: Literal[False] = False
    user: str | None
    usage: ResponsesUsage | None = None
    metrics: Metrics | None = None

    def to_json(self) -> str:
        return self.model_dump_json()


class ResponsesEvent(Body):
    """`type` says which of the other fields it has."""

    type: str
    sequence_number: int
    response: ResponseObject | None = None
    output_index: int | None = None
    content_index: int | None = None
    item_id: str | None = None
    item: OutputMessage | OutputCall | None = None
    part: OutputText | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[str] | None = None
    obfuscation: str | None = None
    """Of events that are padded: random characters, to be ignored."""

    @property
    def event_name(self) -> str:
        return self.type

    def to_json(self) -> str:
        return self.model_dump_json(exclude_none=True)


class ResponsesRenderer:
    """Of one answer, in order."""

    end_of_stream = ""

    def __init__(
        self, plan: RequestPlan, body: ResponsesBody, new_parser: Callable[[], ToolParser] | None
    ) -> None:
        self._plan, self._body = plan, body
        self._parser = None if new_parser is None else new_parser()
        self._output: list[OutputMessage | OutputCall] = []
        self._is_open = False
        """Whether more may come of the last item."""
        self._is_cut = False
        self._num_events = 0

    def opening(self) -> Iterator[ResponsesEvent]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress"))

    def chunks(self, delta: ChoiceDelta) -> Iterator[ResponsesEvent]:
        said = self._read(delta)
        if said.content:
            yield from self._text(said.content)
        for call in said.calls:
            yield from self._call(call)
        if delta.generation is not None:
            self._is_cut = delta.finish_reason == "length"
            yield from self._end()

    def closing(self, usage: Usage, metrics: Metrics) -> Iterator[ResponsesEvent]:
        response = self._finished(usage, metrics)
        yield self._event(f"response.{response.status}", response=response)

    def answer(self, choices: list[ChoiceDelta], usage: Usage, metrics: Metrics) -> ResponseObject:
        for _ in self.chunks(choices[0]):
            pass
        return self._finished(usage, metrics)

    def failure(self, error: ApiError) -> str:
        detail = error.body.error
        said = {"code": detail.code, "message": detail.message, "param": detail.param}
        event = _Failure(type="error", sequence_number=self._num_events, **said)
        return sse.event(event.model_dump_json(), "error")

    def _read(self, delta: ChoiceDelta) -> ParsedText:
        if self._parser is None:
            return ParsedText(delta.text)
        said = self._parser.feed(delta.text)
        if delta.generation is not None:
            said += self._parser.finish()
        if self._body.parallel_tool_calls:
            return said
        return ParsedText(said.content, tuple(call for call in said.calls if call.index == 0))

    def _text(self, text: str) -> Iterator[ResponsesEvent]:
        if not (self._is_open and isinstance(self._output[-1], OutputMessage)):
            yield from self._end()
            begun = OutputMessage(id=f"msg_{uuid.uuid4().hex}", status="in_progress", content=[])
            yield from self._begin(begun)
            part = OutputText(text="")
            yield self._of_item("response.content_part.added", item_id=begun.id, content_index=0, part=part)
            self._output[-1] = begun.model_copy(update={"content": [part]})
        item = self._output[-1]
        assert isinstance(item, OutputMessage)
        part = OutputText(text=item.content[0].text + text)
        self._output[-1] = item.model_copy(update={"content": [part]})
        yield self._of_item(
            "response.output_text.delta", item_id=item.id, content_index=0, delta=text, logprobs=[]
        )

    def _call(self, call: ToolCallDelta) -> Iterator[ResponsesEvent]:
        if call.name is not None:
            yield from self._end()
            begun = OutputCall(
                id=f"fc_{uuid.uuid4().hex}",
                call_id=call.id or "",
                name=call.name,
                arguments="",
                status="in_progress",
            )
            yield from self._begin(begun)
        item = self._output[-1]
        assert isinstance(item, OutputCall)
        self._output[-1] = item.model_copy(update={"arguments": item.arguments + call.arguments})
        if call.arguments:
            yield self._of_item(
                "response.function_call_arguments.delta", item_id=item.id, delta=call.arguments
            )

    def _begin(self, item: OutputMessage | OutputCall) -> Iterator[ResponsesEvent]:
        self._output.append(item)
        self._is_open = True
        yield self._of_item("response.output_item.added", item=item)

    def _end(self) -> Iterator[ResponsesEvent]:
        """Of the item that is open, if one is."""
        if not self._is_open:
            return
        self._is_open = False
        item = self._output[-1].model_copy(update={"status": "incomplete" if self._is_cut else "completed"})
        self._output[-1] = item
        if isinstance(item, OutputMessage):
            part, at = item.content[0], {"item_id": item.id, "content_index": 0}
            yield self._of_item("response.output_text.done", **at, text=part.text, logprobs=[])
            yield self._of_item("response.content_part.done", **at, part=part)
        else:
            told = {"name": item.name, "arguments": item.arguments}
            yield self._of_item("response.function_call_arguments.done", item_id=item.id, **told)
        yield self._of_item("response.output_item.done", item=item)

    def _of_item(self, kind: str, **fields: Any) -> ResponsesEvent:
        return self._event(kind, output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> ResponsesEvent:
        event = ResponsesEvent(type=kind, sequence_number=self._num_events, **fields)
        self._num_events += 1
        return event

    def _finished(self, usage: Usage, metrics: Metrics) -> ResponseObject:
        counted = ResponsesUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(),
            total_tokens=usage.total_tokens,
        )
        cut = IncompleteDetails(reason="max_output_tokens") if self._is_cut else None
        finished = {"usage": counted, "metrics": metrics, "incomplete_details": cut}
        return self._response("incomplete" if self._is_cut else "completed").model_copy(update=finished)

    def _response(self, status: Status) -> ResponseObject:
        plan, body = self._plan, self._body
        asked = body.model_dump(exclude_none=True, by_alias=True)
        return ResponseObject(
            id=plan.api_id,
            created_at=plan.created,
            status=status,
            model=plan.model,
            output=list(self._output),
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls,
            temperature=plan.sampling.temperature,
            top_p=plan.sampling.top_p,
            text=asked.get("text") or {"format": {"type": "text"}},
            tool_choice=asked.get("tool_choice", "auto"),
            tools=asked["tools"],
            user=body.user,
        )


class _Failure(Body):
    type: Literal["error"]
    sequence_number: int
    code: str | None
    message: str
    param: str | None
