"""Load on the real app: requests come when they are due, refusals are counted, and nothing hides a stall."""

import threading
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, pvariance
from typing import Any

import pytest

from benchmarks.load import bars, client_process, figures, measure_capacity, measure_loads, questions
from benchmarks.load_client import LoadSpec, Sent, Timing, closed_loop, open_loop, poisson_arrivals, until
from benchmarks.load_views import plot_load, plot_soak
from benchmarks.process_census import CensusTaker, growth, role_of
from benchmarks.soak import growths, measure_soak
from buffer.redis_server import EmbeddedRedis
from deploy.demo.question_rows import DataError
from serving.settings import ServingSettings
from tests.support.live_server import LiveServer, live_server
from tests.support.tiny_models import save_tiny_caller

SAID = [f"word {number} " for number in range(12)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One slot and one place in the queue, so that a third request at a time is refused."""
    target = save_tiny_caller(tmp_path_factory.mktemp("caller"), SAID)
    settings = ServingSettings(
        compile="off", target=target, num_slots=1, max_seq_len=256, max_queued_requests=1
    )
    with live_server(settings) as live:
        yield live


def spec(server: LiveServer, max_tokens: int = 8) -> LoadSpec:
    return LoadSpec(server.url, ("Who?", "Why?"), max_tokens)


def test_arrivals_are_a_poisson_process_and_follow_from_the_seed() -> None:
    """Gaps of mean 1/rate whose variance is the mean's square; of 20,000, each within five of its errors."""
    arrivals = list(islice(poisson_arrivals(4.0, seed=1), 20_000))
    gaps = [late - early for early, late in pairwise(arrivals)]
    assert fmean(gaps) == pytest.approx(0.25, rel=5 / 20_000**0.5)
    assert pvariance(gaps) == pytest.approx(0.25**2, rel=5 * (8 / 20_000) ** 0.5)
    assert arrivals == list(islice(poisson_arrivals(4.0, seed=1), 20_000))
    assert until(10.0, poisson_arrivals(4.0, seed=1)) == tuple(at for at in arrivals if at < 10.0)


def test_figures_of_known_timings() -> None:
    """Three answers, a refusal and a failure: latencies count from when they were due, and a chunk's gap is
    divided among its tokens."""
    sent = Sent(
        0.0,
        (
            Timing(0.0, 0.5, 1.0, 200, chunks=((0.6, 1), (0.8, 2), (1.0, 4))),
            Timing(1.0, 1.0, 2.0, 200, chunks=((1.2, 1), (2.0, 1))),
            Timing(3.0, 3.0, 5.0, 200, chunks=((4.5, 1),)),
            Timing(3.5, 3.5, 3.6, 429, "2"),
            Timing(3.5, 3.5, 3.7, 0, fault="ServerDisconnectedError: gone"),
        ),
        0.25,
    )
    found = figures(sent, 4.0)
    counts = {name: found[f"num_{name}"] for name in ("requests", "answered", "refused", "failed")}
    assert counts == {"requests": 5, "answered": 3, "refused": 1, "failed": 1}
    assert found["failures"] == {"ServerDisconnectedError: gone": 1}
    assert (found["requests_per_s"], found["tokens_per_s"]) == (2 / 4.0, 9 / 4.0)
    assert found["time_to_first_token_s"]["p50"] == pytest.approx(0.6)
    assert found["inter_token_latency_s"]["p50"] == pytest.approx(0.05)  # .1 twice, .05 four times, .8
    assert found["inter_token_latency_s"]["max"] == pytest.approx(0.8)
    assert found["chunk_gap_s"]["p50"] == pytest.approx(0.2)
    assert found["end_to_end_s"]["p50"] == pytest.approx(1.0)
    assert found["refusal_s"]["max"] == pytest.approx(0.1)
    assert found["client_lag_s"]["max"] == pytest.approx(0.5)
    assert found["num_refused_without_retry_after"] == 0


def test_loads_on_the_real_app(server: LiveServer, tmp_path: Path) -> None:
    """In the clients' own process. Far above capacity there are refusals, each with Retry-After."""
    with client_process() as clients:
        capacity = measure_capacity(clients, spec(server), 1, 1.0, print)
        by_load, series = measure_loads(
            clients, spec(server), capacity["requests_per_s"], [0.2, 10.0], 2.0, 0, print
        )
    assert capacity["num_failed"] == 0 and capacity["num_refused"] == 0
    for load, found in by_load.items():
        assert found["num_failed"] == 0
        assert found["num_answered"] + found["num_refused"] == found["num_requests"] == len(series[load])
        assert found["num_refused_without_retry_after"] == 0
    assert by_load["10"]["num_refused"] > 0
    answered = [row for row in series["10"] if row["status"] == 200]
    assert answered and all(row["due_s"] < row["first_token_s"] <= row["ended_s"] for row in answered)
    assert all(row["num_tokens"] == 8 for row in answered)
    assert bars(by_load)["all_refusals_have_retry_after"]
    plot_load({"capacity": capacity, "by_load": by_load}, series, tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 0


def test_a_stall_shows_in_every_request_that_was_due_meanwhile(server: LiveServer) -> None:
    """The event loop of the service stands still: a client that waited for its answers before it sent more
    would report one slow request, and hide the others."""
    app_loop, stalled = server.parts.context.admission, threading.Event()
    admit = app_loop.admit

    def stalling(*asked: Any) -> object:
        if not stalled.is_set():
            stalled.set()
            threading.Event().wait(1.0)
        return admit(*asked)

    app_loop.admit = stalling  # type: ignore[method-assign, assignment]
    try:
        sent = open_loop(spec(server, 2), [0.1 * number for number in range(10)])
    finally:
        app_loop.admit = admit  # type: ignore[method-assign]
    assert stalled.is_set() and not [timing.fault for timing in sent.timings if timing.fault]
    waits_s = [timing.ended_s - timing.due_s for timing in sent.timings]
    assert sum(wait_s > 0.3 for wait_s in waits_s) >= 6


def test_what_breaks_off_is_a_failure_and_no_answer(server: LiveServer) -> None:
    refused = open_loop(LoadSpec(server.url, ("Who?",), 10_000), [0.0])
    [timing] = refused.timings
    assert timing.status == 400 and "max_tokens" in timing.fault and not timing.is_answered
    [gone] = open_loop(LoadSpec("http://127.0.0.1:9", ("Who?",), 4), [0.0]).timings
    assert gone.status == 0 and gone.fault


def test_a_closed_loop_keeps_so_many_requests_under_way(server: LiveServer) -> None:
    """When one is due, at most one other has not ended."""
    timings = sorted(closed_loop(spec(server), 2, 3.0).timings, key=lambda timing: timing.due_s)
    assert len(timings) >= 2
    for number, timing in enumerate(timings):
        under_way = [before for before in timings[:number] if before.ended_s > timing.due_s]
        assert len(under_way) < 2


def test_a_soak_takes_stock_of_its_processes_and_of_redis(server: LiveServer, tmp_path: Path) -> None:
    with EmbeddedRedis() as redis, client_process() as clients:
        found, series = measure_soak(
            clients, spec(server, 2), redis.url, 20.0, 40, every_s=0.05, seed=0, report=print
        )
    assert found["num_answered"] + found["num_refused"] == 40 and found["num_failed"] == 0
    for census in series["census"]:
        assert {"driver", "redis"} <= set(census["processes"])
        assert census["processes"]["driver"]["pss_bytes"] > 2**20 and census["redis_bytes"] > 2**19
    ended = [census["num_ended"] for census in series["census"]]
    assert ended == sorted(ended) and ended[-1] <= 40
    plot_soak(found, series, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 0


def test_growth_is_of_the_last_tenth_over_the_first() -> None:
    assert growth([1.0] * 100) == 0.0
    assert growth([100.0 + number / 10 for number in range(101)]) == pytest.approx(9.1 / 100.45, rel=1e-3)
    assert growth([100.0] * 50 + [900.0] + [100.0] * 50) == 0.0, "one spike is no growth"
    assert growth([1.0] * 9) is None


def test_a_process_that_holds_more_and_more_is_found() -> None:
    """And one that was started again has no growth of its own: it is named."""
    with EmbeddedRedis() as redis:
        taker, hoard, taken = CensusTaker(redis.url), list[bytearray](), []
        for _ in range(20):
            hoard.append(bytearray(b"x" * 8 * 2**20))
            taken.append(taker.take())
        taker.close()
    found = growths(taken)
    assert found["largest_memory_growth"] > 0.03
    assert found["growth"]["redis"]["pss_bytes"] < 0.03


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("ray::ServeReplica:everdraft:replica", "replica"),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=s", "raylet"),
        ("/usr/bin/python3 /x/buffer/redis_supervisor.py 7 /usr/bin/redis-server", "redis supervisor"),
        ("/usr/bin/redis-server 127.0.0.1:7", "redis"),
        ("/usr/bin/sleep 5", "sleep"),
    ],
)
def test_a_process_is_named_by_what_it_does(command: str, role: str) -> None:
    assert role_of(command) == role


def test_questions_are_the_demos_or_those_of_a_folder(tmp_path: Path) -> None:
    assert len(set(questions(None))) > 1_000
    with pytest.raises(DataError, match="holds no"):
        questions(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "three"}\n')
    assert questions(tmp_path) == ("one", "three", "two")
