"""A small ServingEngine: token t is followed by t + 1, and drafts are right if their version is odd.

It shows what the Protocol asks and nothing more; the contract test holds it beside the real ones.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION, MODEL_DRAFTER
from buffer.records import AdapterManifest
from serving.engine.counters import RoundCounters
from serving.engine.engine import EngineClosedError
from serving.engine.handle import GenerationHandle
from serving.engine.passes.prefix_cache import PrefixCacheStats
from serving.engine.proposal import DrafterVersion
from serving.engine.request import (
    CapturedRound,
    EventCallback,
    FinishReason,
    Generation,
    GenerationRequest,
    PromptLogprobs,
    TokenEvent,
    VersionSpan,
)
from serving.engine.stats import EngineStats, SwapReport
from serving.models.adapter import AdapterRejectedError, sha256_of

VOCAB_SIZE, MAX_SEQ_LEN = 64, 128


@dataclass
class FakeDrafts:
    """One draft, on the default route."""

    ask: Callable[[Callable[[], None]], None]
    max_route_drafts = 0
    version: int = FLOOR_VERSION
    num_swaps: int = 0

    @property
    def routes(self) -> list[str]:
        return [DEFAULT_ROUTE]

    @property
    def versions(self) -> Mapping[str, int]:
        return {DEFAULT_ROUTE: self.version}

    def follow(self, wanted: Iterable[str]) -> None:
        """There is one draft."""

    def stage(self, route: str, manifest: AdapterManifest | None, weights: bytes = b"") -> int:
        if manifest is None:
            return FLOOR_VERSION
        if sha256_of(weights) != manifest.sha256:
            raise AdapterRejectedError(f"draft_version={manifest.draft_version} has another sha256")
        return manifest.draft_version

    def swap(self, route: str, staged: int) -> SwapReport:
        self.ask(lambda: setattr(self, "version", staged))
        self.num_swaps += 1
        return SwapReport(staged, 0.0, under_load=False)


@dataclass
class _Running:
    request: GenerationRequest
    handle: GenerationHandle
    token_ids: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    rounds: list[CapturedRound] = field(default_factory=list)
    is_cancelled: bool = False
    has_begun: bool = False


class FakeEngine:
    """A thread that gives every running request two tokens a turn."""

    router = None
    costs = None
    tokenizer: Any = None
    target_revision = "fake"
    max_seq_len = MAX_SEQ_LEN
    vocab_size = VOCAB_SIZE
    eos_token_ids: frozenset[int] = frozenset()
    passes = "fake"

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._running: list[_Running] = []
        self._counts: dict[DrafterVersion, RoundCounters] = {}
        self._closed = False
        self.drafts = FakeDrafts(self._ask)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return not self._closed

    @property
    def draft_version(self) -> int:
        return self.drafts.version

    def check(self, request: GenerationRequest) -> None:
        prompt, longest = (
            request.prompt_token_ids,
            len(request.prompt_token_ids) + request.sampling.max_tokens,
        )
        if not prompt:
            raise ValueError("prompt has 0 tokens")
        if not all(0 <= token < VOCAB_SIZE for token in prompt):
            raise ValueError("prompt holds a token id outside the vocabulary")
        if longest > MAX_SEQ_LEN:
            raise ValueError(f"prompt and max_tokens exceed max_seq_len={MAX_SEQ_LEN}")

    def submit(self, request: GenerationRequest, on_event: EventCallback | None = None) -> GenerationHandle:
        self.check(request)
        if self._closed:
            raise EngineClosedError("the engine is closed")
        handle = GenerationHandle(
            request.request_id, lambda: setattr(running, "is_cancelled", True), on_event
        )
        running = _Running(request, handle)
        self._commands.put(lambda: self._running.append(running))
        return handle

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=0,
            num_slots=8,
            num_cached_tokens=0,
            max_cached_tokens=0,
            num_prompt_tokens=0,
            num_output_tokens=sum(counted.num_output_tokens for counted in self._counts.values()),
            draft_versions=dict(self.drafts.versions),
            num_draft_tokens=1,
            is_draft_length_fixed=True,
            route_counts={DEFAULT_ROUTE: dict(self._counts)},
            round_s_median=0.0,
            mean_batch_size=0.0,
            num_swaps=self.drafts.num_swaps,
            num_swaps_under_load=0,
            swap_pause_s_max=0.0,
            draft_disabled_reason="",
            prefix_cache=PrefixCacheStats(),
        )

    def close(self, timeout_s: float = 10.0) -> None:
        self._closed = True
        self._commands.put(lambda: None)
        self._thread.join(timeout_s)

    def _ask(self, act: Callable[[], None]) -> None:
        done = threading.Event()
        self._commands.put(lambda: (act(), done.set())[0])
        done.wait(10)

    def _run(self) -> None:
        while not self._closed:
            with contextlib.suppress(queue.Empty):
                self._commands.get(timeout=0.001 if self._running else 1.0)()
            for running in list(self._running):
                self._turn(running)
        for running in self._running:
            self._end(running, (), "cancelled")

    def _turn(self, running: _Running) -> None:
        request, version = running.request, self.drafts.version
        if running.is_cancelled:
            self._end(running, (), "cancelled")
            return
        if request.sampling.max_tokens == 0:
            self._end(running, (), "length")
            return
        last = [*request.prompt_token_ids, *running.token_ids][-1]
        accepted = version % 2
        emitted = [(last + 1 + step) % VOCAB_SIZE for step in range(1 + accepted)]
        stops = request.sampling.stop_token_ids
        kept: list[int] = []
        reason: FinishReason | None = None
        for token in emitted:
            kept.append(token)
            if token in stops:
                reason = "stop"
                break
            if len(running.token_ids) + len(kept) >= request.sampling.max_tokens:
                reason = "length"
                break
        self._note(running, kept, min(accepted, len(kept)), version)
        if reason is None:
            running.handle.deliver(self._event(running, kept))
        else:
            self._end(running, tuple(kept), reason)

    def _note(self, running: _Running, kept: list[int], num_accepted: int, version: int) -> None:
        by = DrafterVersion(MODEL_DRAFTER, version)
        counted = self._counts.setdefault(by, RoundCounters())
        counted.add_round(drafted=1, attempted=1, accepted=num_accepted, emitted=len(kept))
        num_before = len(running.token_ids)
        running.token_ids += kept
        running.versions += [version] * len(kept)
        top_ids = np.array([[kept[0], 0], [(kept[0] + 1) % VOCAB_SIZE, 0]], np.int32)
        running.rounds.append(
            CapturedRound(
                start=len(running.request.prompt_token_ids) + num_before,
                drafter_id=MODEL_DRAFTER,
                draft_route=DEFAULT_ROUTE,
                draft_version=version,
                num_accepted=num_accepted,
                num_attempted=1,
                drafted_token_ids_G=np.array([kept[0] if version % 2 else 0], np.int32),
                drafted_target_logprobs_G=np.zeros(1, np.float32),
                drafted_draft_logprobs_G=np.zeros(1, np.float32),
                emitted_target_logprobs_C=np.zeros(len(kept), np.float32),
                topk_token_ids_EK=top_ids,
                topk_logprobs_EK=np.array([[0.0, -20.0]] * 2, np.float16),
                retemper_E=np.zeros(2, np.float32),
            )
        )

    def _event(self, running: _Running, kept: Iterable[int]) -> TokenEvent:
        kept, wanted = tuple(kept), running.request.sampling.logprobs
        top = () if wanted is None else tuple(((token, 0.0),) for token in kept)
        prompt = None if running.has_begun else _prompt_logprobs(running.request)
        running.has_begun = True
        return TokenEvent(running.request.request_id, kept, (0.0,) * len(kept), top, prompt_logprobs=prompt)

    def _end(self, running: _Running, kept: tuple[int, ...], reason: FinishReason) -> None:
        request = running.request
        self._running.remove(running)
        stop_id = running.token_ids[-1] if reason == "stop" else None
        generation = Generation(
            request_id=request.request_id,
            choice_index=request.choice_index,
            route=request.route or DEFAULT_ROUTE,
            sampling=request.sampling,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=running.token_ids,
            finish_reason=reason,
            logprobs=[0.0] * len(running.token_ids),
            top_logprobs=[],
            num_rounds=len(running.rounds),
            num_drafted=len(running.rounds),
            num_attempted=len(running.rounds),
            num_accepted=sum(each.num_accepted for each in running.rounds),
            draft_versions=[VersionSpan(v, i, i + 1) for i, v in enumerate(running.versions)],
            accepted_histogram=[0, 0],
            stop_token_id=stop_id,
            captured_rounds=running.rounds if request.capture else [],
        )
        generation.prompt_logprobs = _prompt_logprobs(request)
        running.handle.deliver(replace(self._event(running, kept), generation=generation))


def _prompt_logprobs(request: GenerationRequest) -> PromptLogprobs | None:
    """It is certain of t + 1; every other token is as likely as the rest."""
    num_top, prompt = request.sampling.prompt_logprobs, np.array(request.prompt_token_ids)
    if num_top is None:
        return None
    expected_T = (prompt[:-1] + 1) % VOCAB_SIZE
    is_expected_T = prompt[1:] == expected_T
    top_TK = (expected_T[:, None] + np.arange(num_top)) % VOCAB_SIZE
    likely_TK = np.where(np.arange(num_top) == 0, 0.0, -20.0) * np.ones(top_TK.shape)
    return PromptLogprobs(
        np.where(is_expected_T, 0.0, -20.0).astype(np.float32),
        np.where(is_expected_T, 1, 2),
        top_TK,
        likely_TK.astype(np.float32),
    )
