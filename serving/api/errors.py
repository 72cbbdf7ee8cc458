"""Every error of the API as OpenAI's object. No message has a path, a traceback or data of another request.

ApiError is raised by handlers before the headers are sent; afterwards its body goes as a stream event.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from buffer.errors import OrderRefusedError, StoreUnavailableError, UnknownNameError, UnknownVersionError
from serving.api.admission import QueueFullError


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_CODES = {401: "invalid_api_key", 403: "route_not_allowed", 429: "rate_limit_exceeded"}


class ApiError(Exception):
    """An answer that is an error. `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        detail = ErrorDetail(message=message, type=kind, param=param, code=code or _CODES.get(status))
        self.body = ErrorBody(error=detail)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body.model_dump(), self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def internal_error() -> ApiError:
    return ApiError(500, "The server failed to process the request; see its log under the request id.")


def queue_full(error: QueueFullError) -> ApiError:
    return ApiError(429, str(error), headers={"Retry-After": str(error.retry_after_s)})


def from_value_error(error: ValueError) -> ApiError:
    """A refusal whose message begins with the name of the field, as the engine's do."""
    message = str(error)
    name = message.replace("=", " ").partition(" ")[0]
    return bad_request(message, name if name.isidentifier() else None)


def from_validation(faults: Sequence[Any]) -> ApiError:
    """The first fault of a body, naming its field."""
    fault = faults[0]
    if fault["type"] == "json_invalid":
        return bad_request("The body is not valid JSON.")
    named = (fault.get("ctx") or {}).get("param")
    location = [part for number, part in enumerate(fault["loc"]) if number or part not in _PLACES]
    param = _field_name([*location, named] if named else location)
    message = str(fault["msg"]).removeprefix("Value error, ")
    if location and not named and fault["type"] not in _CLEAR_FAULTS:
        message = _SHAPES.get(str(location[0]), message)
    return bad_request(f"{param}: {message}" if param else message, param)


_PLACES = ("body", "path", "query")
"""Where a field was given; it is named without it."""
_SHAPES = {
    "prompt": "must be a text, a list of texts, a list of token ids, or a list of lists of token ids",
    "stop": "must be a text of 1 to 1024 characters, or a list of at most 16 of them",
}
"""Fields of several types: an error about one of the types would mislead."""
_CLEAR_FAULTS = {"too_long", "string_too_long"}


def _field_name(location: Sequence[str | int]) -> str | None:
    """`messages[0].role`; names of union branches are left out."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part not in {"str", "int", "list"}:
            name += f".{part}" if name else part
    return name or None


_SEAM_STATUSES: dict[type[Exception], int] = {
    OrderRefusedError: 400,
    UnknownNameError: 404,
    UnknownVersionError: 404,
    StoreUnavailableError: 503,
}


def from_seam(error: Exception) -> ApiError:
    """What admin operations raise. Messages begin with the field at fault, but for versions."""
    message = str(error)
    name = "version" if isinstance(error, UnknownVersionError) else message.partition("=")[0]
    return ApiError(_SEAM_STATUSES[type(error)], message, param=name if name.isidentifier() else None)


def install_error_handlers(app: FastAPI) -> None:
    """404, 405 and 422 of the framework become OpenAI objects too."""

    async def on_api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response()

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = {
            404: f"{request.method} {request.url.path} does not exist.",
            405: f"{request.method} is not allowed on {request.url.path}.",
        }.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def on_seam(_: Request, error: Exception) -> JSONResponse:
        return from_seam(error).response()

    for kind in _SEAM_STATUSES:
        app.add_exception_handler(kind, on_seam)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
