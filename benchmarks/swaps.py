"""What clients of a running engine notice of a swap, and what capture costs them; our engine or vLLM's.

Eight streams without a pause, a swap a second, there (what was learnt from the demo's traffic) and back (the
floor). A gap is the time between two events of one stream.
"""

import itertools
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.adapted import Adapter
from benchmarks.engines import manifest_of
from buffer.names import DEFAULT_ROUTE
from serving.engine.request import GenerationRequest, SamplingParams, TokenEvent
from serving.serving_engine import ServingEngine

NUM_STREAMS = 8
NUM_PROMPTS = 64
PAUSE_S = 1.0
_ENDS_S = 60.0


@dataclass
class Streams:
    """Requests that follow one another, `NUM_STREAMS` at a time, and when each one's events came."""

    engine: ServingEngine
    prompts: Iterator[list[int]]
    num_tokens: int
    seen_s: dict[str, list[float]] = field(default_factory=dict)
    num_failed: int = 0
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _ends: threading.Event = field(default_factory=threading.Event)
    _running: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def begin(self) -> None:
        for _ in range(NUM_STREAMS):
            self._next()

    def end(self) -> None:
        """Wait for the last ones."""
        self._ends.set()
        for _ in range(NUM_STREAMS):
            if not self._running.acquire(timeout=_ENDS_S):
                raise RuntimeError(f"a stream did not end within {_ENDS_S:.0f} s")

    def _next(self) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=self.num_tokens, ignore_eos=True)
        request = GenerationRequest(f"stream-{next(self._numbers)}", tuple(next(self.prompts)), sampling)
        self.seen_s[request.request_id] = []
        self.engine.submit(request, self._on_event)

    def _on_event(self, event: TokenEvent) -> None:
        self.seen_s[event.request_id].append(time.perf_counter())
        if event.generation is None:
            return
        self.num_failed += event.generation.finish_reason != "length"
        if self._ends.is_set():
            self._running.release()
        else:
            self._next()

    def gaps(self) -> list[tuple[float, float]]:
        """(beginning, end) of each."""
        return [pair for times in list(self.seen_s.values()) for pair in itertools.pairwise(times)]


def measure_swaps(
    engine: Any, adapter: Adapter, prompts: Iterator[list[int]], *, num_swaps: int, num_tokens: int
) -> dict[str, Any]:
    """For each swap, the largest gap of any stream that overlaps it, in median gaps; the same for staging."""
    drafts, manifest = engine.drafts, manifest_of(engine, adapter)
    streams = Streams(engine, itertools.cycle(list(itertools.islice(prompts, NUM_PROMPTS))), num_tokens)
    staging: list[tuple[float, float]] = []
    swaps: list[tuple[float, float]] = []
    applied_s = []
    streams.begin()
    time.sleep(2 * PAUSE_S)
    for number in range(num_swaps):
        version, weights = (None, b"") if number % 2 else (manifest, adapter.weights)
        began_s = time.perf_counter()
        staged = drafts.stage(DEFAULT_ROUTE, version, weights)
        staged_s = time.perf_counter()
        applied_s.append(drafts.swap(DEFAULT_ROUTE, staged).swap_s)
        staging.append((began_s, staged_s))
        swaps.append((staged_s, time.perf_counter()))
        time.sleep(PAUSE_S)
    streams.end()
    gaps = streams.gaps()
    quiet = [end - begin for begin, end in gaps if not _overlaps((begin, end), [*staging, *swaps])]
    step_s = statistics.median(quiet)
    return {
        "num_swaps": num_swaps,
        "num_requests": len(streams.seen_s),
        "num_failed": streams.num_failed,
        "median_step_ms": 1e3 * step_s,
        "quiet_p99_in_steps": statistics.quantiles(quiet, n=100)[-1] / step_s,
        "applying_ms_median": 1e3 * statistics.median(applied_s),
        "applying_ms_max": 1e3 * max(applied_s),
        "swap_gaps_in_steps": [_largest(gaps, span) / step_s for span in swaps],
        "staging_gaps_in_steps": [_largest(gaps, span) / step_s for span in staging],
    }


def _overlaps(gap: tuple[float, float], spans: list[tuple[float, float]]) -> bool:
    return any(gap[0] < end and begin < gap[1] for begin, end in spans)


def _largest(gaps: list[tuple[float, float]], span: tuple[float, float]) -> float:
    return max((end - begin for begin, end in gaps if _overlaps((begin, end), [span])), default=0.0)
