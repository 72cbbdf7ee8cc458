"""`POST /v1/responses`: OpenAI's newer chat, over the same plan. Answers are not kept."""

import uuid

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError

from serving.api.answering import respond
from serving.api.chat import planned_chat
from serving.api.context import AppContext
from serving.api.errors import ApiError, from_validation
from serving.api.openapi import GENERATION_ANSWERS
from serving.api.responses_answer import ResponseObject, ResponsesRenderer
from serving.api.responses_schema import ResponsesBody, chat_of


def responses_routes(context: AppContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/responses", response_model=ResponseObject, responses=GENERATION_ANSWERS)
    async def create_response(body: ResponsesBody, request: Request) -> Response:
        try:
            chat = chat_of(body)
            plan, new_parser = await planned_chat(context, chat, request, f"resp_{uuid.uuid4().hex}")
        except ValidationError as error:
            raise _of_responses(from_validation(error.errors())) from None
        except ApiError as error:
            raise _of_responses(error) from None
        return await respond(context, request, plan, ResponsesRenderer(plan, body, new_parser))

    return router


_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""A chat's fields, as a client of this endpoint knows them."""


def _of_responses(error: ApiError) -> ApiError:
    said = error.body.error
    name, _, _ = (said.param or "").partition(".")
    param = _NAMES.get(name, said.param)
    return ApiError(error.status, said.message, param=param, code=said.code, headers=error.headers)
