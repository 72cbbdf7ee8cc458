"""What all bodies of clients have in common: strict types, and refusals that name the field.

Invariant: nothing that changes the output is ignored. A field that is unknown, or known and not supported, is
refused by name unless its value is the neutral one; null means unset everywhere.
"""

import difflib
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from serving.api.unsupported import HARMLESS, NEUTRAL_VALUES


def fault(param: str, message: str) -> PydanticCustomError:
    """A validation error that names the field at fault."""
    return PydanticCustomError("everdraft", message.replace("{", "{{").replace("}", "}}"), {"param": param})


def refuse_broken_text(data: Any) -> None:
    """Refuses half of a surrogate pair, which JSON can escape but no encoding and no tokenizer can hold."""
    rest = [data]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise PydanticCustomError("everdraft", "a text holds half of a surrogate pair") from None


def at_most(num_entries: int) -> BeforeValidator:
    """For mappings: refuses more entries before the first of them is validated."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > num_entries:
            raise ValueError(f"has {len(value)} entries; at most {num_entries} are allowed")
        return value

    return BeforeValidator(check)


class StrictBody(BaseModel):
    """Refuses unknown fields and coerced types; drops nulls and harmless fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_be_ignored(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        return {name: value for name, value in given.items() if not cls._may_drop(name, value)}

    @classmethod
    def _may_drop(cls, name: Any, value: Any) -> bool:
        """Whether the field may be left out. Raises for one that may not and cannot be kept."""
        if name in _names(cls):
            return False
        if name in NEUTRAL_VALUES:
            if any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL_VALUES[name]):
                return True
            raise fault(name, "is not supported yet; the request was not started")
        if name in HARMLESS:
            return True
        close = difflib.get_close_matches(str(name), _names(cls), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise fault(str(name), f"is no field that is known here{hint}; the request was not started")


class RequestBody(StrictBody):
    """A whole body, in which every text is one."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_broken_text(cls, data: Any) -> Any:
        refuse_broken_text(data)
        return data


def _names(body: type[BaseModel]) -> list[str]:
    """Of its fields, as clients write them."""
    return [field.alias or name for name, field in body.model_fields.items()]
