"""Adds to the served OpenAPI document which errors there are and in which form each answer comes.

A route declares its own errors; errors of all routes (a missing key, an internal error) are added here, and
the framework's 422, which is never sent, is removed.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serving.api.errors import ErrorBody
from serving.api.keys import KeyRing, realm_of

Answers = dict[int | str, dict[str, Any]]

_DESCRIPTIONS = {
    400: "The request is at fault; `param` names the field.",
    401: "A key is needed.",
    403: "The key may not tag this route.",
    404: "The model does not exist; of an admin call, the route, version or replica.",
    408: "It took longer than `request_timeout_s`, and was cancelled.",
    413: "The body is larger than any that could be answered.",
    429: "Too much waits, or a limit of the key's tenant is reached; `Retry-After` says when to come back.",
    500: "A failure of the server's own.",
    503: "Not ready: loading, draining or stopped. Of an admin call: Redis is away.",
}
_BEARER = {"bearer": {"type": "http", "scheme": "bearer"}}
_NEVER_ANSWERED = ("HTTPValidationError", "ValidationError")


def errors(*statuses: int) -> Answers:
    """Answers that are OpenAI's error object."""
    return {status: {"model": ErrorBody, "description": _DESCRIPTIONS[status]} for status in statuses}


def answers_as(media_type: str) -> Answers:
    """A 200 that is text of this type."""
    return {200: {"content": {media_type: {"schema": {"type": "string"}}}}}


GENERATION_ANSWERS = answers_as("text/event-stream") | errors(400, 403, 404, 408, 413, 429, 503)
"""Answers of generation endpoints: JSON, or events if `stream` is set."""


def describe(app: FastAPI, keys: KeyRing) -> None:
    """Make the app serve this document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            app.openapi_schema = _true_to_the_app(made, keys)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _true_to_the_app(document: dict[str, Any], keys: KeyRing) -> dict[str, Any]:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in _NEVER_ANSWERED:
        schemas.pop(name, None)
    schemas |= _error_schemas()
    document["components"]["securitySchemes"] = _BEARER
    for path, operations in document["paths"].items():
        guarded = keys.asks(realm_of(path))
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"] |= {str(s): _error(s) for s in ((401, 500) if guarded else (500,))}
            if guarded:
                operation["security"] = [{"bearer": []}]
    return document


def _error_schemas() -> dict[str, Any]:
    schema = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs"), ErrorBody.__name__: schema}


def _error(status: int) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{ErrorBody.__name__}"}
    return {"description": _DESCRIPTIONS[status], "content": {"application/json": {"schema": reference}}}
