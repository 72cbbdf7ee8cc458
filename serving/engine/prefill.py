"""Prefill: prompts enter the cache one sequence at a time, in chunks between rounds; also routes them.

Prefixes in the prefix cache are copied, the rest runs through the target; the draft catches up by itself
later. A prompt whose log-probabilities are asked for is computed whole, in chunks with no more logits than a
round's, and twice if its hidden states are needed, too. Runs on the engine's thread only. Invariant: a
failure here ends only the sequence in prefill, one in the prefix cache costs only speed, and one in the
router leaves the default route.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

from serving.engine.draft_length import MAX_DRAFT_TOKENS
from serving.engine.draft_pool import DraftPool
from serving.engine.passes.prefix_cache import BLOCK_TOKENS, PrefixCache
from serving.engine.passes.prompt_embedding import BlockMean, PromptStates
from serving.engine.passes.runner import Runner
from serving.engine.prompt_logprobs import PromptLogprobsBuilder
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Sequence
from serving.engine.stats import Meter

_log = logging.getLogger(__name__)

Router = Callable[[NDArray[np.float16]], str]
"""Gives the route of a prompt that has none, from its embedding [H]; called between rounds, so it must be
fast."""


class Prefill:
    """Prefills all of a prompt but its last token, which the first round feeds."""

    def __init__(
        self,
        target: Runner,
        drafts: DraftPool,
        scheduler: Scheduler,
        meter: Meter,
        *,
        chunk_tokens: int,
        prefix_cache: PrefixCache | None,
        router: Router | None,
        embedder: Runner | None,
    ) -> None:
        """`prefix_cache` None: every prompt is computed; `router` or `embedder` None: no prompt is
        embedded."""
        self._target, self._drafts, self._scheduler, self._meter = target, drafts, scheduler, meter
        self._chunk_tokens = chunk_tokens
        self._num_round_positions = target.num_slots * (MAX_DRAFT_TOKENS + 1)
        """The most positions of a round, whose logits the memory plan counts."""
        self._prefix_cache = prefix_cache
        self._router, self._embedder = router, embedder
        self._states: PromptStates | None = None
        """Hidden states of the sequence in prefill; None if its embedding is not needed."""
        self._logprobs: PromptLogprobsBuilder | None = None
        """Of the sequence in prefill; None if it did not ask."""

    def advance(self) -> bool:
        """Prefill at most one chunk's worth of tokens. Returns whether a sequence joined the running ones."""
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
                is_whole = sequence.num_cached == sequence.prompt_len - 1
                if is_whole and self._logprobs is not None:
                    sequence.prompt_logprobs = self._logprobs.finish()
            except Exception as error:
                _log.exception("the prefill of request %r failed; it was ended", sequence.request.request_id)
                sequence.finish_reason = "error"
                sequence.error = f"the prefill failed: {type(error).__name__}"
                break
            if is_whole:
                self._keep(len(self._scheduler.running), sequence, self._embed(sequence))
                self._meter.count_prompt(sequence.prompt_len)
                self._scheduler.finish_prefill()
                if sequence.num_remaining == 0:
                    sequence.finish_reason = "length"
                joined = True
        return joined

    def keep_finished(self) -> None:
        """Called before finished sequences leave their slots: keep their prompts and outputs in the prefix
        cache."""
        for slot, sequence in enumerate(self._scheduler.running):
            if sequence.finish_reason not in (None, "error"):
                self._keep(slot, sequence)

    def _begin(self, sequence: Sequence, slot: int) -> None:
        """Clear the slot, and copy what the prefix cache has of the prompt."""
        sequence.queued_s = time.perf_counter() - sequence.submitted_at_s
        self._target.cache.clear(slot)
        self._drafts.clear(slot)
        sequence.num_cached = sequence.num_reused = self._reuse(slot, sequence)
        self._states = self._new_states(sequence)
        num_top = sequence.request.sampling.prompt_logprobs
        self._logprobs = None if num_top is None else PromptLogprobsBuilder(num_top)

    def _reuse(self, slot: int, sequence: Sequence) -> int:
        if self._prefix_cache is None or sequence.request.sampling.prompt_logprobs is not None:
            return 0
        try:
            prompt = sequence.token_ids[: sequence.prompt_len - 1]
            return self._prefix_cache.load(slot, prompt, sequence.request.cache_salt)
        except Exception:
            _log.exception("a prefix could not be reused; all were forgotten, the engine goes on")
            self._prefix_cache.clear()
            self._target.cache.clear(slot)
            return 0

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        start = sequence.num_cached
        if self._logprobs is not None:
            budget = min(budget, self._num_round_positions)
        chunk = sequence.token_ids[start : min(start + budget, sequence.prompt_len - 1)]
        slot = len(self._scheduler.running)
        if chunk and self._states is not None and self._embedder is not None:
            self._states.add(start, self._embedder.prefill(slot, chunk, start, logits_to_keep=0)[0])
        if chunk and self._logprobs is not None:
            logits_1TV = self._target.prefill(slot, chunk, start, logits_to_keep=0)
            self._logprobs.add(logits_1TV[0], sequence.token_ids[start + 1 : start + 1 + len(chunk)])
        elif chunk and self._states is None:
            self._target.prefill(slot, chunk, start)
        sequence.num_cached += len(chunk)
        return len(chunk)

    def _new_states(self, sequence: Sequence) -> PromptStates | None:
        """Collects hidden states if the prompt is to be routed or recorded and the target has an embedder."""
        request = sequence.request
        if self._router is None or self._embedder is None:
            return None
        if request.route is not None and not request.capture:
            return None
        if self._prefix_cache is None:
            return PromptStates(sequence.prompt_len - 1, BLOCK_TOKENS, ())
        reused = self._prefix_cache.means(sequence.token_ids[: sequence.num_reused], request.cache_salt)
        return PromptStates(sequence.prompt_len - 1, self._prefix_cache.block_tokens, reused)

    def _embed(self, sequence: Sequence) -> list[BlockMean]:
        """Set the prompt's embedding, and its route if it has none. Returns its blocks' means for the prefix
        cache."""
        states, self._states = self._states, None
        if states is None or self._router is None:
            return []
        try:
            sequence.prompt_embedding_H, means = states.finish()
            if sequence.request.route is None and sequence.prompt_embedding_H is not None:
                sequence.route = self._router(sequence.prompt_embedding_H)
        except Exception:
            _log.exception("the prompt of request %r was not routed", sequence.request.request_id)
            return []
        return means

    def _keep(self, slot: int, sequence: Sequence, means: SequenceOf[BlockMean] = ()) -> None:
        if self._prefix_cache is None:
            return
        try:
            cached = sequence.token_ids[: sequence.num_cached]
            self._prefix_cache.store(slot, cached, means, sequence.request.cache_salt)
        except Exception:
            _log.exception("a prefix could not be kept; all were forgotten, the engine goes on")
            self._prefix_cache.clear()
