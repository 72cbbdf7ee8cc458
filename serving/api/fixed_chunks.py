"""Cuts one generation's events into events of a fixed number of tokens, whatever rounds brought.

Who sees the sizes of a stream's chunks would else learn how many tokens each round of speculation accepted,
which tells topics apart (arXiv 2411.01076). Invariant: all tokens come, in order, each once.
"""

from collections.abc import Iterator
from dataclasses import replace

from serving.engine.request import TokenEvent


class FixedChunks:
    """`num_tokens` of every event but the last, which may have fewer; 1 leaves the events as they are."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._held: TokenEvent | None = None

    def cut(self, event: TokenEvent) -> Iterator[TokenEvent]:
        """What can go now; with the last event all that is left."""
        if self._num_tokens == 1:
            yield event
            return
        waiting = event if self._held is None else _joined(self._held, event)
        while len(waiting.token_ids) > self._num_tokens or self._is_full(waiting):
            yield _cut(waiting, 0, self._num_tokens)
            waiting = _cut(waiting, self._num_tokens, None)
        self._held = waiting
        if event.generation is not None:
            yield waiting

    def _is_full(self, waiting: TokenEvent) -> bool:
        """The last chunk stays, to go with what ends the generation."""
        return waiting.generation is None and len(waiting.token_ids) == self._num_tokens


def _joined(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    return replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
    )


def _cut(event: TokenEvent, start: int, end: int | None) -> TokenEvent:
    """A part of it; what comes once goes with the part at its own end."""
    part = slice(start, end)
    return replace(
        event,
        token_ids=event.token_ids[part],
        logprobs=event.logprobs[part],
        top_logprobs=event.top_logprobs[part],
        generation=event.generation if end is None else None,
        prompt_logprobs=event.prompt_logprobs if start == 0 else None,
    )
