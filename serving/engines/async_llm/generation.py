"""One of vLLM's requests on its way to a Generation: its outputs and its worker's step messages.

The tokens come from vLLM's outputs; which version drafted them, how many were accepted and what the target
said come from the messages. Invariant: a lost message costs figures and the record from there on, never a
token.
"""

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from buffer.names import DEFAULT_ROUTE, MODEL_DRAFTER
from serving.engine.request import (
    CapturedRound,
    FinishReason,
    Generation,
    GenerationRequest,
    PromptLogprobs,
    TokenEvent,
    TopLogprobs,
    VersionSpan,
)
from serving.engines.async_llm.step_messages import StepMessage

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "abort": "cancelled",
    "error": "error",
}


class RunningGeneration:
    """Outputs arrive on the loop's thread, messages on the channel's."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self._began_s = time.monotonic()
        self._first_s: float | None = None
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._top_logprobs: list[TopLogprobs] = []
        self._prompt_logprobs: PromptLogprobs | None = None
        self._messages: list[StepMessage] = []
        self._num_told = 0
        self._lock = threading.Lock()

    @property
    def has_begun(self) -> bool:
        return self._first_s is not None

    def add_message(self, message: StepMessage) -> None:
        with self._lock:
            self._messages.append(message)
            self._num_told += len(message.emitted)

    def is_told(self) -> bool:
        """Whether the messages account for all tokens."""
        return self._num_told >= len(self._token_ids)

    def cut(self, emitted: Sequence[int], stop_token_ids: Collection[int]) -> tuple[list[int], str]:
        """The emitted tokens that belong to the text, as vLLM's scheduler cuts it, and why it ends there;
        empty: it goes on."""
        kept: list[int] = []
        for token in emitted:
            kept.append(token)
            if token in stop_token_ids:
                return kept, "stop"
            if len(self._token_ids) + len(kept) >= self.request.sampling.max_tokens:
                return kept, "length"
        return kept, ""

    def add_output(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[Any] | None = None,
        prompt_logprobs: Sequence[Any] | None = None,
    ) -> TokenEvent:
        """A part of the output; `logprobs`: vLLM's, one mapping a token; the first brings the prompt's."""
        if self.request.sampling.max_tokens == 0:
            token_ids, logprobs = (), None
        token_ids = tuple(token_ids)
        if token_ids and self._first_s is None:
            self._first_s = time.monotonic()
        chosen, top = self._logprobs_of(token_ids, logprobs)
        self._token_ids += token_ids
        self._logprobs += chosen
        self._top_logprobs += top
        found = self._prompt_logprobs_of(prompt_logprobs) if prompt_logprobs else None
        self._prompt_logprobs = self._prompt_logprobs or found
        return TokenEvent(
            self.request.request_id, token_ids, tuple(chosen), tuple(top), prompt_logprobs=found
        )

    def finished(self, event: TokenEvent, reason: str, stop_reason: Any, num_reused: int) -> TokenEvent:
        """The last event, with the whole generation."""
        stop_id = None
        if self.request.sampling.max_tokens == 0 and reason == "stop":
            reason = "length"
        if reason == "stop" and self._token_ids:
            stop_id = stop_reason if isinstance(stop_reason, int) else self._token_ids[-1]
        generation = self._generation(_REASONS.get(reason, "error"), stop_id)
        generation.num_prompt_tokens_reused = num_reused
        return replace(event, generation=generation)

    def failed(self, error: str) -> TokenEvent:
        generation = self._generation("error", None)
        generation.error = error
        return TokenEvent(self.request.request_id, generation=generation)

    def cancelled(self) -> TokenEvent:
        return TokenEvent(self.request.request_id, generation=self._generation("cancelled", None))

    def _generation(self, reason: FinishReason, stop_id: int | None) -> Generation:
        request, first_s = self.request, self._first_s or time.monotonic()
        rounds = _Rounds(len(request.prompt_token_ids), len(self._token_ids))
        with self._lock:
            for message in self._messages:
                rounds.add(message)
        return Generation(
            request_id=request.request_id,
            choice_index=request.choice_index,
            route=request.route or DEFAULT_ROUTE,
            # its noise is vLLM's, so that the learner must not take it for ours
            sampling=replace(request.sampling, seed=None),
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=list(self._token_ids),
            finish_reason=reason,
            logprobs=self._logprobs,
            top_logprobs=self._top_logprobs,
            num_rounds=rounds.num_rounds,
            num_drafted=rounds.num_drafted,
            num_attempted=rounds.num_attempted,
            num_accepted=rounds.num_accepted,
            draft_versions=rounds.spans,
            accepted_histogram=rounds.histogram,
            queued_s=first_s - self._began_s,
            stop_token_id=stop_id,
            captured_rounds=rounds.captured,
            prompt_logprobs=self._prompt_logprobs,
        )

    def _logprobs_of(
        self, token_ids: Sequence[int], found: Sequence[Any] | None
    ) -> tuple[list[float], list[TopLogprobs]]:
        wanted = self.request.sampling.logprobs
        if wanted is None or not found:
            return [0.0] * len(token_ids), []
        chosen = [entry[token].logprob for token, entry in zip(token_ids, found, strict=True)]
        return chosen, [_top_of(entry, wanted) for entry in found]

    def _prompt_logprobs_of(self, found: Sequence[Any]) -> PromptLogprobs:
        """`found`: vLLM's, one mapping a token; None for the first."""
        wanted = self.request.sampling.prompt_logprobs or 0
        own = [
            entry[token] for token, entry in zip(self.request.prompt_token_ids[1:], found[1:], strict=True)
        ]
        if not own:
            return PromptLogprobs.empty(wanted)
        top = [_top_of(entry, wanted) for entry in found[1:]]
        return PromptLogprobs(
            np.array([each.logprob for each in own], np.float32),
            np.array([each.rank for each in own], np.int64),
            np.array([[token for token, _ in entry] for entry in top], np.int64),
            np.array([[logprob for _, logprob in entry] for entry in top], np.float32),
        )


def _top_of(entry: Mapping[int, Any], count: int) -> TopLogprobs:
    """The most likely tokens of one place."""
    ranked = sorted(entry.items(), key=lambda item: item[1].rank)
    return tuple((token, each.logprob) for token, each in ranked if each.rank <= count)


class _Rounds:
    """Step messages in order, cut where vLLM cut the text, up to the first that is missing."""

    def __init__(self, num_prompt: int, num_output: int) -> None:
        self._num_prompt, self._num_output = num_prompt, num_output
        self._at, self._next = 0, 0
        self._is_whole = True
        self.num_rounds = self.num_drafted = self.num_attempted = self.num_accepted = 0
        self.histogram: list[int] = []
        self.spans: list[VersionSpan] = []
        self.captured: list[CapturedRound] = []

    def add(self, message: StepMessage) -> None:
        self._is_whole &= message.number == self._next
        self._next = message.number + 1
        kept = min(len(message.emitted), self._num_output - self._at)
        if kept <= 0:
            return
        accepted = len(message.emitted) - 1
        num_attempted = min(kept, accepted + 1, message.num_drafted)
        num_accepted = min(kept, accepted)
        self.num_rounds += 1
        self.num_drafted += message.num_drafted
        self.num_attempted += num_attempted
        self.num_accepted += num_accepted
        self.histogram += [0] * (num_accepted + 1 - len(self.histogram))
        self.histogram[num_accepted] += 1
        self._span(message.draft_version, kept)
        if self._is_whole and message.captured is not None:
            self._capture(message, kept, num_attempted, num_accepted)
        self._at += kept

    def _span(self, version: int, count: int) -> None:
        last = self.spans[-1] if self.spans else None
        if last is not None and last.draft_version == version:
            self.spans[-1] = replace(last, end=last.end + count)
        else:
            self.spans.append(VersionSpan(version, self._at, self._at + count))

    def _capture(self, message: StepMessage, kept: int, num_attempted: int, num_accepted: int) -> None:
        arrays = message.captured
        assert arrays is not None
        self.captured.append(
            CapturedRound(
                start=self._num_prompt + self._at,
                drafter_id=MODEL_DRAFTER,
                draft_route=DEFAULT_ROUTE,
                draft_version=message.draft_version,
                num_accepted=num_accepted,
                num_attempted=num_attempted,
                drafted_token_ids_G=arrays.drafted_token_ids_G,
                drafted_target_logprobs_G=arrays.drafted_target_logprobs_G,
                drafted_draft_logprobs_G=arrays.drafted_draft_logprobs_G,
                emitted_target_logprobs_C=arrays.emitted_target_logprobs_C[:kept],
                topk_token_ids_EK=arrays.topk_token_ids_EK,
                topk_logprobs_EK=arrays.topk_logprobs_EK,
                retemper_E=arrays.retemper_E,
            )
        )
