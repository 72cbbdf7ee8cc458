"""Checks that all endpoints share: a request's tenant, model, tokens, route, and the form of its answer."""

import asyncio
import math
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from serving.api.admission import QueueFullError
from serving.api.auth_middleware import TENANT
from serving.api.context import AppContext
from serving.api.errors import ApiError, bad_request, queue_full
from serving.api.output_form import form_of
from serving.api.request_schema import GenerationBody
from serving.api.token_codec import TokenCodec
from serving.capture_mode import CaptureMode
from serving.router import ROUTE_HEADER, choose_route
from serving.structured_output import CompiledGrammar, GrammarError, StructuredOutput
from serving.tenants import Tenant, may_tag

TIMEOUT_HEADER = "X-Request-Timeout"

_INLINE_SIZE = 2048
"""A longer text is tokenised in a thread, because it would delay every other stream."""

T = TypeVar("T")


def tenant_of(request: Request) -> Tenant | None:
    """Whose key the request brought; None: of no tenant."""
    tenant: Tenant | None = getattr(request.state, TENANT, None)
    return tenant


def check_room(context: AppContext, tenant: Tenant | None) -> None:
    """Raises ApiError for a request that could not begin now, however small: an overloaded server must not
    spend time on tokens of prompts that it then refuses. Takes no place."""
    context.require_ready()
    if (quota := context.rate_limits.of(tenant)) is not None:
        quota.check()
    try:
        if tenant is None:
            context.admission.check()
        else:
            context.admission.check(owner=tenant.name, max_concurrent=tenant.max_concurrent)
    except QueueFullError as error:
        raise queue_full(error) from None


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


def route_of(context: AppContext, request: Request, metadata: dict[str, str] | None) -> str | None:
    """None: the prompt decides. Raises ApiError for an invalid name, and for a route that the request's key
    may not tag."""
    tenant = tenant_of(request)
    try:
        name = choose_route(metadata, request.headers.get(ROUTE_HEADER))
    except ValueError as error:
        raise bad_request(str(error), "metadata.route") from None
    if name is None:
        return None if tenant is None else tenant.default_route
    if not may_tag(tenant, name, context.isolated_routes):
        message = f"This key may not tag the route {name!r}; the request was not started."
        raise ApiError(403, message, param="metadata.route")
    return name


def capture_of(
    context: AppContext, api_id: str, body: GenerationBody, route: str | None, tenant: Tenant | None
) -> CaptureMode:
    """How the request is captured, as far as is known when it is admitted."""
    if context.recorder is None:
        return "off"
    return context.recorder.mode_of(api_id, body.store, route, None if tenant is None else tenant.capture)


def timeout_of(request: Request) -> float | None:
    """Seconds that the request gives itself; None: it says nothing. Raises ApiError."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise bad_request(f"{TIMEOUT_HEADER}={given[:20]!r} is no positive number of seconds", TIMEOUT_HEADER)
    return seconds


async def compiled_form(
    context: AppContext, body: GenerationBody, forced: StructuredOutput | None = None
) -> CompiledGrammar | None:
    """`forced`: by the request's `tool_choice`. None: no form is asked for. Raises ApiError for one that
    cannot be compiled."""
    field = "structured_outputs" if body.response_format is None else "response_format"
    try:
        asked = forced or form_of(body.response_format, body.structured_outputs)
        return None if asked is None else await asyncio.to_thread(context.grammars.compile, asked)
    except GrammarError as error:
        field = "tools" if forced is not None else field
        raise bad_request(f"{field}: {error}; the request was not started", field) from None
