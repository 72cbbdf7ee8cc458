"""One choice of an answer: the engine's token events to deltas of text, tokens and log-probabilities.

Knows no HTTP. Invariant: joining the deltas of a choice gives the same result however its tokens were split
into events.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from serving.api.errors import ApiError, internal_error
from serving.api.response_schema import FinishReason
from serving.api.text_stream import TextStream
from serving.engine.request import Generation, TokenEvent, TopLogprobs


@dataclass(frozen=True)
class ChoiceDelta:
    """The part of a choice that became final. `generation` and `finish_reason` are set on the last one
    only."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    text_offsets: tuple[int, ...] = ()
    generation: Generation | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @staticmethod
    def join(deltas: Sequence["ChoiceDelta"]) -> "ChoiceDelta":
        """Consecutive deltas of one choice (at least one) as a single delta."""
        last = deltas[-1]
        return ChoiceDelta(
            index=last.index,
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(i for delta in deltas for i in delta.token_ids),
            logprobs=tuple(value for delta in deltas for value in delta.logprobs),
            top_logprobs=tuple(entry for delta in deltas for entry in delta.top_logprobs),
            text_offsets=tuple(offset for delta in deltas for offset in delta.text_offsets),
            generation=last.generation,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
        )


class ChoiceState:
    """Consumes the events of one generation in order."""

    def __init__(self, index: int, stream: TextStream, *, include_stop: bool = False) -> None:
        self.index = index
        self._stream = stream
        self._include_stop = include_stop
        self.num_tokens = 0
        """Output tokens that belong to the answer, without those after a completed stop string."""
        self.done = False

    @property
    def wants_cancel(self) -> bool:
        """A stop string was found while the engine is still running the generation."""
        return self._stream.stop_string is not None and not self.done

    def push(self, event: TokenEvent) -> ChoiceDelta:
        """Raises ApiError if the generation did not end as it should."""
        generation = event.generation
        self.done = generation is not None
        num_kept, text, offsets = self._consume(event.token_ids, generation)
        self.num_tokens += num_kept
        return ChoiceDelta(
            index=self.index,
            text=text,
            token_ids=event.token_ids[:num_kept],
            logprobs=event.logprobs[:num_kept],
            top_logprobs=event.top_logprobs[:num_kept],
            text_offsets=offsets,
            generation=generation,
            finish_reason=None if generation is None else self._finish_reason(generation),
            stop_reason=None if generation is None else self._stop_reason(generation),
        )

    def _consume(
        self, token_ids: tuple[int, ...], generation: Generation | None
    ) -> tuple[int, str, tuple[int, ...]]:
        """(tokens kept, text released, their offsets). A stop token is kept, its text is not; one that a stop
        string spells is left to the stream, which finds that string."""
        if self._stream.stop_string is not None:
            return 0, "", ()
        ended_by_token = generation is not None and generation.stop_token_id is not None and bool(token_ids)
        spelled = generation is not None and generation.stop_token_id in self._stream.stop_ids
        num_hidden = 1 if ended_by_token and not (self._include_stop or spelled) else 0
        piece = self._stream.feed(token_ids[: len(token_ids) - num_hidden])
        text, num_kept, offsets = piece.text, piece.num_consumed, piece.text_offsets
        if piece.stop_string is None:
            num_kept += num_hidden
            offsets += (self._stream.num_chars,) * num_hidden
            text += self._stream.finish() if generation is not None else ""
        return num_kept, text, offsets

    def _finish_reason(self, generation: Generation) -> FinishReason:
        if self._stream.stop_string is not None:
            return "stop"
        if generation.finish_reason == "error":
            raise internal_error()
        if generation.finish_reason == "cancelled":
            raise ApiError(503, "The server is shutting down; the request was cancelled.")
        return generation.finish_reason

    def _stop_reason(self, generation: Generation) -> str | int | None:
        """As in vLLM: the stop string, or a stop id of the request's own; null for end of text."""
        if self._stream.stop_string is not None:
            return self._stream.stop_string
        own = generation.stop_token_id in generation.sampling.stop_token_ids
        return generation.stop_token_id if own else None
