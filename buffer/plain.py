"""Frozen dataclasses to plain data (maps, lists, numbers, strings) and back, checked by type hint.

It knows nothing of bytes or schema versions: that is `codec`. Invariant: `from_plain` returns a value
of exactly the hinted type or raises ValueError; it never guesses, defaults or drops a field.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np


def to_plain(value: Any) -> Any:
    """Nested maps, lists, numbers and strings; tuples become lists, numpy scalars numbers."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def from_plain(hint: Any, value: Any) -> Any:
    """The value of type `hint` that `to_plain` flattened. Raises ValueError for anything else."""
    origin = get_origin(hint)
    if is_dataclass(hint):
        return _dataclass(hint, value)
    if origin is tuple:
        return tuple(from_plain(get_args(hint)[0], item) for item in _expect(list, value))
    if origin is Mapping:
        key_hint, item_hint = get_args(hint)
        pairs = _expect(dict, value).items()
        return {from_plain(key_hint, key): from_plain(item_hint, item) for key, item in pairs}
    if origin in (Union, UnionType):
        (some,) = (arg for arg in get_args(hint) if arg is not NoneType)
        return None if value is None else from_plain(some, value)
    if hint is float and type(value) is int:
        return float(value)
    return _expect(hint, value)


def _dataclass(cls: Any, value: Any) -> Any:
    hints = _hints(cls)
    if _expect(dict, value).keys() != hints.keys():
        raise ValueError(f"{cls.__name__} has fields {sorted(map(str, value))}")
    return cls(**{name: from_plain(hint, value[name]) for name, hint in hints.items()})


@cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _expect(cls: Any, value: Any) -> Any:
    if type(value) is not cls:
        raise ValueError(f"expected {cls.__name__}, found {type(value).__name__}")
    return value
