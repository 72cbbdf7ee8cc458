"""Checks that all endpoints share: a request's model, its tokens, its route."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from serving.api.context import AppContext
from serving.api.errors import ApiError, bad_request
from serving.api.request_schema import GenerationBody
from serving.api.token_codec import TokenCodec
from serving.router import ROUTE_HEADER, choose_route

_INLINE_SIZE = 2048
"""A longer text is tokenised in a thread, because it would delay every other stream."""

T = TypeVar("T")


def check_model(context: AppContext, name: str | None) -> None:
    """A request without a name means the served model. Raises ApiError for any other name."""
    if name is not None and name not in context.model_names:
        served = ", ".join(map(repr, context.model_names))
        message = f"The model {name!r} does not exist; this server has {served}."
        raise ApiError(404, message, param="model", code="model_not_found")


def naming_codec(context: AppContext, body: GenerationBody) -> TokenCodec:
    """The codec that calls tokens as the request asks."""
    return context.codec.naming_ids() if body.return_tokens_as_token_ids else context.codec


async def encode(codec: TokenCodec, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text; long ones off the event loop."""
    return await off_loop(lambda: codec.encode(text, add_special_tokens=add_special_tokens), len(text))


async def off_loop(work: Callable[[], T], size: int) -> T:
    """Run work of a large `size` (in characters or tokens) in a thread, other work at once."""
    return work() if size <= _INLINE_SIZE else await asyncio.to_thread(work)


def route_of(request: Request, metadata: dict[str, str] | None) -> str | None:
    """None: the request names no route. Raises ApiError for an invalid name."""
    try:
        return choose_route(metadata, request.headers.get(ROUTE_HEADER))
    except ValueError as error:
        raise bad_request(str(error), "metadata.route") from None
