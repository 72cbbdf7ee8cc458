"""The engine's core: everything that runs on its thread. Knows no other thread, no HTTP, Ray or Redis.

Between two rounds sequences join, leave and are cancelled, and a staged swap is applied; during a round none
of this happens. A failing draft costs only speed; a failing sequence ends only itself. `Engine` is the
thread-safe front that calls it.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch

from serving.engine.cost_table import CostTable
from serving.engine.draft_length import DraftLengthController
from serving.engine.draft_pool import DraftPool, Staged
from serving.engine.passes.prefix_cache import PrefixCache, PrefixCacheStats
from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_pass import SlotPassFunction
from serving.engine.prefill import Prefill, Router
from serving.engine.proposal import Drafter, LookupDrafter
from serving.engine.request import FinishReason, TokenEvent
from serving.engine.round import RoundReport, run_round
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import NO_ADVANCE, Batch, Sequence
from serving.engine.stats import EngineStats, Meter, SwapReport

_log = logging.getLogger(__name__)


class EngineCore:
    """Speculative decoding over a fixed number of slots, one `step` after another."""

    def __init__(
        self,
        target: Runner,
        drafter: Drafter | None,
        *,
        controller: DraftLengthController,
        costs: CostTable | None = None,
        floor: Callable[[], Staged] | None = None,
        ngram: LookupDrafter | None = None,
        prefill_chunk_tokens: int = 256,
        prefix_cache: PrefixCache | None = None,
        router: Router | None = None,
        embedder: Runner | None = None,
    ) -> None:
        """`floor` stages the untrained draft, which the engine falls back to when an adapted one breaks.
        `ngram` copies where the model drafter is absent, broken or slower. `prefix_cache` None: every prompt
        is computed. `router` chooses the route of prompts that have none, from what `embedder` computes (see
        `hidden_states`); embeddings of captured requests are kept too."""
        self.target = target
        self.costs = costs
        self.drafts = DraftPool(drafter, controller, floor, ngram)
        self.prefix_cache = prefix_cache
        self.generator = torch.Generator(target.device)
        self.generator.seed()
        self.scheduler = Scheduler(target.num_slots)
        self._meter = Meter()
        self._prefill = Prefill(
            target,
            self.drafts,
            self.scheduler,
            self._meter,
            chunk_tokens=prefill_chunk_tokens,
            prefix_cache=prefix_cache,
            router=router,
            embedder=embedder,
        )
        self._batch: Batch | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> None:
        """Run a chunk of prefill and a round. A failure ends the sequences that took part; the engine goes
        on."""
        self._retire()
        try:
            if self._prefill.advance():
                self._batch = None
                self._retire()  # those that asked for no output
            if self.scheduler.running:
                self._round()
        except Exception as error:
            _log.exception("a round failed; its sequences were ended, the engine goes on")
            self._end(self._started(), "error", f"the round failed: {type(error).__name__}")
        self._retire()

    def cancel_all(self) -> None:
        """Cancel running and waiting sequences; their last events are delivered."""
        self._end([*self._started(), *self.scheduler.waiting], "cancelled")
        self._retire()

    # -- between two rounds ---------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)

    def cancel(self, sequence: Sequence) -> None:
        sequence.finish_reason = sequence.finish_reason or "cancelled"

    def swap(self, staged: Staged, route: str) -> SwapReport:
        """Raises BrokenDraftError for a version that gave NaN here before."""
        report = self.drafts.swap(staged, route, under_load=bool(self.scheduler.running))
        self._forget_acceptance(route)
        self._meter.count_swap(report)
        return report

    def open_draft(self, route: str, drafter: Drafter, floor: Callable[[], Staged] | None) -> None:
        self.drafts.open(route, drafter, floor)
        self._forget_acceptance(route)

    def close_draft(self, route: str) -> None:
        self._forget_acceptance(route)
        self.drafts.close(route)
        self._meter.forget(route)

    def use_passes(self, passes: SequenceOf[tuple[Runner, SlotPassFunction]], costs: CostTable) -> None:
        for runner, compiled in passes:
            runner.compiled = compiled
        if self.costs is not None:
            self.costs.adopt(costs)

    # -- from any thread ------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        scheduler, drafts = self.scheduler, self.drafts
        return self._meter.stats(
            num_running=scheduler.num_active,
            num_waiting=len(scheduler.waiting),
            num_slots=scheduler.num_slots,
            num_cached_tokens=sum(sequence.num_cached for sequence in list(scheduler.running)),
            max_cached_tokens=scheduler.num_slots * self.target.max_seq_len,
            draft_versions=drafts.versions,
            num_draft_tokens=drafts.num_draft_tokens,
            is_draft_length_fixed=drafts.controller.is_fixed,
            draft_disabled_reason=drafts.disabled_reason,
            prefix_cache=self.prefix_cache.stats() if self.prefix_cache else PrefixCacheStats(),
        )

    # -- the parts of a step ---------------------------------------------------------------------

    def _round(self) -> None:
        if self._batch is None:
            running = list(self.scheduler.running)
            self._batch = Batch(running, self.target.device, vocab_size=self.target.vocab_size)
        batch, began_s = self._batch, time.perf_counter()
        report = run_round(batch, self.drafts.plan(batch), self.target, self.generator)
        self._meter.count_round(report, time.perf_counter() - began_s)
        self._observe_costs(report)
        for row, (sequence, advance) in enumerate(zip(batch.sequences, report.advances, strict=True)):
            if advance is NO_ADVANCE:
                self.target.cache.clear(row, from_column=sequence.num_cached)
            self.drafts.observe(sequence, advance)
            sequence.last_advance = advance
            if sequence.finish_reason is None:
                _deliver(sequence)
        for broken in report.broken_drafts:
            to_floor = self.drafts.give_up(broken.route)
            if to_floor is not None:
                self._meter.count_swap(to_floor)

    def _observe_costs(self, report: RoundReport) -> None:
        if self.costs is None:
            return
        batch_size = len(report.advances)
        self.costs.observe_target(batch_size, report.num_draft_tokens, report.target_pass_s)
        if report.draft_passes and not report.num_chunks:
            self.costs.observe_draft(batch_size, report.draft_passes, report.propose_s)

    def _retire(self) -> None:
        """Free the slots of finished sequences, move others into the gaps, deliver the last events."""
        self._prefill.keep_finished()
        left, moves = self.scheduler.retire()
        if left:
            self._batch = None
        for move in moves:
            self.target.cache.move(move.source, move.destination, move.length)
            self.drafts.move(move.source, move.destination)
        for sequence in left:
            _deliver(sequence)

    def _started(self) -> list[Sequence]:
        prefilling = self.scheduler.prefilling
        return [*self.scheduler.running, *([] if prefilling is None else [prefilling])]

    def _end(self, sequences: SequenceOf[Sequence], reason: FinishReason, error: str = "") -> None:
        for sequence in sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason, sequence.error = reason, error

    def _forget_acceptance(self, route: str) -> None:
        """Drop the estimates of sequences that this route's draft serves, because another draft replaces
        it."""
        for sequence in self.scheduler.running:
            if self.drafts.serves(route, sequence.route):
                sequence.estimate.forget_model()


def _deliver(sequence: Sequence) -> None:
    """Call back with what the last round added, and with the generation if it is finished."""
    advance, sequence.last_advance = sequence.last_advance, NO_ADVANCE
    event = TokenEvent(
        request_id=sequence.request.request_id,
        token_ids=advance.token_ids,
        logprobs=advance.logprobs,
        top_logprobs=advance.top_logprobs,
        generation=sequence.generation() if sequence.finish_reason is not None else None,
        prompt_logprobs=None if sequence.has_delivered else sequence.prompt_logprobs,
    )
    sequence.has_delivered = True
    try:
        sequence.on_event(event)
    except Exception:
        _log.exception("the callback of request %r raised; the engine goes on", event.request_id)
