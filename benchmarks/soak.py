"""The whole service for many requests at a steady load: what each of its processes holds must not grow.

Growth is of what the requests behind the first quarter brought: until then caches and bounds fill. Redis
keeps records up to its bounds, so a soak sets one that it reaches within that quarter.
"""

import time
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import Any

from benchmarks.load import Report, figures
from benchmarks.load_client import LoadSpec, Sent, open_loop, poisson_arrivals
from benchmarks.process_census import CLIENT, Census, CensusTaker, growth

SETTLED_SHARE = 0.25
"""Of the requests."""
_MIB = 2**20


def soak_bounds(num_requests: int) -> dict[str, Any]:
    """Settings of `serving` under which Redis is full of records before growth counts."""
    return {"max_records_per_route": max(1, num_requests // 10)}


def measure_soak(
    clients: ProcessPoolExecutor,
    spec: LoadSpec,
    redis_url: str,
    rate_per_s: float,
    num_requests: int,
    every_s: float,
    seed: int,
    report: Report,
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """(figures, a census every `every_s` seconds with the requests that had ended by then)."""
    arrivals = tuple(islice(poisson_arrivals(rate_per_s, seed), num_requests))
    taker = CensusTaker(redis_url)
    try:
        asked = clients.submit(open_loop, spec, arrivals)
        taken = _watch(taker, asked, every_s, report)
    finally:
        taker.close()
    sent = asked.result()
    ends_s = sorted(sent.began_at_s + timing.ended_s for timing in sent.timings)
    num_ended = [bisect_right(ends_s, census.at_s) for census in taken]
    settled = [
        census
        for census, ended in zip(taken, num_ended, strict=True)
        if SETTLED_SHARE * num_requests <= ended < num_requests
    ]
    found = {"offered_per_s": rate_per_s, **figures(sent, arrivals[-1]), **growths(settled)}
    series = [
        {"num_ended": ended, **census.to_json()} for census, ended in zip(taken, num_ended, strict=True)
    ]
    return found, {"census": series}


def _watch(taker: CensusTaker, asked: "Future[Sent]", every_s: float, report: Report) -> list[Census]:
    taken, began_s = list[Census](), time.monotonic()
    while not asked.done():
        taken.append(taker.take())
        if len(taken) % 10 == 1:
            held = {role: holding.pss_bytes for role, holding in taken[-1].processes.items()}
            largest = sorted(held, key=lambda role: held[role], reverse=True)[:3]
            said = ", ".join(f"{role} {held[role] / _MIB:.0f} MiB" for role in largest)
            report(
                f"{time.monotonic() - began_s:.0f} s: {said}, redis {taken[-1].redis_bytes / _MIB:.0f} MiB"
            )
        time.sleep(every_s)
    return taken


def growths(settled: Sequence[Census]) -> dict[str, Any]:
    """By process, of those that lived from the first to the last of them; the clients are not the
    service's."""
    roles = dict.fromkeys(role for census in settled for role in census.processes)
    lived = [role for role in roles if _lived(role, settled)]
    by_process = {
        role: {
            name: growth([float(getattr(census.processes[role], name)) for census in settled])
            for name in ("rss_bytes", "pss_bytes", "num_descriptors", "num_threads")
        }
        for role in lived
    }
    ours = [found["pss_bytes"] for role, found in by_process.items() if role != CLIENT]
    return {
        "growth": by_process,
        "largest_memory_growth": max((grown for grown in ours if grown is not None), default=None),
        "processes_that_came_or_went": sorted(roles.keys() - set(lived)),
        "redis_memory_growth": growth([float(census.redis_bytes) for census in settled]),
        "redis_keys": [settled[0].redis_keys, settled[-1].redis_keys] if settled else [],
    }


def _lived(role: str, settled: Sequence[Census]) -> bool:
    pids = {census.processes[role].pid if role in census.processes else None for census in settled}
    return len(pids) == 1
