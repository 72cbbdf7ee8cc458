"""`POST /v1/chat/completions`: messages through the model's own chat template, answered."""

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.api.answering import respond
from serving.api.choice_extras import ChoiceExtras
from serving.api.choices import ChoiceDelta
from serving.api.context import AppContext
from serving.api.errors import bad_request
from serving.api.incoming import check_model, naming_codec, route_of
from serving.api.logprobs import chat_logprobs
from serving.api.messages import ChatMessage
from serving.api.openapi import GENERATION_ANSWERS
from serving.api.request_plan import RequestPlan, fit_max_tokens, sampling_of
from serving.api.request_schema import ChatBody
from serving.api.response_schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Metrics,
    Usage,
)
from serving.api.token_codec import TokenCodec


def chat_routes(context: AppContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=GENERATION_ANSWERS)
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        check_model(context, body.model)
        context.limits.check_generations(1, body.n)
        prompt = await chat_token_ids(
            context.codec,
            body.messages,
            body.add_generation_prompt,
            body.chat_template_kwargs,
            continue_final_message=body.continue_final_message,
        )
        context.limits.check_prompt_tokens(len(prompt), body.n, "messages")
        plan = _plan(context, body, request, prompt)
        return await respond(context, request, plan, ChatRenderer(naming_codec(context, body), plan))

    return router


async def chat_token_ids(
    codec: TokenCodec,
    messages: Sequence[ChatMessage],
    add_generation_prompt: bool,
    template_arguments: dict[str, Any],
    *,
    continue_final_message: bool = False,
) -> list[int]:
    """The prompt that the chat template makes. Raises ApiError: no template, or it refuses the messages."""
    if not codec.has_chat_template:
        raise bad_request("This model has no chat template; use /v1/completions.", "messages")
    plain = [_plain(message) for message in messages]

    render = partial(
        codec.chat_token_ids,
        plain,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )
    try:
        tokens = await asyncio.to_thread(render, **template_arguments)
    except Exception as error:
        # Templates are programs: whatever they raise, the messages did not fit. Only messages that the
        # template itself raises on purpose are passed on, and why a message cannot be continued.
        on_purpose = type(error).__module__.startswith("jinja2") or (
            continue_final_message and isinstance(error, ValueError)
        )
        reason = f": {error}" if on_purpose else ""
        raise bad_request(f"The chat template refuses the messages{reason}", "messages") from None
    if not tokens:
        raise bad_request("The chat template made an empty prompt of the messages.", "messages")
    return tokens


def _plain(message: ChatMessage) -> dict[str, str]:
    """A message in the form that templates expect; `developer` is OpenAI's newer name for `system`,
    `function` its older one for `tool`."""
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    names = ("reasoning_content", "reasoning", "name", "tool_call_id")
    named = {name: getattr(message, name) for name in names}
    kept = {key: value for key, value in named.items() if value is not None}
    return {"role": role, "content": message.text, **kept}


def _plan(context: AppContext, body: ChatBody, request: Request, prompt: list[int]) -> RequestPlan:
    max_tokens = fit_max_tokens(
        body.token_limit, None, len(prompt), context.engine.max_seq_len, prompt_field="messages"
    )
    api_id = f"chatcmpl-{uuid.uuid4().hex}"
    return RequestPlan(
        api_id=api_id,
        created=int(time.time()),
        model=body.model or context.model_names[0],
        body=body,
        prompts=(tuple(prompt),),
        sampling=sampling_of(context, body, max_tokens, (body.top_logprobs or 0) if body.logprobs else None),
        route=route_of(request, body.metadata),
        capture=context.recorder is not None and context.recorder.wants(api_id, body.store),
    )


class ChatRenderer:
    """`chat.completion` and its chunks."""

    def __init__(self, codec: TokenCodec, plan: RequestPlan) -> None:
        self._codec, self._plan = codec, plan
        self._extras = ChoiceExtras(plan)

    def opening(self) -> Iterator[ChatChunk]:
        """A chunk with the role, before any text, for every choice."""
        for index in range(self._plan.num_choices):
            delta = ChatDelta(role="assistant", content="")
            choice = ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)
            chunk = self._chunk([choice])
            yield chunk.model_copy(update=self._prompt_token_ids()) if index == 0 else chunk

    def chunk(self, delta: ChoiceDelta) -> ChatChunk:
        choice = ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(content=delta.text) if delta.text else ChatDelta(),
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        return self._chunk([choice.model_copy(update=self._extras.of(delta))])

    def closing(self, usage: Usage, metrics: Metrics) -> ChatChunk:
        return self._chunk([]).model_copy(update={"usage": usage, "metrics": metrics})

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
        return completion.model_copy(update=self._prompt_token_ids())

    def _choice(self, delta: ChoiceDelta) -> ChatChoice:
        choice = ChatChoice(
            index=delta.index,
            message=AssistantMessage(role="assistant", content=delta.text, refusal=None),
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        return choice.model_copy(update=self._extras.of(delta))

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

    def _prompt_token_ids(self) -> dict[str, object]:
        return {"prompt_token_ids": list(self._plan.prompts[0])} if self._plan.body.return_token_ids else {}
