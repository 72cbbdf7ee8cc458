"""The API: endpoints, statuses and bodies, from the app's OpenAPI document and the models of its bodies."""

import inspect
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import cast

from pydantic import BaseModel

from docs.tables import Schema, attribute_docstrings, fields, spans, table
from serving.api import (
    admin_schema,
    messages,
    output_form,
    request_schema,
    response_schema,
    responses_answer,
    responses_schema,
    tools,
    unsupported,
)
from serving.api.app import create_app
from serving.api.context import AppContext
from serving.api.keys import KeyRing
from serving.api.strict_body import StrictBody


def api_lines() -> Iterator[str]:
    """Endpoints, then the bodies that clients send and get, then those of operators."""
    document = _openapi_document()
    yield "## Endpoints\n"
    yield from table(("endpoint", "key", "answers"), _endpoint_rows(document["paths"]))
    yield "## Statuses\n"
    yield from table(("status", "meaning"), _status_rows(document["paths"]))
    yield "## What clients send\n"
    for module in (messages, request_schema, tools, output_form, responses_schema):
        yield from _bodies(module, StrictBody)
    yield "## Fields that are not acted on\n"
    yield "These fields are refused with 400, except for the values given, which ask for nothing.\n"
    yield from table(("field", "accepted values"), _neutral_rows())
    yield f"These fields change no token and are ignored: {spans(sorted(unsupported.HARMLESS))}.\n"
    yield "## What clients get\n"
    for module in (response_schema, responses_answer):
        yield from _bodies(module, response_schema.Body)
    yield "## What operators send\n"
    yield from _bodies(admin_schema, StrictBody)
    yield "## What operators get\n"
    yield from _bodies(admin_schema, response_schema.Body)


def _openapi_document() -> Schema:
    """Of an endpoint with keys, from the app itself: its routes are made without being called."""
    keys = KeyRing(("a-client-key",), "an-admin-key")
    return create_app(
        cast(
            AppContext,
            SimpleNamespace(
                version="unreleased", keys=keys, limits=None, allowed_origins=(), refused_calls=None
            ),
        )
    ).openapi()


def _endpoint_rows(paths: Schema) -> Iterator[tuple[str, ...]]:
    for path, operations in paths.items():
        for method, operation in operations.items():
            key = (
                "none"
                if not operation.get("security")
                else "admin"
                if path.startswith("/admin")
                else "client"
            )
            yield f"`{method.upper()} {path}`", key, ", ".join(sorted(operation["responses"]))


def _status_rows(paths: Schema) -> Iterator[tuple[str, ...]]:
    described = {
        status: answer["description"]
        for operations in paths.values()
        for operation in operations.values()
        for status, answer in operation["responses"].items()
        if status != "200"
    }
    return ((f"`{status}`", described[status]) for status in sorted(described))


def _bodies(module: ModuleType, base: type[BaseModel]) -> Iterator[str]:
    """A table for every body of the module, in the order of its file; inherited fields are the parent's."""
    for model in vars(module).values():
        is_body = inspect.isclass(model) and issubclass(model, base) and model.__module__ == module.__name__
        if is_body and attribute_docstrings(model).keys() - {"model_config"}:
            yield "\n\n".join(filter(None, (f"### `{model.__name__}`", _about(model)))) + "\n"
            schema = model.model_json_schema()
            definitions = schema.get("$defs", {}) | {model.__name__: schema}
            rows = fields(model, schema, definitions)
            yield from table(
                ("field", "type", "default", "meaning"), ((f"`{n}`", s, d, said) for n, said, s, d in rows)
            )


def _about(model: type[BaseModel]) -> str:
    own = " ".join((model.__dict__.get("__doc__") or "").split())
    parents = [base for base in model.__bases__ if attribute_docstrings(base)]
    also = f"It has the fields of {spans(base.__name__ for base in parents)} too." if parents else ""
    return f"{own} {also}".strip()


def _neutral_rows() -> Iterator[tuple[str, ...]]:
    for name, values in unsupported.NEUTRAL_VALUES.items():
        yield f"`{name}`", spans(dict.fromkeys(repr(value) for value in values)) or "none"
