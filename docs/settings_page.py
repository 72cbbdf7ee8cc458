"""The settings: a table for each section of the settings tree, from the models and their docstrings."""

import inspect
from collections.abc import Iterator
from typing import cast, get_args

from pydantic import BaseModel

from deploy.settings import Settings
from deploy.settings_source import ENV_PREFIX
from docs.tables import Schema, fields, table


def settings_lines() -> Iterator[str]:
    """A table a section, in the order of the settings tree."""
    schema = Settings.model_json_schema()
    for section, field in Settings.model_fields.items():
        model = cast(type[BaseModel], field.annotation)
        yield f"## `{section}`\n\n{inspect.cleandoc(model.__doc__ or '')}\n"
        rows = _settings_rows(section, model, schema["$defs"])
        yield from table(("setting and environment variable", "type", "default", "meaning"), rows)
        for name, entry in _lists_of_entries(model):
            yield f"### An entry of `{section}.{name}`\n\n{inspect.cleandoc(entry.__doc__ or '')}\n"
            entries = fields(entry, schema["$defs"][entry.__name__], schema["$defs"])
            yield from table(
                ("field", "type", "default", "meaning"),
                ((f"`{field}`", shape, default, said) for field, said, shape, default in entries),
            )


def _lists_of_entries(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Fields that are tuples of a model, and that model."""
    for name, field in model.model_fields.items():
        for item in get_args(field.annotation):
            if isinstance(item, type) and issubclass(item, BaseModel):
                yield name, item


def _settings_rows(section: str, model: type[BaseModel], definitions: Schema) -> Iterator[tuple[str, ...]]:
    for name, said, shape, default in fields(model, definitions[model.__name__], definitions):
        variable = f"{ENV_PREFIX}{section}__{name}".upper()
        yield f"`{section}.{name}`<br>`{variable}`", shape, default, said
