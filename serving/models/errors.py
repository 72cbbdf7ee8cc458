"""UnsupportedModelError, and the conversion of libraries' errors into it. Imports nothing heavy.

Invariant: the message is one line, with the model's name, the fault and its consequence.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

_NAMED = 3
_REASON_CHARACTERS = 300


class UnsupportedModelError(ValueError):
    """The model cannot be served; the message says why and what would work."""


@contextmanager
def refusing(name: str, failure: str) -> Iterator[None]:
    """Turns whatever a library raises inside into UnsupportedModelError."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:_REASON_CHARACTERS] or type(error).__name__
        raise UnsupportedModelError(f"model {name!r} {failure}: {reason}") from error


def first_few(names: Collection[str]) -> str:
    """The first of them in order, and how many are left out."""
    shown = ", ".join(repr(name) for name in sorted(names)[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown
