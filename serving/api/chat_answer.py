"""How a chat answers: `chat.completion` and its chunks, with the calls of tools that its text holds."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from serving.api.answering import DataEvents
from serving.api.choice_extras import ChoiceExtras
from serving.api.choices import ChoiceDelta
from serving.api.logprobs import chat_logprobs, prompt_logprobs
from serving.api.request_plan import RequestPlan
from serving.api.request_schema import ChatBody
from serving.api.response_schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    FinishReason,
    FunctionChunk,
    Metrics,
    ToolCallChunk,
    Usage,
)
from serving.api.token_codec import TokenCodec
from serving.api.tool_parsing import ParsedText, ToolCallDelta, ToolParser
from serving.api.tools import CalledFunction, NamedTool, ToolCall


class ChatRenderer(DataEvents):
    """`new_parser` finds the calls of tools in an answer's text; None: there are none to find."""

    def __init__(
        self,
        codec: TokenCodec,
        plan: RequestPlan,
        body: ChatBody,
        new_parser: Callable[[], ToolParser] | None,
    ) -> None:
        self._codec, self._plan, self._body = codec, plan, body
        self._extras = ChoiceExtras(plan)
        self._parsers = None if new_parser is None else [new_parser() for _ in range(plan.num_choices)]

    def opening(self) -> Iterator[ChatChunk]:
        """A chunk with the role, before any text, for every choice."""
        for index in range(self._plan.num_choices):
            delta = ChatDelta(role="assistant", content="")
            choice = ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)
            chunk = self._chunk([choice])
            yield chunk.model_copy(update=self._prompt_token_ids()) if index == 0 else chunk

    def chunks(self, delta: ChoiceDelta) -> Iterator[ChatChunk]:
        """None where all that came is held back, because it may belong to a call."""
        said, extras, logprobs = self._read(delta), self._extras.of(delta), self._logprobs(delta)
        if not (said.content or said.calls or delta.finish_reason or extras or logprobs):
            return
        told: dict[str, Any] = {"content": said.content} if said.content else {}
        if said.calls:
            told["tool_calls"] = [_chunk_of(call) for call in said.calls]
        choice = ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(**told),
            logprobs=logprobs,
            finish_reason=self._finish_reason(delta),
            stop_reason=delta.stop_reason,
        )
        yield self._chunk([choice.model_copy(update=extras)])

    def closing(self, usage: Usage, metrics: Metrics) -> Iterator[ChatChunk]:
        if self._plan.body.include_usage:
            yield self._chunk([]).model_copy(update={"usage": usage, "metrics": metrics})

    def answer(self, choices: list[ChoiceDelta], usage: Usage, metrics: Metrics) -> ChatCompletion:
        plan = self._plan
        completion = ChatCompletion(
            id=plan.api_id,
            object="chat.completion",
            created=plan.created,
            model=plan.model,
            choices=[self._choice(delta) for delta in choices],
            usage=usage,
            metrics=metrics,
        )
        return completion.model_copy(update=self._prompt_token_ids() | self._prompt_logprobs(choices[0]))

    def _choice(self, delta: ChoiceDelta) -> ChatChoice:
        said = self._read(delta)
        message = AssistantMessage(role="assistant", content=said.content, refusal=None)
        if said.calls:
            calls = {"content": said.content or None, "tool_calls": _whole_calls(said.calls)}
            message = message.model_copy(update=calls)
        choice = ChatChoice(
            index=delta.index,
            message=message,
            logprobs=self._logprobs(delta),
            finish_reason=self._finish_reason(delta),
            stop_reason=delta.stop_reason,
        )
        return choice.model_copy(update=self._extras.of(delta))

    def _read(self, delta: ChoiceDelta) -> ParsedText:
        if self._parsers is None:
            return ParsedText(delta.text)
        parser = self._parsers[delta.index]
        said = parser.feed(delta.text)
        if delta.generation is not None:
            said += parser.finish()
        if not self._body.parallel_tool_calls:
            said = ParsedText(said.content, tuple(call for call in said.calls if call.index == 0))
        return said

    def _finish_reason(self, delta: ChoiceDelta) -> FinishReason | None:
        """As OpenAI has it: a call that the request itself named ends with `stop`."""
        named = isinstance(self._body.tool_choice, NamedTool)
        if delta.finish_reason != "stop" or self._parsers is None or named:
            return delta.finish_reason
        return "tool_calls" if self._parsers[delta.index].num_calls else "stop"

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        plan = self._plan
        chunk = ChatChunk(
            id=plan.api_id,
            object="chat.completion.chunk",
            created=plan.created,
            model=plan.model,
            choices=choices,
        )
        return chunk.model_copy(update={"usage": None}) if plan.body.include_usage else chunk

    def _logprobs(self, delta: ChoiceDelta) -> ChatLogprobs | None:
        return None if self._plan.sampling.logprobs is None else chat_logprobs(self._codec, delta)

    def _prompt_logprobs(self, delta: ChoiceDelta) -> dict[str, object]:
        asked, found = self._plan.body.prompt_logprobs, delta.prompt_logprobs
        if asked is None or found is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(self._codec, self._plan.prompts[0], found, asked)}

    def _prompt_token_ids(self) -> dict[str, object]:
        return {"prompt_token_ids": list(self._plan.prompts[0])} if self._plan.body.return_token_ids else {}


def _chunk_of(call: ToolCallDelta) -> ToolCallChunk:
    if call.name is None:
        return ToolCallChunk(index=call.index, function=FunctionChunk(arguments=call.arguments))
    function = FunctionChunk(name=call.name, arguments=call.arguments)
    return ToolCallChunk(index=call.index, id=call.id, type="function", function=function)


def _whole_calls(deltas: Sequence[ToolCallDelta]) -> list[ToolCall]:
    by_index: dict[int, list[ToolCallDelta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    return [
        ToolCall(
            id=pieces[0].id or "",
            type="function",
            function=CalledFunction(
                name=pieces[0].name or "", arguments="".join(piece.arguments for piece in pieces)
            ),
        )
        for pieces in by_index.values()
    ]
