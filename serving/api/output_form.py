"""The fields with which a request asks for structured output: OpenAI's `response_format`, and vLLM's
`structured_outputs`.

Says what is asked for; whether it can be compiled is found out when it is.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from serving.api.strict_body import StrictBody, fault
from serving.structured_output import GrammarError, StructuredOutput, any_object

MAX_GRAMMAR_CHARS = 65_536
MAX_CHOICES_ASKED = 1_024

Schema = dict[str, Any] | bool
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


class NamedSchema(StrictBody):
    """OpenAI's `json_schema`. `name`, `description` and `strict` change nothing: a schema always binds."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class PlainFormat(StrictBody):
    type: Literal["text", "json_object"]


class SchemaFormat(StrictBody):
    type: Literal["json_schema"]
    json_schema: NamedSchema


def _format_kind(value: Any) -> str:
    is_schema = isinstance(value, dict) and value.get("type") == "json_schema"
    return "with a schema" if is_schema or isinstance(value, SchemaFormat) else "by a word"


ResponseFormat = Annotated[
    Annotated[PlainFormat, Tag("by a word")] | Annotated[SchemaFormat, Tag("with a schema")],
    Discriminator(_format_kind),
]


class StructuredOutputs(StrictBody):
    """vLLM's; exactly one form. `json` is a schema, or the text of one."""

    json_: Schema | GrammarText | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: GrammarText | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES_ASKED, fail_fast=True)] | None = (
        None
    )
    grammar: GrammarText | None = None
    disable_any_whitespace: bool = False

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        forms = {
            "json": self.json_ is not None,
            "json_object": bool(self.json_object),
            "regex": self.regex is not None,
            "choice": self.choice is not None,
            "grammar": self.grammar is not None,
        }
        given = [name for name, is_given in forms.items() if is_given]
        if len(given) != 1:
            named = " and ".join(given) or "no form"
            raise ValueError(f"names {named}; one of {', '.join(forms)} is needed, and no more")
        if self.choice is not None and "" in self.choice:
            raise fault("choice", "holds an empty text, which no answer can be")
        return self


def form_of(
    response_format: PlainFormat | SchemaFormat | None, structured_outputs: StructuredOutputs | None
) -> StructuredOutput | None:
    """Raises GrammarError for a schema that is nested too deeply or too large."""
    if isinstance(response_format, SchemaFormat):
        return _of_schema(response_format.json_schema.schema_)
    if response_format is not None:
        return any_object() if response_format.type == "json_object" else None
    if structured_outputs is None:
        return None
    asked, spaces = structured_outputs, not structured_outputs.disable_any_whitespace
    if asked.json_ is not None:
        return _of_schema(asked.json_, spaces=spaces)
    if asked.choice is not None:
        return StructuredOutput("choice", json.dumps(asked.choice))
    if asked.regex is not None:
        return StructuredOutput("regex", asked.regex)
    if asked.grammar is not None:
        return StructuredOutput("grammar", asked.grammar)
    return any_object(spaces=spaces)


def _of_schema(schema: Schema | str, *, spaces: bool = True) -> StructuredOutput:
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None
    if len(text) > MAX_GRAMMAR_CHARS:
        raise GrammarError(f"the schema has {len(text)} characters; at most {MAX_GRAMMAR_CHARS} are compiled")
    return StructuredOutput("json", text, spaces)
