"""`POST /v1/chat/completions`: messages through the model's own chat template, answered."""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.api.answering import respond
from serving.api.chat_answer import ChatRenderer
from serving.api.context import AppContext
from serving.api.errors import bad_request
from serving.api.incoming import (
    capture_of,
    check_model,
    check_room,
    compiled_form,
    naming_codec,
    route_of,
    tenant_of,
    timeout_of,
)
from serving.api.messages import ChatMessage
from serving.api.openapi import GENERATION_ANSWERS
from serving.api.request_plan import RequestPlan, fit_max_tokens, sampling_of
from serving.api.request_schema import ChatBody
from serving.api.response_schema import ChatCompletion
from serving.api.token_codec import TokenCodec
from serving.api.tool_parsing import ToolParser
from serving.api.tools import forced_form, parser_of, rendered_call
from serving.engine.request import SamplingParams, TokenConstraint
from serving.structured_output import StructuredOutput


def chat_routes(context: AppContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=GENERATION_ANSWERS)
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        plan, new_parser = await planned_chat(context, body, request, f"chatcmpl-{uuid.uuid4().hex}")
        renderer = ChatRenderer(naming_codec(context, body), plan, body, new_parser)
        return await respond(context, request, plan, renderer)

    return router


async def planned_chat(
    context: AppContext, body: ChatBody, request: Request, api_id: str
) -> tuple[RequestPlan, Callable[[], ToolParser] | None]:
    """(what to generate, what finds calls of tools in it). Raises ApiError."""
    tenant = tenant_of(request)
    check_room(context, tenant)
    check_model(context, body.model)
    context.limits.check_generations(1, body.n, tenant.max_concurrent if tenant else None)
    route, timeout_s = route_of(context, request, body.metadata), timeout_of(request)
    asked = tools_asked(context, body)
    prompt = await chat_token_ids(
        context.codec,
        body.messages,
        body.add_generation_prompt,
        {**asked.template_arguments, **body.chat_template_kwargs},
        continue_final_message=body.continue_final_message,
    )
    context.limits.check_prompt_tokens(len(prompt), body.n, "messages")
    constraint = await compiled_form(context, body, asked.forced)
    plan = RequestPlan(
        api_id=api_id,
        created=int(time.time()),
        model=body.model or context.model_names[0],
        body=body,
        prompts=(tuple(prompt),),
        sampling=_sampling(context, body, len(prompt), constraint),
        route=route,
        capture=capture_of(context, api_id, body, route, tenant),
        timeout_s=timeout_s,
        key_holder=tenant,
    )
    return plan, asked.new_parser


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


@dataclass(frozen=True)
class ToolsAsked:
    """What a request's tools and `tool_choice` ask of its prompt and of its answer."""

    template_arguments: dict[str, Any]
    forced: StructuredOutput | None
    new_parser: Callable[[], ToolParser] | None
    """None: the answer is text."""


def tools_asked(context: AppContext, body: ChatBody) -> ToolsAsked:
    """Raises ApiError where the model cannot be shown tools, or its calls cannot be read."""
    choice = body.choice_of_tools
    if choice == "none":
        return ToolsAsked({}, None, None)
    if "tools" not in context.codec.chat_template:
        raise bad_request(
            "tools: this model's chat template takes no tools, so that it would never see them", "tools"
        )
    if choice == "auto" and context.tool_parser is None:
        raise bad_request(
            "tool_choice: how this model writes a call is not known here, so that tool_choice auto could not "
            "find one; use required, or name a tool (the server's setting serving.tool_call_parser says how)",
            "tool_choice",
        )
    try:
        forced = forced_form(body.tools, choice, parallel=body.parallel_tool_calls)
    except RecursionError:
        raise bad_request(
            "tools: a schema is nested too deeply; the request was not started", "tools"
        ) from None
    shown = [tool.model_dump(exclude_none=True) for tool in body.tools]
    return ToolsAsked({"tools": shown}, forced, parser_of(choice, context.tool_parser))


def _plain(message: ChatMessage) -> dict[str, Any]:
    """A message in the form that templates expect; `developer` is OpenAI's newer name for `system`,
    `function` its older one for `tool`."""
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    names = ("reasoning_content", "reasoning", "name", "tool_call_id")
    named = {name: getattr(message, name) for name in names}
    kept: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    if message.tool_calls:
        kept["tool_calls"] = [rendered_call(call) for call in message.tool_calls]
    return {"role": role, "content": message.text, **kept}


def _sampling(
    context: AppContext, body: ChatBody, prompt_len: int, constraint: TokenConstraint | None
) -> SamplingParams:
    max_tokens = fit_max_tokens(
        body.token_limit, None, prompt_len, context.engine.max_seq_len, prompt_field="messages"
    )
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    return sampling_of(context, body, max_tokens, num_top, constraint)
