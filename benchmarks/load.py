"""The whole service under load: requests that come as they come, below what it can do and far above.

What it can do is measured first, by as many clients as it has slots, each of which asks again as soon as it
is answered. Then requests arrive as a Poisson process at shares of that rate. Latencies count from when a
request was due; the clients are a process of their own.
"""

import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.load_client import LoadSpec, Sent, Timing, closed_loop, open_loop, poisson_arrivals, until
from deploy.demo.corpus import DOMAINS, prompts
from deploy.demo.question_rows import check_folder, rows

if TYPE_CHECKING:
    from deploy.learner_process import LearnerHandle

NUM_QUESTIONS = 2_000
"""Different ones at most; then they are asked again."""
PERCENTILES = (50, 95, 99)
_LEARNER_S = 600.0
_WARM_SHARE = 0.25
"""Of a load's seconds, before anything is measured."""

Report = Callable[[str], None]


def questions(folder: Path | None) -> tuple[str, ...]:
    """Of the rows of every .jsonl file, files in turn, else of the demo's domains in turn. Raises
    DataError."""
    files = check_folder(folder)
    streams: list[Iterator[str]]
    if files:
        streams = [(row.question for row in rows(file)) for file in files]
    else:
        streams = [_demo_questions(domain) for domain in DOMAINS]
    return tuple(islice(_in_turn(streams), NUM_QUESTIONS))


def _demo_questions(domain: str) -> Iterator[str]:
    return (prompt.messages[-1]["content"] for prompt in prompts(domain, "replay"))


def _in_turn(streams: Sequence[Iterator[str]]) -> Iterator[str]:
    left = list(streams)
    while left:
        for stream in list(left):
            if (question := next(stream, None)) is None:
                left.remove(stream)
            else:
                yield question


@contextmanager
def client_process() -> Iterator[ProcessPoolExecutor]:
    """Where `open_loop` and `closed_loop` run, one after another."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def await_learner(learner: "LearnerHandle | None") -> None:
    """Until it has loaded its models, which takes a core. Raises TimeoutError."""
    deadline_s = time.monotonic() + _LEARNER_S
    while learner is not None and "num_steps" not in learner.snapshot():
        if time.monotonic() >= deadline_s:
            raise TimeoutError(f"the learner did not start within {_LEARNER_S:g} s; nothing was measured")
        time.sleep(1.0)


def measure_capacity(
    clients: ProcessPoolExecutor, spec: LoadSpec, num_clients: int, seconds: float, report: Report
) -> dict[str, Any]:
    """The figures of a closed loop; `requests_per_s` is what shares of load are shares of."""
    clients.submit(closed_loop, spec, num_clients, _WARM_SHARE * seconds).result()
    sent = clients.submit(closed_loop, spec, num_clients, seconds).result()
    found = figures(sent, seconds)
    report(f"capacity: {found['requests_per_s']:.1f} requests/s, {found['tokens_per_s']:.0f} tokens/s")
    if not found["num_answered"]:
        raise RuntimeError(f"no request was answered, so there is no capacity: {found['failures']}")
    return found


def measure_loads(
    clients: ProcessPoolExecutor,
    spec: LoadSpec,
    capacity_per_s: float,
    loads: Sequence[float],
    seconds: float,
    seed: int,
    report: Report,
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """(figures by load, every request's own by load). `loads`: shares of the capacity; each starts when the
    requests of the one before have ended."""
    by_load, series = dict[str, Any](), dict[str, list[Any]]()
    for number, load in enumerate(loads):
        rate_per_s = load * capacity_per_s
        arrivals = until(seconds, poisson_arrivals(rate_per_s, seed + number))
        sent = clients.submit(open_loop, spec, arrivals).result()
        found = {"offered_per_s": rate_per_s, **figures(sent, seconds)}
        by_load[f"{load:g}"] = found
        series[f"{load:g}"] = [_row(timing) for timing in sent.timings]
        report(f"{load:.0%} of capacity: {_sentence(found)}")
    return by_load, series


def figures(sent: Sent, seconds: float) -> dict[str, Any]:
    """Of a run whose requests were due in `seconds`. Rates count what ended, and tokens that came, within
    them. Latencies are in seconds and count from when a request was due."""
    answered = [timing for timing in sent.timings if timing.is_answered]
    refused = [timing for timing in sent.timings if timing.is_refused]
    failures = Counter(timing.fault for timing in sent.timings if timing.fault)
    in_time = [timing for timing in answered if timing.ended_s <= seconds]
    tokens = sum(num for timing in sent.timings for at_s, num in timing.chunks if at_s <= seconds)
    return {
        "seconds": seconds,
        "num_requests": len(sent.timings),
        "num_answered": len(answered),
        "num_refused": len(refused),
        "num_failed": sum(failures.values()),
        "failures": dict(failures),
        "requests_per_s": len(in_time) / seconds,
        "tokens_per_s": tokens / seconds,
        "time_to_first_token_s": percentiles(
            each.chunks[0][0] - each.due_s for each in answered if each.chunks
        ),
        "inter_token_latency_s": percentiles(gap for each in answered for gap in inter_token_gaps(each)),
        "chunk_gap_s": percentiles(gap for each in answered for gap, _ in chunk_gaps(each)),
        "end_to_end_s": percentiles(each.ended_s - each.due_s for each in answered),
        "refusal_s": percentiles(each.ended_s - each.due_s for each in refused),
        "num_refused_without_retry_after": sum(each.retry_after is None for each in refused),
        "client_lag_s": percentiles(each.sent_s - each.due_s for each in sent.timings),
        "client_processor_s": sent.processor_s,
    }


def chunk_gaps(timing: Timing) -> Iterator[tuple[float, int]]:
    """(seconds since the chunk before, tokens) of every chunk but the first."""
    for (before_s, _), (at_s, num_tokens) in zip(timing.chunks, timing.chunks[1:], strict=False):
        yield at_s - before_s, num_tokens


def inter_token_gaps(timing: Timing) -> Iterator[float]:
    """As `everdraft_inter_token_latency_seconds` defines them: a chunk's gap, divided among its tokens."""
    for gap_s, num_tokens in chunk_gaps(timing):
        yield from [gap_s / num_tokens] * num_tokens


def percentiles(values: Iterator[float]) -> dict[str, float | None]:
    """With linear interpolation, and the largest; None of nothing."""
    found = np.fromiter(values, float)
    names = [f"p{percent}" for percent in PERCENTILES]
    if not len(found):
        return dict.fromkeys([*names, "max"])
    at = np.percentile(found, PERCENTILES)
    return {**dict(zip(names, map(float, at), strict=True)), "max": float(found.max())}


def bars(by_load: Mapping[str, Any]) -> dict[str, Any]:
    """What is promised of the highest load against 90 % of capacity; None where one was not measured."""
    busy = by_load.get("0.9", {}).get("inter_token_latency_s", {}).get("p99")
    highest = max(by_load.values(), key=lambda found: float(found["offered_per_s"]))
    over = highest["inter_token_latency_s"]["p99"]
    return {
        "itl_p99_over_that_at_90_percent": None if not busy or over is None else over / busy,
        "refusal_p99_s": highest["refusal_s"]["p99"],
        "all_refusals_have_retry_after": not highest["num_refused_without_retry_after"],
        "num_failed": sum(found["num_failed"] for found in by_load.values()),
    }


def _row(timing: Timing) -> dict[str, Any]:
    """One request for the report; seconds to a tenth of a millisecond."""
    first_s = timing.chunks[0][0] if timing.chunks else math.nan
    times = {"due_s": timing.due_s, "first_token_s": first_s, "ended_s": timing.ended_s}
    rounded = {name: None if math.isnan(at_s) else round(at_s, 4) for name, at_s in times.items()}
    return {**rounded, "status": timing.status, "num_tokens": timing.num_tokens}


def _sentence(found: Mapping[str, Any]) -> str:
    def ms(name: str, percent: str) -> str:
        value = found[name][percent]
        return "-" if value is None else f"{1000 * value:.1f} ms"

    return (
        f"{found['num_requests']} requests, {found['num_answered']} answered, {found['num_refused']} refused "
        f"(p99 after {ms('refusal_s', 'p99')}), {found['num_failed']} failed; "
        f"{found['tokens_per_s']:.0f} tokens/s; first token p50 {ms('time_to_first_token_s', 'p50')}, "
        f"p99 {ms('time_to_first_token_s', 'p99')}; between tokens p50 {ms('inter_token_latency_s', 'p50')}, "
        f"p99 {ms('inter_token_latency_s', 'p99')}; clients late by {ms('client_lag_s', 'p99')} (p99)"
    )
