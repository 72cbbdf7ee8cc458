"""The tools that a chat may call: the fields of a request, and what `tool_choice` makes of its answer.

Knows no tokenizer and no engine. The model's own template shows tools to the model; what a choice forces, a
grammar enforces (`forced_form`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from serving.api.strict_body import StrictBody
from serving.api.tool_parsing import (
    PARSERS,
    ForcedCallParser,
    ForcedListParser,
    ToolParser,
    ToolParserName,
)
from serving.structured_output import StructuredOutput

MAX_TOOLS = 128

FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]


class Function(StrictBody):
    """`parameters`: a JSON schema; none: the function takes no arguments. `strict` changes nothing: where a
    call is forced, its schema binds."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictBody):
    type: Literal["function"]
    function: Function


class FunctionChoice(StrictBody):
    name: FunctionName


class NamedTool(StrictBody):
    type: Literal["function"]
    function: FunctionChoice


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("by a word")] | Annotated[NamedTool, Tag("by a name")],
    Discriminator(lambda value: "by a name" if isinstance(value, dict | NamedTool) else "by a word"),
]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class CalledFunction(StrictBody):
    name: str
    arguments: str = ""


class ToolCall(StrictBody):
    """A call in an earlier answer, as clients send it back."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


def rendered_call(call: ToolCall) -> dict[str, Any]:
    """As templates expect it: with the arguments as a mapping, where they are one."""
    said = call.function.arguments
    try:
        arguments = json.loads(said) if said else {}
    except (ValueError, RecursionError):
        arguments = said
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def forced_form(
    tools: Sequence[Tool], choice: str | NamedTool | None, *, parallel: bool
) -> StructuredOutput | None:
    """The form of an answer that must be a call; None: nothing is forced."""
    if isinstance(choice, NamedTool):
        named = next(tool.function for tool in tools if tool.function.name == choice.function.name)
        return StructuredOutput("json", json.dumps(_schema_of(named)))
    if choice != "required":
        return None
    definitions: dict[str, Any] = {}
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "parameters": _hoisted(_schema_of(tool.function), f"tool{number}_", definitions),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return StructuredOutput("json", json.dumps({**schema, "$defs": definitions}))


def parser_of(
    choice: str | NamedTool, model_writes: ToolParserName | None
) -> Callable[[], ToolParser] | None:
    """Makes the parser of an answer; None: the answer is text. `model_writes`: the form in which the model
    calls by itself."""
    if isinstance(choice, NamedTool):
        return partial(ForcedCallParser, choice.function.name)
    if choice == "required":
        return ForcedListParser
    return PARSERS[model_writes] if choice == "auto" and model_writes is not None else None


def _schema_of(function: Function) -> dict[str, Any]:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **function.parameters} if function.parameters else nothing


_DEFINITIONS = ("$defs", "definitions")


def _hoisted(schema: Any, prefix: str, definitions: dict[str, Any]) -> Any:
    """The schema as a part of a larger one: its definitions move there, under names of their own."""
    if isinstance(schema, list):
        return [_hoisted(item, prefix, definitions) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _DEFINITIONS and isinstance(value, Mapping):
            for name, definition in value.items():
                definitions[prefix + name] = _hoisted(definition, prefix, definitions)
        elif key == "$ref" and isinstance(value, str) and value.startswith(("#/$defs/", "#/definitions/")):
            moved[key] = f"#/$defs/{prefix}{value.split('/', 2)[2]}"
        else:
            moved[key] = _hoisted(value, prefix, definitions)
    return moved
