"""Converts tokens to text incrementally: whole characters only, stop strings found and held back.

Knows no HTTP and no engine. Invariant: the text of a sequence of tokens is the same however the tokens were
split over calls; no part of a stop string that ends the text, and no half of a character, is ever released.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from serving.api.token_codec import TokenCodec


@dataclass(frozen=True)
class TextPiece:
    """The text that one call released. Tokens after the one that completed a stop string are not consumed."""

    text: str
    num_consumed: int
    text_offsets: tuple[int, ...]
    """One for each consumed token: characters decoded before it."""
    stop_string: str | None = None
    """The stop string that was found; nothing may follow."""


class StopStrings:
    """Releases text up to the first stop string completed; of those completed together, the longest."""

    def __init__(self, stop_strings: Sequence[str], *, include_in_output: bool = False) -> None:
        self._stops = tuple(stop_strings)
        self._include = include_in_output
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text released, stop string found or None)."""
        self._held += text
        completed = self._first_completed()
        if completed is not None:
            end, start, stop = completed
            released, self._held = self._held[: end if self._include else start], ""
            return released, stop
        keep = self._num_possible_prefix()
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released, None

    def flush(self) -> str:
        """The text ended without a stop string: release what was held back."""
        released, self._held = self._held, ""
        return released

    def _first_completed(self) -> tuple[int, int, str] | None:
        starts = ((self._held.find(stop), stop) for stop in self._stops)
        return min(((at + len(stop), at, stop) for at, stop in starts if at >= 0), default=None)

    def _num_possible_prefix(self) -> int:
        """Length of the longest suffix of the held text with which a stop string could begin."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class TextStream:
    """The text of one generation. `feed` until the tokens end or a stop string is found, then `finish`."""

    def __init__(
        self,
        codec: TokenCodec,
        stop_strings: Sequence[str] = (),
        *,
        include_stop_string: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self._codec, self._skip = codec, skip_special_tokens
        self.stop_ids = frozenset(codec.special_token_ids(stop_strings))
        """Special tokens whose text is a stop string."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = StopStrings(stop_strings, include_in_output=include_stop_string)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self.num_chars = 0
        self.stop_string: str | None = None

    def feed(self, token_ids: Sequence[int]) -> TextPiece:
        """Consume tokens, one by one, until they end or a stop string is complete."""
        released: list[str] = []
        offsets: list[int] = []
        for token_id in token_ids:
            if self.stop_string is not None:
                break
            offsets.append(self.num_chars)
            released.append(self._push(self._utf8.decode(self._bytes(token_id))))
        return TextPiece("".join(released), len(offsets), tuple(offsets), self.stop_string)

    def finish(self) -> str:
        """The generation ended: an incomplete character becomes U+FFFD, held text is released."""
        if self.stop_string is not None:
            return ""
        tail = self._utf8.decode(b"", final=True)
        text = self._release(tail)
        return text if self.stop_string is not None else text + self._stops.flush()

    def _bytes(self, token_id: int) -> bytes:
        shown = not self._skip or token_id in self.stop_ids
        return self._codec.raw_bytes(token_id) if shown else self._codec.text_bytes(token_id)

    def _push(self, text: str) -> str:
        self._num_tokens += 1
        return self._release(text)

    def _release(self, text: str) -> str:
        """Release text; that of the first `min_tokens` tokens cannot stop the generation."""
        self.num_chars += len(text)
        if self._num_tokens < self._min_tokens:
            return text
        released, self.stop_string = self._stops.push(text)
        return released
