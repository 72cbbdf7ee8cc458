"""The engine: a thread that runs rounds. Submit, cancel, swap; knows no HTTP, Ray or Redis.

Between any two rounds sequences join, leave and are cancelled, and a staged swap is applied; inside a round
nothing changes. Whatever goes wrong with a draft costs speed only; whatever goes wrong with one sequence
ends that one. All public methods are thread-safe.
"""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from copy import deepcopy
from typing import Self, TypeVar

import torch

from serving.engine.cost_table import CostTable
from serving.engine.draft_length import DraftLengthController
from serving.engine.handle import GenerationHandle
from serving.engine.live_draft import LiveDraft, StagedWeights
from serving.engine.logits_processing import check_processing
from serving.engine.prefill import Prefill, Router
from serving.engine.prefix_cache import PrefixCache, PrefixCacheStats
from serving.engine.proposal import Drafter, LookupDrafter
from serving.engine.request import (
    DEFAULT_ROUTE,
    EventCallback,
    FinishReason,
    Generation,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from serving.engine.round import run_round
from serving.engine.runner import Runner
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import NO_ADVANCE, Batch, Sequence
from serving.engine.slot_pass import Pass
from serving.engine.stats import EngineStats, Meter, SwapReport

_log = logging.getLogger(__name__)

T = TypeVar("T")


class EngineClosedError(RuntimeError):
    """The engine was closed; the request was not started."""


class Engine:
    """Speculative decoding over a fixed number of slots."""

    def __init__(
        self,
        target: Runner,
        drafter: Drafter | None,
        *,
        controller: DraftLengthController,
        costs: CostTable | None = None,
        eos_token_ids: SequenceOf[int] = (),
        floor: Callable[[], StagedWeights] | None = None,
        ngram: LookupDrafter | None = None,
        prefill_chunk_tokens: int = 256,
        prefix_cache: PrefixCache | None = None,
        router: Router | None = None,
        embedder: Runner | None = None,
    ) -> None:
        """`floor` stages the untrained draft: where the engine goes when an adapted one breaks. `ngram`
        copies where the model drafter is absent, broken or worth less. `prefix_cache` stands beside the
        target's slots; None computes every prompt. `router` names the route of prompts that bring none, by
        what `embedder` says of them (see `hidden_states`); embeddings of what is captured are kept too."""
        self.costs = costs
        self.generator = torch.Generator(target.device)
        self.generator.seed()
        self._target = target
        self._draft = LiveDraft(drafter, controller, floor, ngram)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._scheduler = Scheduler(target.num_slots)
        self._meter = Meter()
        self._prefix_cache = prefix_cache
        self._prefill = Prefill(
            target,
            self._draft,
            self._scheduler,
            self._meter,
            chunk_tokens=prefill_chunk_tokens,
            prefix_cache=prefix_cache,
            router=router,
            embedder=embedder,
        )
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._batch: Batch | None = None
        self._request_numbers = itertools.count()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="everdraft-engine", daemon=True)
        self._thread.start()

    # -- for callers, any thread ---------------------------------------------------------------

    def submit(self, request: GenerationRequest, on_event: EventCallback | None = None) -> GenerationHandle:
        """Start a generation. Raises ValueError for a prompt that cannot run, EngineClosedError."""
        self.check(request)
        if self._closed.is_set():
            raise EngineClosedError(f"the engine is closed; request {request.request_id!r} was not started")
        sequence = Sequence(request, self._stop_ids(request.sampling), lambda event: handle.deliver(event))
        handle = GenerationHandle(request.request_id, lambda: self._cancel(sequence), on_event)
        self._commands.put(lambda: self._scheduler.waiting.append(sequence))
        if self._closed.is_set():  # closed in between: nobody may be left to take the command
            raise EngineClosedError(f"the engine was closed; request {request.request_id!r} was not run")
        return handle

    def check(self, request: GenerationRequest) -> None:
        """Raises ValueError if the request cannot run here; the message names the field."""
        prompt, sampling = request.prompt_token_ids, request.sampling
        if not prompt:
            raise ValueError("prompt has 0 tokens; there is nothing to continue")
        vocab_size = self._target.vocab_size
        outside = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise ValueError(f"prompt holds token id {outside}, outside the vocabulary 0..{vocab_size - 1}")
        limit = self._target.max_seq_len
        if len(prompt) + sampling.max_tokens > limit:
            raise ValueError(
                f"prompt of {len(prompt)} tokens and max_tokens={sampling.max_tokens} exceed the context of "
                f"{limit} tokens (max_seq_len); shorten one of them"
            )
        check_processing(sampling, self._stop_ids(sampling), vocab_size)

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams | list[SamplingParams] | None = None,
    ) -> list[Generation]:
        """Run all prompts (token ids) to the end, batched; one SamplingParams for all, or one each."""
        each = sampling if isinstance(sampling, list) else [sampling or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"sampling has {len(each)} entries for {len(prompts)} prompts; nothing was run")
        requests = [
            GenerationRequest(f"generate-{next(self._request_numbers)}", tuple(prompt), params)
            for prompt, params in zip(prompts, each, strict=True)
        ]
        for request in requests:
            self.check(request)
        return [handle.result() for handle in [self.submit(request) for request in requests]]

    def swap(self, staged: StagedWeights, route: str = DEFAULT_ROUTE) -> "Future[SwapReport]":
        """Make staged weights of this route's draft live between two rounds. The future fails with
        BrokenDraftError for a version that already produced NaN here. Raises EngineClosedError."""
        consequence = f"draft_version={staged.draft_version} was not loaded"
        return self._ask(lambda: self._swap(staged, route), consequence)

    def open_draft(
        self, route: str, drafter: Drafter, floor: Callable[[], StagedWeights] | None
    ) -> "Future[None]":
        """Give a route a draft of its own, between two rounds. Raises EngineClosedError."""
        consequence = f"route {route} got no draft of its own"
        return self._ask(lambda: self._open_draft(route, drafter, floor), consequence)

    def close_draft(self, route: str) -> "Future[None]":
        """The default route's draft serves this route again; when it is done, nothing of the route's own is
        held here. Raises EngineClosedError."""
        return self._ask(lambda: self._close_draft(route), f"the draft of route {route} was not closed")

    def use_passes(self, passes: SequenceOf[tuple[Runner, Pass]], costs: CostTable) -> "Future[None]":
        """Run these runners' passes by other code from the next round on, at newly measured costs. Raises
        EngineClosedError."""
        return self._ask(lambda: self._use_passes(passes, costs), "passes stay as they are")

    def seed(self, seed: int) -> None:
        """Make unseeded sampling repeatable from here on; only for a lone caller."""
        self._commands.put(lambda: self._seed(seed))

    @property
    def draft_version(self) -> int:
        """Of the default route."""
        return self.draft_versions[DEFAULT_ROUTE]

    @property
    def draft_versions(self) -> dict[str, int]:
        """route -> version that serves, of every route that has a draft of its own."""
        return self._draft.versions

    @property
    def max_seq_len(self) -> int:
        return self._target.max_seq_len

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._closed.is_set()

    def stats(self) -> EngineStats:
        scheduler, meter = self._scheduler, self._meter
        running = list(scheduler.running)
        with meter.lock:
            return EngineStats(
                num_running=scheduler.num_active,
                num_waiting=len(scheduler.waiting),
                num_slots=scheduler.num_slots,
                num_cached_tokens=sum(sequence.num_cached for sequence in running),
                max_cached_tokens=scheduler.num_slots * self._target.max_seq_len,
                num_prompt_tokens=meter.num_prompt_tokens,
                num_output_tokens=meter.num_output_tokens,
                draft_versions=self.draft_versions,
                num_draft_tokens=self._draft.num_draft_tokens,
                is_draft_length_fixed=self._draft.controller.is_fixed,
                route_counts=deepcopy(meter.counts),
                round_s_median=meter.round_s_median,
                mean_batch_size=meter.mean_batch_size,
                num_swaps=meter.num_swaps,
                num_swaps_under_load=meter.num_swaps_under_load,
                swap_pause_s_max=meter.swap_pause_s_max,
                draft_disabled_reason=self._draft.disabled_reason,
                prefix_cache=self._prefix_cache.stats() if self._prefix_cache else PrefixCacheStats(),
            )

    def close(self, timeout_s: float = 10.0) -> None:
        """Cancel what runs and end the thread; safe to call twice."""
        self._closed.set()
        self._commands.put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _ask(self, act: Callable[[], T], consequence: str) -> "Future[T]":
        """Have it done on the engine's thread, between two rounds. Raises EngineClosedError."""
        done: Future[T] = Future()

        def command() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(act())
            except Exception as error:
                done.set_exception(error)

        self._commands.put(command)
        if self._closed.is_set():
            raise EngineClosedError(f"the engine is closed; {consequence}")
        return done

    # -- the engine thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                self._take_commands(wait=not self._scheduler.has_work)
                self._retire()
                self._work()
                self._retire()
        finally:
            self._closed.set()
            self._take_commands(wait=False)
            self._end_all("cancelled")
            self._retire()

    def _work(self) -> None:
        """A chunk of prefill and a round. What fails ends the sequences in it; the engine goes on."""
        try:
            if self._prefill.advance():
                self._batch = None
            if self._scheduler.running:
                self._round()
        except Exception as error:
            _log.exception("a round failed; its sequences were ended, the engine goes on")
            self._end_all("error", f"the round failed: {type(error).__name__}")

    def _take_commands(self, *, wait: bool) -> None:
        """Joins, cancellations and swaps that arrived since the last round."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            try:
                command()
            except Exception:
                _log.exception("a command failed; the engine goes on")

    def _round(self) -> None:
        if self._batch is None:
            self._batch = Batch(
                list(self._scheduler.running), self._target.device, vocab_size=self._target.vocab_size
            )
        batch = self._batch
        began_s = time.perf_counter()
        report = run_round(batch, self._draft.plan(batch), self._target, self.generator)
        self._meter.count_round(report, time.perf_counter() - began_s)
        if self.costs is not None:
            self.costs.observe_target(len(batch), report.num_draft_tokens, report.target_pass_s)
            if report.draft_passes and not report.num_chunks:
                self.costs.observe_draft(len(batch), report.draft_passes, report.propose_s)
        for row, (sequence, advance) in enumerate(zip(batch.sequences, report.advances, strict=True)):
            if advance is NO_ADVANCE:
                self._target.cache.clear(row, from_column=sequence.num_cached)
            self._draft.observe(sequence, advance)
            sequence.last_advance = advance
            if sequence.finish_reason is None:
                self._deliver(sequence)
        for broken in report.broken_drafts:
            to_floor = self._draft.give_up(broken.route)
            if to_floor is not None:
                self._meter.count_swap(to_floor)

    def _retire(self) -> None:
        """Free the slots of finished sequences, close the gaps, deliver their last events."""
        self._prefill.keep_finished()
        left, moves = self._scheduler.retire()
        if left:
            self._batch = None
        for move in moves:
            self._target.cache.move(move.source, move.destination, move.length)
            self._draft.move(move.source, move.destination)
        for sequence in left:
            self._deliver(sequence)

    def _deliver(self, sequence: Sequence) -> None:
        """Hand over what the last round added, and the generation if it is finished."""
        advance, sequence.last_advance = sequence.last_advance, NO_ADVANCE
        finished = sequence.finish_reason is not None
        event = TokenEvent(
            request_id=sequence.request.request_id,
            token_ids=advance.token_ids,
            logprobs=advance.logprobs,
            top_logprobs=advance.top_logprobs,
            generation=sequence.generation() if finished else None,
        )
        try:
            sequence.on_event(event)
        except Exception:
            _log.exception("the callback of request %r raised; the engine goes on", event.request_id)

    def _stop_ids(self, sampling: SamplingParams) -> frozenset[int]:
        """What ends the text; ids that the target cannot emit are left out."""
        eos = frozenset() if sampling.ignore_eos else self._eos_token_ids
        stops = eos.union(sampling.stop_token_ids)
        return frozenset(token for token in stops if 0 <= token < self._target.vocab_size)

    def _cancel(self, sequence: Sequence) -> None:
        def cancel() -> None:
            sequence.finish_reason = sequence.finish_reason or "cancelled"

        self._commands.put(cancel)

    def _end_all(self, reason: FinishReason, error: str = "") -> None:
        scheduler = self._scheduler
        waiting = scheduler.waiting if reason == "cancelled" else ()
        for sequence in [*scheduler.running, *waiting, scheduler.prefilling]:
            if sequence is not None and sequence.finish_reason is None:
                sequence.finish_reason, sequence.error = reason, error

    def _seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def _use_passes(self, passes: SequenceOf[tuple[Runner, Pass]], costs: CostTable) -> None:
        for runner, compiled in passes:
            runner.compiled = compiled
        if self.costs is not None:
            self.costs.adopt(costs)

    def _swap(self, staged: StagedWeights, route: str) -> SwapReport:
        report = self._draft.swap(staged, route, under_load=bool(self._scheduler.running))
        self._forget_model(route)
        self._meter.count_swap(report)
        return report

    def _open_draft(self, route: str, drafter: Drafter, floor: Callable[[], StagedWeights] | None) -> None:
        self._draft.open(route, drafter, floor)
        self._forget_model(route)

    def _close_draft(self, route: str) -> None:
        self._forget_model(route)
        self._draft.close(route)
        self._meter.forget(route)

    def _forget_model(self, route: str) -> None:
        """Another draft serves the sequences that this route's draft serves."""
        for sequence in self._scheduler.running:
            if self._draft.serves(route, sequence.route):
                sequence.belief.forget_model()
