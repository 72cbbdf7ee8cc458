"""A replica gives routes drafts of their own as the feed says: opened, swapped and closed one by one, a few
at most; prompts without a tag are routed by the table; no text depends on any of it."""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from buffer.memory_store import MemoryAdapterFeed
from buffer.records import AdapterManifest, ServingStatus
from buffer.route_table import RouteTable
from serving.adapter_watcher import AdapterWatcher
from serving.engine import Generation, GenerationRequest, SamplingParams
from serving.local import LocalEngine, load_engine
from serving.metrics import ServingMetrics
from serving.options import EngineOptions
from serving.status import serving_status
from tests.support.tiny_adapters import tiny_adapter

GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
SEEDED = SamplingParams(seed=7, max_tokens=30, ignore_eos=True)
SQL_PROMPT, CODE_PROMPT = tuple(range(10, 40)), tuple(range(200, 230))
ENGINE = {"num_slots": 4, "max_seq_len": 128, "num_draft_tokens": 3}


@pytest.fixture
def engine(tiny_pair: tuple[str, str]) -> Iterator[LocalEngine]:
    with load_engine(*tiny_pair, EngineOptions(max_route_drafts=2, **ENGINE)) as running:
        yield running


@pytest.fixture
def feed() -> MemoryAdapterFeed:
    return MemoryAdapterFeed()


def watch(engine: LocalEngine, feed: MemoryAdapterFeed) -> AdapterWatcher:
    def status() -> ServingStatus:
        return serving_status(engine, replica_id="r0", at_s=time.time(), num_dropped_records=0)

    return AdapterWatcher(
        engine.drafts,
        feed,
        replica_id="r0",
        status=status,
        watch_interval_s=0.01,
        status_interval_s=0.02,
        router=engine.router,
    )


def publish(engine: LocalEngine, feed: MemoryAdapterFeed, route: str, version: int) -> AdapterManifest:
    manifest, weights = tiny_adapter(
        engine.pair.draft_id, draft_version=version, target_revision=engine.pair.target_revision, route=route
    )
    feed.publish(manifest, weights)
    return manifest


def run(engine: LocalEngine, *routes: str | None, sampling: SamplingParams = GREEDY) -> list[Generation]:
    """One request a route, in the same batches."""
    requests = [
        GenerationRequest(str(index), (5, 6, 7 + index), sampling, route=route)
        for index, route in enumerate(routes)
    ]
    return [handle.result(30) for handle in [engine.submit(request) for request in requests]]


def table(engine: LocalEngine, **centroids: np.ndarray) -> RouteTable:
    rows = np.stack(list(centroids.values())).astype(np.float32)
    revision = engine.pair.target_revision
    return RouteTable(revision, 1.0, rows.mean(0), rows, tuple(centroids), min_similarity=0.5)


def embedding(engine: LocalEngine, prompt: tuple[int, ...]) -> np.ndarray:
    request = GenerationRequest("e", prompt, replace(GREEDY, max_tokens=1), capture=True)
    found = engine.submit(request).result(30).prompt_embedding_H
    assert found is not None
    return found


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_texts_are_the_targets_own_whatever_drafts_of_routes_share_a_batch(
    engine: LocalEngine, feed: MemoryAdapterFeed, tiny_pair: tuple[str, str], sampling: SamplingParams
) -> None:
    routes = ("sql", "code", None, "chat")
    watcher = watch(engine, feed)
    for version, route in enumerate(("sql", "code", "default"), start=1):
        publish(engine, feed, route, version)
    watcher.follow_all()
    generations = run(engine, *routes, sampling=sampling)
    versions = [{span.draft_version for span in each.draft_versions} for each in generations]
    assert versions == [{1}, {2}, {3}, {3}]
    with load_engine(*tiny_pair, EngineOptions(**{**ENGINE, "num_draft_tokens": 0})) as alone:
        plain = run(alone, *routes, sampling=sampling)
    assert [each.output_token_ids for each in generations] == [each.output_token_ids for each in plain]
    assert [each.num_drafted for each in plain] == [0] * 4


def test_a_route_with_an_adapter_gets_a_draft_and_the_others_keep_theirs(
    engine: LocalEngine, feed: MemoryAdapterFeed
) -> None:
    watcher = watch(engine, feed)
    publish(engine, feed, "default", 4)
    watcher.follow_all()
    publish(engine, feed, "sql", 1)
    watcher.follow_all()
    assert engine.draft_versions == {"default": 4, "sql": 1}
    publish(engine, feed, "sql", 2)
    watcher.follow()
    assert engine.draft_versions == {"default": 4, "sql": 2}
    assert (watcher.served_version, watcher.last_error) == (4, "")


def test_a_route_that_is_rolled_back_to_the_floor_closes_and_opens_again_with_its_next_adapter(
    engine: LocalEngine, feed: MemoryAdapterFeed
) -> None:
    """The learner takes it so: without a draft of its own a route is served by the default route's."""
    watcher = watch(engine, feed)
    publish(engine, feed, "default", 7)
    publish(engine, feed, "sql", 1)
    watcher.follow_all()
    feed.rollback("sql", "worse")
    watcher.follow_all()
    assert engine.draft_versions == {"default": 7}
    assert {span.draft_version for span in run(engine, "sql")[0].draft_versions} == {7}
    publish(engine, feed, "sql", 2)
    watcher.follow_all()
    assert engine.draft_versions == {"default": 7, "sql": 2}


def test_routes_are_bounded_the_open_stay_and_the_next_opens_when_one_closes(
    engine: LocalEngine, feed: MemoryAdapterFeed
) -> None:
    watcher = watch(engine, feed)
    for route in ("sql", "code"):
        publish(engine, feed, route, 1)
    watcher.follow_all()
    publish(engine, feed, "a", 1)
    watcher.follow_all()
    assert engine.draft_versions == {"default": 0, "sql": 1, "code": 1}
    assert run(engine, "a")[0].num_drafted > 0
    feed.rollback("sql", "starved")
    watcher.follow_all()
    assert engine.draft_versions == {"default": 0, "code": 1, "a": 1}


def test_a_bad_adapter_is_refused_on_its_own_route(engine: LocalEngine, feed: MemoryAdapterFeed) -> None:
    watcher = watch(engine, feed)
    publish(engine, feed, "code", 1)
    manifest, weights = tiny_adapter(
        engine.pair.draft_id, draft_version=1, target_revision="another", route="sql"
    )
    feed.publish(manifest, weights)
    watcher.follow_all()
    watcher.follow_all()
    assert engine.draft_versions == {"default": 0, "sql": 0, "code": 1}
    rejected = [event for event in feed.history("sql") if event.kind == "rejected_by_replica"]
    assert [event.draft_version for event in rejected] == [1]
    assert watcher.last_error.startswith("route sql: draft_version=1 rejected")
    publish(engine, feed, "sql", 2)
    watcher.follow()
    assert (engine.draft_versions["sql"], watcher.last_error) == (2, "")


def test_a_feed_that_forgets_closes_no_route(engine: LocalEngine, feed: MemoryAdapterFeed) -> None:
    watcher = watch(engine, feed)
    publish(engine, feed, "sql", 1)
    watcher.follow_all()
    watcher._feed = MemoryAdapterFeed()
    watcher.follow_all()
    assert engine.draft_versions == {"default": 0, "sql": 1}


def test_a_route_whose_draft_cannot_be_made_is_served_by_the_default_routes(
    engine: LocalEngine, feed: MemoryAdapterFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def no_room() -> None:
        calls.append(1)
        raise MemoryError("no room")

    monkeypatch.setattr(engine.drafts, "_new_draft", no_room)
    watcher = watch(engine, feed)
    publish(engine, feed, "sql", 1)
    publish(engine, feed, "default", 1)
    watcher.follow_all()
    watcher.follow_all()
    assert engine.draft_versions == {"default": 1}
    assert len(calls) == 1
    assert run(engine, "sql")[0].num_drafted > 0


def test_a_prompt_without_a_tag_is_drafted_for_by_the_draft_of_the_nearest_route(
    engine: LocalEngine, feed: MemoryAdapterFeed
) -> None:
    watcher = watch(engine, feed)
    feed.put_route_table(
        table(engine, sql=embedding(engine, SQL_PROMPT), code=embedding(engine, CODE_PROMPT))
    )
    publish(engine, feed, "sql", 1)
    watcher.follow_all()

    def served(prompt: tuple[int, ...], route: str | None = None) -> tuple[str, set[int]]:
        generation = engine.submit(GenerationRequest("r", prompt, GREEDY, route=route)).result(30)
        return generation.route, {span.draft_version for span in generation.draft_versions}

    assert served(SQL_PROMPT) == ("sql", {1})
    assert served(CODE_PROMPT) == ("code", {0})
    assert served(SQL_PROMPT, route="default") == ("default", {0})
    assert served(CODE_PROMPT, route="sql") == ("sql", {1})


def test_status_and_metrics_tell_versions_and_counts_by_route(
    engine: LocalEngine, feed: MemoryAdapterFeed
) -> None:
    watcher = watch(engine, feed)
    publish(engine, feed, "sql", 3)
    watcher.follow_all()
    sql, other = run(engine, "sql", "code")
    watcher.report()
    [status] = feed.statuses()
    assert status.serving_versions == {"default": 0, "sql": 3}
    attempted = {
        (each.drafter_id, each.route, each.draft_version): each.num_attempted for each in status.counts
    }
    assert attempted["draft", "sql", 3] == sql.num_attempted
    assert attempted["draft", "default", 0] == other.num_attempted
    metrics = ServingMetrics(engine.stats, replica_id="r0", num_rejected=lambda: 0, exporters=())
    lines = metrics.render().decode().splitlines()
    assert 'everdraft_route_draft_version{replica="r0",route="sql"} 3.0' in lines
    name = "everdraft_spec_decode_num_accepted_tokens_total"
    labels = '{draft_version="3",drafter="draft",replica="r0",route="sql"}'
    assert f"{name}{labels} {float(sql.num_accepted)}" in lines


def test_without_room_for_routes_one_draft_serves_all_and_nothing_is_embedded(
    tiny_pair: tuple[str, str], feed: MemoryAdapterFeed
) -> None:
    with load_engine(*tiny_pair, EngineOptions(**ENGINE)) as engine:
        assert engine.router is None and engine.drafts is not None
        watcher = watch(engine, feed)
        publish(engine, feed, "sql", 1)
        publish(engine, feed, "default", 2)
        watcher.follow_all()
        assert engine.draft_versions == {"default": 2}
        request = GenerationRequest("r", SQL_PROMPT, GREEDY, capture=True)
        generation = engine.submit(request).result(30)
    assert (generation.route, generation.prompt_embedding_H) == ("default", None)
