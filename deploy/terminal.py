"""The console that commands speak through: text is shown as it is, and never obeyed.

Reasons, routes, model names and errors come from outside: brackets in them are no markup, colons no emoji,
and control characters, with which a text could rewrite the screen, are shown as symbols. Invariant: a str
is one line, in a table's cell too; whoever means several prints several, or joins them with `lines`.
Styles of our own are given as rich's `Text`, whose parts go through `visible` where they are not ours.
"""

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_OBEYED = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal acts on, what reverses the direction of a text, and what cannot be encoded."""
_DELETE = 0x7F


def visible(text: str) -> str:
    """`text` as one line that no terminal obeys: \N{SYMBOL FOR ESCAPE} for the escape character."""
    return _OBEYED.sub(_symbol, text)


def lines(texts: Iterable[str]) -> Text:
    """Several lines of plain text, for one cell or caption."""
    return Text("\n".join(map(visible, texts)))


class Terminal(Console):
    """Rich's console without markup, emoji and highlighting. Lines keep their length, so that what is shown
    can be copied."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """A last look at everything, a Text made by hand included; only our own newlines are left."""
        for segment in super().render(renderable, options):
            if segment.control or not _OBEYED.search(segment.text):
                yield segment
            else:
                parts = segment.text.split("\n")
                yield segment._replace(text="\n".join(map(visible, parts)))


def _symbol(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\N{SYMBOL FOR DELETE}" if code == _DELETE else "\N{REPLACEMENT CHARACTER}"
