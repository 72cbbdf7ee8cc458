"""The one refusal of models, and where every library's own error becomes it. Imports nothing heavy.

Invariant: the message is one line, and says the model's name, what was found and what would follow.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

_NAMED = 3
_REASON_CHARACTERS = 300


class UnsupportedModelError(ValueError):
    """The model cannot be served; the message says why and what would work."""


@contextmanager
def refusing(name: str, failure: str) -> Iterator[None]:
    """What a library raises inside, in whatever class and words this version of it has, is a refusal."""
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
