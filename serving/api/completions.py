"""`POST /v1/completions`: prompts as text or token ids, continued."""

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.api.answering import DataEvents, respond
from serving.api.choice_extras import ChoiceExtras
from serving.api.choices import ChoiceDelta
from serving.api.context import AppContext
from serving.api.errors import bad_request
from serving.api.incoming import (
    capture_of,
    check_model,
    check_room,
    compiled_form,
    encode,
    naming_codec,
    route_of,
    tenant_of,
    timeout_of,
)
from serving.api.logprobs import completion_logprobs, echoed_logprobs, joined, prompt_logprobs
from serving.api.openapi import GENERATION_ANSWERS
from serving.api.request_plan import RequestPlan, fit_max_tokens, sampling_of
from serving.api.request_schema import CompletionBody
from serving.api.response_schema import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Metrics,
    Usage,
)
from serving.api.token_codec import TokenCodec
from serving.engine.request import SamplingParams, TokenConstraint

DEFAULT_MAX_TOKENS = 16


def completion_routes(context: AppContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", response_model=Completion, responses=GENERATION_ANSWERS)
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        plan = await _planned(context, body, request)
        echoes = await _echoes(context.codec, body, plan.prompts)
        renderer = CompletionRenderer(naming_codec(context, body), plan, echoes)
        return await respond(context, request, plan, renderer)

    return router


async def _planned(context: AppContext, body: CompletionBody, request: Request) -> RequestPlan:
    """Raises ApiError."""
    tenant = tenant_of(request)
    check_room(context, tenant)
    check_model(context, body.model)
    route, timeout_s = route_of(context, request, body.metadata), timeout_of(request)
    prompts = await _prompts(context, body, tenant.max_concurrent if tenant else None)
    constraint = await compiled_form(context, body)
    api_id = f"cmpl-{uuid.uuid4().hex}"
    return RequestPlan(
        api_id=api_id,
        created=int(time.time()),
        model=body.model or context.model_names[0],
        body=body,
        prompts=tuple(tuple(prompt) for prompt in prompts),
        sampling=_sampling(context, body, max(map(len, prompts)), constraint),
        route=route,
        capture=capture_of(context, api_id, body, route, tenant),
        timeout_s=timeout_s,
        key_holder=tenant,
    )


async def _prompts(context: AppContext, body: CompletionBody, max_concurrent: int | None) -> list[list[int]]:
    """Token ids of every prompt. Raises ApiError for one without tokens, and for more than one request may
    ask for: before the first text is tokenised, or as soon as the texts so far have too many tokens."""
    given = _each_prompt(body)
    context.limits.check_generations(len(given), body.n, max_concurrent)
    prompts: list[list[int]] = []
    num_tokens = 0
    for number, prompt in enumerate(given):
        if isinstance(prompt, str):
            prompt = await encode(context.codec, prompt, add_special_tokens=body.add_special_tokens)
        if not prompt:
            name = "prompt" if len(given) == 1 else f"prompt[{number}]"
            raise bad_request(f"{name} has no tokens; there is nothing to complete", "prompt")
        prompts.append(prompt)
        num_tokens += len(prompt)
        context.limits.check_prompt_tokens(num_tokens, body.n, "prompt")
    return prompts


def _each_prompt(body: CompletionBody) -> list[str] | list[list[int]] | list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [item for item in prompt if not isinstance(item, int)]


async def _echoes(
    codec: TokenCodec, body: CompletionBody, prompts: Sequence[Sequence[int]]
) -> list[str] | None:
    """The text that `echo` puts before each prompt's choices: the prompt as given, or its decoding."""
    if not body.echo:
        return None

    def echoes() -> list[str]:
        given = zip(_each_prompt(body), prompts, strict=True)
        return [prompt if isinstance(prompt, str) else codec.decode(tokens) for prompt, tokens in given]

    return await asyncio.to_thread(echoes)


def _sampling(
    context: AppContext, body: CompletionBody, longest: int, constraint: TokenConstraint | None
) -> SamplingParams:
    max_tokens = fit_max_tokens(
        body.max_tokens, DEFAULT_MAX_TOKENS, longest, context.engine.max_seq_len, prompt_field="prompt"
    )
    return sampling_of(context, body, max_tokens, body.logprobs, constraint)


class CompletionRenderer(DataEvents):
    """`echoes`: the text put before each prompt's choices, if any. In a stream it is a chunk of its own, or,
    where it comes with log-probabilities, part of the first one."""

    def __init__(self, codec: TokenCodec, plan: RequestPlan, echoes: list[str] | None) -> None:
        self._codec, self._plan, self._echoes = codec, plan, echoes
        self._echoes_logprobs = echoes is not None and plan.sampling.logprobs is not None
        self._opened: set[int] = set()
        self._extras = ChoiceExtras(plan)

    def opening(self) -> Iterator[Completion]:
        for index in range(0 if self._echoes_logprobs else self._plan.num_choices):
            if echo := self._echo(index):
                choice = CompletionChoice(index=index, text=echo, logprobs=None, finish_reason=None)
                yield self._completion([choice])

    def chunks(self, delta: ChoiceDelta) -> Iterator[Completion]:
        is_first = self._echoes_logprobs and delta.prompt_logprobs is not None
        echo = self._echo(delta.index) if is_first else ""
        yield self._completion([self._choice(delta, echo + delta.text)])

    def closing(self, usage: Usage, metrics: Metrics) -> Iterator[Completion]:
        if self._plan.body.include_usage:
            yield self._completion([]).model_copy(update={"usage": usage, "metrics": metrics})

    def answer(self, choices: list[ChoiceDelta], usage: Usage, metrics: Metrics) -> Completion:
        rendered = [self._choice(delta, self._echo(delta.index) + delta.text) for delta in choices]
        return self._completion(rendered).model_copy(update={"usage": usage, "metrics": metrics})

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        plan = self._plan
        completion = Completion(
            id=plan.api_id, object="text_completion", created=plan.created, model=plan.model, choices=choices
        )
        return completion.model_copy(update={"usage": None}) if plan.body.include_usage else completion

    def _choice(self, delta: ChoiceDelta, text: str) -> CompletionChoice:
        choice = CompletionChoice(
            index=delta.index,
            text=text,
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        extras = self._extras.of(delta)
        if self._plan.body.return_token_ids and delta.index not in self._opened:
            extras["prompt_token_ids"] = list(self._plan.prompt_of(delta.index))
        self._opened.add(delta.index)
        asked, found = self._plan.body.prompt_logprobs, delta.prompt_logprobs
        if asked is not None and found is not None:
            prompt = self._plan.prompt_of(delta.index)
            extras["prompt_logprobs"] = prompt_logprobs(self._codec, prompt, found, asked)
        return choice.model_copy(update=extras)

    def _logprobs(self, delta: ChoiceDelta) -> CompletionLogprobs | None:
        num_top, found = self._plan.sampling.logprobs, delta.prompt_logprobs
        if num_top is None:
            return None
        echo = self._echo(delta.index)
        output = completion_logprobs(self._codec, delta, echo)
        if found is None or not self._echoes_logprobs:
            return output
        prompt = self._plan.prompt_of(delta.index)
        return joined(echoed_logprobs(self._codec, prompt, echo, found, num_top), output)

    def _echo(self, index: int) -> str:
        return "" if self._echoes is None else self._echoes[index // self._plan.body.n]
