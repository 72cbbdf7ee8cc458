"""Tables of the generated pages, and the rows that the fields of a pydantic model make."""

import ast
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, cast

from pydantic import BaseModel

Schema = dict[str, Any]


def spans(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for row in rows:
        cells = (cell.replace("|", "\\|") for cell in row)
        yield f"| {' | '.join(cells)} |"
    yield ""


def fields(model: type[BaseModel], schema: Schema, definitions: Schema) -> Iterator[tuple[str, ...]]:
    """(name, docstring, type, default) of the fields that the class itself declares, in its order."""
    said = attribute_docstrings(model)
    for attribute in said:
        name = model.model_fields[attribute].alias or attribute
        about = schema["properties"][name]
        required = name in schema.get("required", ())
        yield name, said[attribute], _shape(about, definitions), "required" if required else _default(about)


def attribute_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Every field of the class's own body, and the text under it, empty where there is none."""
    [definition] = ast.parse(inspect.getsource(model)).body
    body = cast(ast.ClassDef, definition).body
    said: dict[str, str] = {}
    for statement, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            said[statement.target.id] = _text_of(below)
    return said


def _text_of(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return " ".join(str(statement.value.value).split())
    return ""


def _shape(schema: Schema, definitions: Schema) -> str:
    """A type in words, with its bounds: `integer (at least 1)`."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        is_body = "properties" in definitions[name]
        return f"`{name}`" if is_body else _shape(definitions[name], definitions)
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(dict.fromkeys(_shape(choice, definitions) for choice in choices))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    json_type: str = schema.get("type", "any")
    kind = _KINDS.get(json_type, json_type)
    if schema.get("items"):
        kind += f" of {_shape(schema['items'], definitions)}"
    bounds = [words.format(schema[key]) for key, words in _BOUNDS.items() if key in schema]
    return f"{kind} ({', '.join(bounds)})" if bounds else kind


_KINDS = {"string": "text", "array": "list", "object": "map", "boolean": "true or false"}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "minLength": "length at least {}",
    "maxLength": "length at most {}",
    "minItems": "entries at least {}",
    "maxItems": "entries at most {}",
}


def _default(schema: Schema) -> str:
    if "default" not in schema:
        return "empty"
    value = schema["default"]
    words = {None: "none", True: "true", False: "false"} if value is None or isinstance(value, bool) else {}
    return words[value] if words else f"`{value}`" if value not in ("", []) else "empty"
