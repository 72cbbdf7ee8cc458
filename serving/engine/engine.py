"""The engine's thread-safe front: submit, cancel, swap. Knows no HTTP, Ray or Redis.

A thread of its own runs the `EngineCore`; calls from other threads become commands that it runs between two
rounds.
"""

import itertools
import logging
import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from typing import Self, TypeVar

from buffer.names import DEFAULT_ROUTE
from serving.engine.core import EngineCore
from serving.engine.cost_table import CostTable
from serving.engine.draft_pool import Staged
from serving.engine.handle import GenerationHandle
from serving.engine.logits_processing import check_processing
from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_pass import SlotPassFunction
from serving.engine.proposal import Drafter
from serving.engine.request import (
    EventCallback,
    Generation,
    GenerationRequest,
    SamplingParams,
    check_fit,
    ending_ids,
)
from serving.engine.sequence import Sequence
from serving.engine.stats import EngineStats, SwapReport

_log = logging.getLogger(__name__)

T = TypeVar("T")


class EngineClosedError(RuntimeError):
    """The engine was closed; the request was not started."""


class Engine:
    """Speculative decoding over a fixed number of slots."""

    def __init__(self, core: EngineCore, *, eos_token_ids: SequenceOf[int] = ()) -> None:
        """Starts the thread that `core` belongs to from now on."""
        self.core = core
        self._max_seq_len, self._vocab_size = core.target.max_seq_len, core.target.vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._request_numbers = itertools.count()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="everdraft-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_event: EventCallback | None = None) -> GenerationHandle:
        """Start a generation. Raises ValueError for a prompt that cannot run, EngineClosedError."""
        self.check(request)
        if self._closed.is_set():
            raise EngineClosedError(f"the engine is closed; request {request.request_id!r} was not started")
        core = self.core
        sequence = Sequence(request, self._stop_ids(request.sampling), lambda event: handle.deliver(event))
        handle = GenerationHandle(
            request.request_id, lambda: self._commands.put(lambda: core.cancel(sequence)), on_event
        )
        self._commands.put(lambda: core.add(sequence))
        if self._closed.is_set():  # closed in between: the thread may have ended without running the command
            raise EngineClosedError(f"the engine was closed; request {request.request_id!r} was not run")
        return handle

    def check(self, request: GenerationRequest) -> None:
        """Raises ValueError if the request cannot run here; the message names the field."""
        check_fit(request, max_seq_len=self._max_seq_len, vocab_size=self._vocab_size)
        check_processing(request.sampling, self._stop_ids(request.sampling), self._vocab_size)

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

    def swap(self, staged: Staged, route: str = DEFAULT_ROUTE) -> "Future[SwapReport]":
        """Make staged weights of this route's draft live between two rounds. The future fails with
        BrokenDraftError for a version that already produced NaN here. Raises EngineClosedError."""
        consequence = f"draft_version={staged.draft_version} was not loaded"
        return self._ask(lambda: self.core.swap(staged, route), consequence)

    def open_draft(self, route: str, drafter: Drafter, floor: Callable[[], Staged] | None) -> "Future[None]":
        """Give a route a draft of its own, between two rounds. Raises EngineClosedError."""
        consequence = f"route {route} got no draft of its own"
        return self._ask(lambda: self.core.open_draft(route, drafter, floor), consequence)

    def close_draft(self, route: str) -> "Future[None]":
        """Let the default route's draft serve this route again; once done, the engine holds nothing of the
        route's own draft. Raises EngineClosedError."""
        return self._ask(lambda: self.core.close_draft(route), f"the draft of route {route} was not closed")

    def use_passes(
        self, passes: SequenceOf[tuple[Runner, SlotPassFunction]], costs: CostTable
    ) -> "Future[None]":
        """From the next round on, run these runners' passes with these compiled ones, at newly measured
        costs. Raises EngineClosedError."""
        return self._ask(lambda: self.core.use_passes(passes, costs), "passes stay as they are")

    def seed(self, seed: int) -> None:
        """Make unseeded sampling repeatable from here on; only if there is a single caller."""
        self._ask(lambda: self.core.generator.manual_seed(seed), "the seed was not set")

    @property
    def draft_version(self) -> int:
        """The default route's version."""
        return self.draft_versions[DEFAULT_ROUTE]

    @property
    def draft_versions(self) -> dict[str, int]:
        """route -> version that serves, of every route that has a draft of its own."""
        return self.core.drafts.versions

    @property
    def costs(self) -> CostTable | None:
        """Costs of passes, as corrected by live rounds."""
        return self.core.costs

    @property
    def passes(self) -> str:
        """What runs the models' passes, in words; empty where nobody asked for others than the models'
        own."""
        return ""

    @property
    def max_seq_len(self) -> int:
        return self._max_seq_len

    @property
    def vocab_size(self) -> int:
        """Of the target's logits."""
        return self._vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Each ends the text."""
        return self._eos_token_ids

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._closed.is_set()

    def stats(self) -> EngineStats:
        return self.core.stats()

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
        """Run `act` on the engine's thread, between two rounds. Raises EngineClosedError."""
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

    def _run(self) -> None:
        """The engine's thread."""
        core = self.core
        try:
            while not self._closed.is_set():
                self._take_commands(wait=not core.has_work)
                core.step()
        finally:
            self._closed.set()
            self._take_commands(wait=False)
            core.cancel_all()

    def _take_commands(self, *, wait: bool) -> None:
        """Run the commands (joins, cancellations, swaps) that arrived since the last round."""
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

    def _stop_ids(self, sampling: SamplingParams) -> frozenset[int]:
        """Token ids that end the text; ids that the target cannot emit are left out."""
        return ending_ids(sampling, self._eos_token_ids, self._vocab_size)
