"""Prompts into the cache, one sequence at a time, in chunks between rounds.

What the prefix cache knows is copied, the rest runs through the target; the draft catches up by itself later.
Runs on the engine's thread only. Invariant: whatever fails here ends the one sequence in prefill, and what
fails in the prefix cache costs speed only.
"""

import logging
import time

from serving.engine.live_draft import LiveDraft
from serving.engine.prefix_cache import PrefixCache
from serving.engine.runner import Runner
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Sequence
from serving.engine.stats import Meter

_log = logging.getLogger(__name__)


class Prefill:
    """All of a prompt but its last token, which the first round feeds."""

    def __init__(
        self,
        target: Runner,
        draft: LiveDraft,
        scheduler: Scheduler,
        meter: Meter,
        *,
        chunk_tokens: int,
        prefix_cache: PrefixCache | None,
    ) -> None:
        """`prefix_cache` None: every prompt is computed."""
        self._target, self._draft, self._scheduler, self._meter = target, draft, scheduler, meter
        self._chunk_tokens = chunk_tokens
        self._prefix_cache = prefix_cache

    def advance(self) -> bool:
        """At most one chunk's worth of tokens. Returns whether a sequence joined the running ones."""
        budget, joined = self._chunk_tokens, False
        while budget > 0:
            slot = self._scheduler.admit()
            sequence = self._scheduler.prefilling
            if sequence is None:
                break
            try:
                if slot is not None:
                    self._begin(sequence, slot)
                budget -= self._chunk(sequence, budget)
            except Exception as error:
                _log.exception("the prefill of request %r failed; it was ended", sequence.request.request_id)
                sequence.finish_reason = "error"
                sequence.error = f"the prefill failed: {type(error).__name__}"
                break
            if sequence.num_cached == sequence.prompt_len - 1:
                self._keep(len(self._scheduler.running), sequence)
                self._meter.count_prompt(sequence.prompt_len)
                self._scheduler.finish_prefill()
                joined = True
        return joined

    def keep_finished(self) -> None:
        """Before they leave their slots: what finished sequences have cached, their outputs included."""
        for slot, sequence in enumerate(self._scheduler.running):
            if sequence.finish_reason not in (None, "error"):
                self._keep(slot, sequence)

    def _begin(self, sequence: Sequence, slot: int) -> None:
        """A clean slot, and in it what is known of the prompt."""
        sequence.queued_s = time.perf_counter() - sequence.submitted_at_s
        self._target.cache.clear(slot)
        self._draft.clear(slot)
        sequence.num_cached = sequence.num_reused = self._reuse(slot, sequence)

    def _reuse(self, slot: int, sequence: Sequence) -> int:
        if self._prefix_cache is None:
            return 0
        try:
            return self._prefix_cache.load(slot, sequence.token_ids[: sequence.prompt_len - 1])
        except Exception:
            _log.exception("a prefix could not be reused; all were forgotten, the engine goes on")
            self._prefix_cache.clear()
            self._target.cache.clear(slot)
            return 0

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        start = sequence.num_cached
        chunk = sequence.token_ids[start : min(start + budget, sequence.prompt_len - 1)]
        if chunk:
            self._target.prefill(len(self._scheduler.running), chunk, start)
            sequence.num_cached += len(chunk)
        return len(chunk)

    def _keep(self, slot: int, sequence: Sequence) -> None:
        if self._prefix_cache is None:
            return
        try:
            self._prefix_cache.store(slot, sequence.token_ids[: sequence.num_cached])
        except Exception:
            _log.exception("a prefix could not be kept; all were forgotten, the engine goes on")
            self._prefix_cache.clear()
