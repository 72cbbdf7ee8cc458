"""Routes over the learner's life."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from buffer.memory_store import MemoryRecordStore
from buffer.records import AdapterEvent
from buffer.store import Bounds, StreamKey
from learner.judging import draft_selection
from learner.judging.draft_selection import FLOOR, ExistingDraft, best_draft
from learner.judging.held_out import HeldOutWindow
from learner.judging.watch import ScoreState
from learner.trainer import Trainer
from tests.support.routes_testbed import (
    SAMPLING,
    TOPICS,
    Records,
    RoutesTestbed,
    factory,
    two_topics,
    untagged,
)
from tests.support.tiny_learner import quick_settings, tiny_draft


@pytest.fixture(scope="module")
def traffic() -> dict[str, Records]:
    return two_topics()


def scores_of_drafts(traffic: Mapping[str, Records], *drafts: ExistingDraft) -> dict[str, list[float]]:
    """Of each draft, by topic, on the last records of it."""
    score = Trainer(tiny_draft(), quick_settings()).score
    rows = {topic: row_of(records[-80:], drafts, score) for topic, records in traffic.items()}
    return {topic: [row[draft.key].acceptance for draft in drafts] for topic, row in rows.items()}


def row_of(
    records: Records, drafts: Sequence[ExistingDraft], score: ScoreState
) -> draft_selection.DraftScores:
    window = HeldOutWindow(len(records))
    window.add(records)
    return draft_selection.scores_of_drafts(window, drafts, len(records), score)


@pytest.fixture(scope="module")
def one_draft(tmp_path_factory: pytest.TempPathFactory, traffic: dict[str, Records]) -> ExistingDraft:
    testbed = RoutesTestbed(tmp_path_factory.mktemp("one"), max_routes=0)
    testbed.live({topic: records[:170] for topic, records in traffic.items()})
    assert testbed.open_routes() == set()
    return testbed.draft("default")


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory, traffic: dict[str, Records]) -> RoutesTestbed:
    testbed = RoutesTestbed(tmp_path_factory.mktemp("routed"))
    testbed.live({topic: records[:170] for topic, records in traffic.items()})
    return testbed


def test_two_topics_get_a_draft_each_and_each_is_better_than_one_draft_for_both(
    routed: RoutesTestbed, one_draft: ExistingDraft, traffic: dict[str, Records]
) -> None:
    assert routed.open_routes() == set(TOPICS)
    drafts = [routed.draft(topic) for topic in TOPICS]
    found = scores_of_drafts(traffic, one_draft, *drafts)
    for place, topic in enumerate(TOPICS, start=1):
        assert found[topic][place] > found[topic][0] + 0.1
        assert found[topic][place] == max(found[topic])


def test_a_route_tells_what_it_started_from_and_what_it_brought(routed: RoutesTestbed) -> None:
    for topic in TOPICS:
        kinds = [event.kind for event in routed.feed.history(topic)]
        assert kinds[0] == "opened"
        assert "promoted" in kinds
        [opened] = routed.events(topic, "opened")
        assert "starts from" in opened.reason
        facts = routed.learner.snapshot()["routes"][topic]
        assert facts["acceptance_by_draft"][f"{topic}/{facts['draft_version']}"] > 0
        assert facts["num_records_seen"] > 0


def test_a_routes_first_version_was_judged_against_the_default_draft(
    tmp_path: Path, traffic: dict[str, Records]
) -> None:
    """`default` has met both topics and guesses between the two: better than the floor, and far from what
    one topic alone comes to."""
    testbed = RoutesTestbed(tmp_path)
    shared = {
        topic: [replace(record, prompt_embedding_H=None) for record in records[:75]]
        for topic, records in untagged(traffic).items()
    }
    testbed.live(shared)
    assert testbed.feed.latest("default") is not None
    testbed.live({"law": traffic["law"][75:]})
    first = testbed.feed.versions("law")[0]
    assert (first.draft_version, first.parent_version) == (1, 0)
    assert first.evidence["acceptance_incumbent"] > first.evidence["acceptance_floor"] + 0.02


def test_untagged_topics_are_told_apart_and_prompts_find_their_route(
    tmp_path: Path, traffic: dict[str, Records]
) -> None:
    testbed = RoutesTestbed(tmp_path)
    testbed.live({topic: records[:100] for topic, records in untagged(traffic).items()})
    assert testbed.open_routes() == {"auto-1", "auto-2"}
    table = testbed.feed.route_table()
    assert table is not None
    found = {
        topic: [table.route_of(record.prompt_embedding_H) for record in traffic[topic][100:]]
        for topic in TOPICS
    }
    names = {topic: max(set(routes), key=routes.count) for topic, routes in found.items()}
    assert set(names.values()) == {"auto-1", "auto-2"}
    for topic, routes in found.items():
        assert routes.count(names[topic]) > 0.9 * len(routes), "few are strays, which go to default"
    testbed.live(
        {topic: [replace(record, route=names[topic]) for record in traffic[topic][100:]] for topic in TOPICS}
    )
    drafts = [testbed.draft(names[topic]) for topic in TOPICS]
    rows = scores_of_drafts(traffic, *drafts)
    assert rows["law"][0] > rows["law"][1]
    assert rows["verse"][1] > rows["verse"][0]


def test_one_untagged_topic_is_not_split(tmp_path: Path, traffic: dict[str, Records]) -> None:
    """Its prompts have one peak: two kinds are seen with a probability below 1e-4 a look, 3 looks."""
    testbed = RoutesTestbed(tmp_path)
    testbed.live({"law": untagged(traffic)["law"]})
    assert testbed.open_routes() == set()
    table = testbed.feed.route_table()
    assert table is None or table.routes == ()


def test_a_tag_overrides_where_a_prompt_lies(tmp_path: Path, traffic: dict[str, Records]) -> None:
    testbed = RoutesTestbed(tmp_path)
    law = [
        replace(record, prompt_embedding_H=verse.prompt_embedding_H)
        for record, verse in zip(*traffic.values(), strict=True)
    ]
    testbed.live({"law": law[:100]})
    assert testbed.open_routes() == {"law"}
    assert testbed.learner.snapshot()["routes"]["default"]["num_records_seen"] < 100


def test_the_number_of_routes_is_bounded(tmp_path: Path, traffic: dict[str, Records]) -> None:
    testbed = RoutesTestbed(tmp_path, max_routes=1)
    testbed.live({topic: records[:100] for topic, records in traffic.items()})
    assert len(testbed.open_routes()) == 1


def test_a_route_waits_for_memory_and_its_records_train_the_default_draft(
    tmp_path: Path, traffic: dict[str, Records], caplog: pytest.LogCaptureFixture
) -> None:
    testbed = RoutesTestbed(tmp_path)
    testbed.free_bytes = 0.0
    testbed.live({topic: records[:75] for topic, records in traffic.items()})
    assert testbed.open_routes() == set()
    assert caplog.text.count("route law gets no draft of its own") == 1, "told once"
    testbed.free_bytes = float("inf")
    testbed.live({topic: records[75:100] for topic, records in traffic.items()})
    assert testbed.open_routes() == set(TOPICS)


def test_a_route_that_starves_is_closed_and_default_serves_it_again(
    tmp_path: Path, traffic: dict[str, Records]
) -> None:
    testbed = RoutesTestbed(tmp_path)
    testbed.live({"law": traffic["law"][:150]})
    assert testbed.open_routes() == {"law"}
    assert testbed.feed.latest("law") is not None
    testbed.clock.now_s += 601.0
    testbed.learn()
    assert testbed.open_routes() == set()
    assert testbed.feed.latest("law") is None
    [closed] = testbed.events("law", "closed")
    assert "starved" in closed.reason
    seen = testbed.learner.snapshot()["num_records_seen"]
    testbed.live({"law": traffic["law"][150:200]})
    assert testbed.open_routes() == set(), "it must earn it again"
    assert testbed.learner.snapshot()["num_records_seen"] >= seen + 25


def test_an_operators_pin_keeps_a_route_open(tmp_path: Path, traffic: dict[str, Records]) -> None:
    testbed = RoutesTestbed(tmp_path)
    testbed.live({"law": traffic["law"][:100]})
    testbed.feed.pin("law", 0, "hands off")
    testbed.clock.now_s += 601.0
    testbed.learn()
    assert testbed.open_routes() == {"law"}


def test_a_route_that_gains_nothing_is_closed(tmp_path: Path, traffic: dict[str, Records]) -> None:
    """No gain is enough for this gate, so `default`'s draft serves it all along."""
    testbed = RoutesTestbed(tmp_path, gate_min_gain=0.9, route_losses_before_close=2)
    testbed.live({"law": traffic["law"][:150]})
    [closed] = testbed.events("law", "closed")
    assert "as good or better" in closed.reason
    assert testbed.open_routes() == set()


def test_a_new_route_starts_from_the_best_draft_there_is(
    tmp_path: Path, traffic: dict[str, Records], routed: RoutesTestbed
) -> None:
    testbed = RoutesTestbed(tmp_path)
    testbed.live({topic: records[:170] for topic, records in traffic.items()})
    twin = [
        replace(record, route="verse-too", record_id=f"too-{record.record_id}") for record in traffic["verse"]
    ]
    testbed.live({"verse-too": twin[:75]})
    [opened] = testbed.events("verse-too", "opened")
    assert "of verse" in opened.reason


def test_a_killed_learner_goes_on_with_all_its_routes(tmp_path: Path, traffic: dict[str, Records]) -> None:
    testbed = RoutesTestbed(tmp_path)
    testbed.live({topic: records[:100] for topic, records in traffic.items()})
    before = testbed.learner.snapshot()
    testbed.learner = testbed.build()
    assert not testbed.learner.run_cycle()
    after = testbed.learner.snapshot()
    assert set(after["routes"]) == {"default", *TOPICS}
    for route, facts in after["routes"].items():
        for name in ("num_steps", "num_records_seen", "draft_version", "last_version"):
            assert facts[name] == before["routes"][route][name]
    testbed.live({"law": traffic["law"][100:125]})
    assert testbed.learner.snapshot()["routes"]["law"]["num_steps"] > before["routes"]["law"]["num_steps"]


def test_a_learner_without_its_folder_takes_its_routes_from_the_feed(
    tmp_path: Path, traffic: dict[str, Records]
) -> None:
    testbed = RoutesTestbed(tmp_path / "old")
    testbed.live({"law": traffic["law"][:150]})
    version = testbed.draft("law").draft_version
    testbed._settings["checkpoint_folder"] = str(tmp_path / "new")
    testbed.learner = testbed.build()
    testbed.learner.run_cycle()
    assert testbed.open_routes() == {"law"}
    assert testbed.learner.snapshot()["routes"]["law"]["draft_version"] == version


def test_the_best_draft_is_the_first_of_equals_and_never_one_that_scores_nothing() -> None:
    draft = tiny_draft()
    poisoned = {key: torch.full_like(weight, torch.nan) for key, weight in draft.state().items()}
    drafts = [FLOOR, ExistingDraft("twin", 1, None), ExistingDraft("poisoned", 1, poisoned)]
    records = factory("law").records(4, SAMPLING, max_tokens=3)

    def score(state: object, wanted: object) -> list[object]:
        found = Trainer(draft, quick_settings()).score(None, wanted)  # type: ignore[arg-type]
        if state is poisoned:
            return [replace(one, expected_N=one.expected_N * np.nan) for one in found if one]
        return list(found)

    row = row_of(records, drafts, score)  # type: ignore[arg-type]
    assert best_draft(row, drafts) is FLOOR
    assert best_draft(row, drafts[::-1]) is drafts[1]
    assert row[FLOOR.key].num_records == 4


def test_a_learner_that_is_allowed_fewer_routes_closes_those_for_which_there_is_no_room(
    tmp_path: Path, traffic: dict[str, Records]
) -> None:
    testbed = RoutesTestbed(tmp_path)
    testbed.live({topic: records[:100] for topic, records in traffic.items()})
    testbed._settings["max_routes"] = 1
    testbed.learner = testbed.build()
    testbed.learner.run_cycle()
    assert len(testbed.open_routes()) == 1
    [closed] = [event for topic in TOPICS for event in testbed.events(topic, "closed")]
    assert "max_routes is 1" in closed.reason
    assert testbed.feed.latest(closed.route) is None


def test_a_route_that_sleeps_keeps_no_other_from_learning(
    tmp_path: Path, traffic: dict[str, Records]
) -> None:
    """No gain is enough, so each draft sleeps after two decisions."""
    stall = {"stall_gain": 1.0, "stall_decisions": 1, "slow_stretch": 1}
    testbed = RoutesTestbed(tmp_path, **stall, first_rest_records=9999, max_rest_records=9999)
    testbed.live({"law": traffic["law"][:150]})
    before = testbed.learner.snapshot()["routes"]
    assert before["default"]["asleep"] and before["law"]["asleep"]
    testbed.live({"law": traffic["law"][150:], "verse": traffic["verse"][:100]})
    after = testbed.learner.snapshot()["routes"]
    assert after["law"]["num_steps"] == before["law"]["num_steps"]
    assert after["law"]["num_rested_records"] == before["law"]["num_rested_records"] + 100
    assert after["verse"]["num_steps"] > 0
    assert testbed.store.size(StreamKey("target-1", "law")).num_pending == 0
    whole = testbed.learner.snapshot()
    assert whole["num_rested_records"] == sum(facts["num_rested_records"] for facts in after.values())


def test_what_no_replica_will_serve_of_a_route_goes_back_to_the_default_draft(
    tmp_path: Path, traffic: dict[str, Records]
) -> None:
    testbed = RoutesTestbed(tmp_path)
    testbed.live({"law": traffic["law"][:150]})
    version = testbed.draft("law").draft_version
    assert version > 0
    refusal = AdapterEvent("rejected_by_replica", "law", version, "replica: corrupted", testbed.clock.now_s)
    testbed.feed.add_event(refusal)
    testbed.learner.run_cycle()
    assert testbed.draft("law").draft_version < version
    [taken_back] = testbed.events("law", "rolled_back")
    assert taken_back.reason.startswith("refused by replicas")
    assert testbed.feed.latest("default") is not None


def test_a_tag_whose_stream_is_forgotten_is_forgotten_by_the_learner(
    tmp_path: Path, traffic: dict[str, Records]
) -> None:
    """Clients invent tags: each would stand in the book, and be read every cycle, for good."""
    testbed = RoutesTestbed(tmp_path)
    testbed.store = MemoryRecordStore(Bounds(max_age_s=500.0), clock=testbed.clock)
    testbed.learner = testbed.build()
    testbed.serve(*(replace(record, route=f"tag-{i}") for i, record in enumerate(traffic["law"][:50])))
    testbed.learn()
    testbed.serve(*traffic["verse"][:70])
    testbed.learn()
    [book] = tmp_path.rglob("routes.json")
    assert {"tag-0", "tag-49"} <= json.loads(book.read_text())["standings"].keys()
    testbed.clock.now_s += 400.0
    testbed.serve(*traffic["verse"][70:75])
    testbed.clock.now_s += 200.0
    testbed.learn()
    testbed.serve(*traffic["verse"][75:105])
    testbed.learn()
    assert testbed.learner._inbox._waiting.keys() <= set(testbed.store.keys())
    assert not [route for route in testbed.learner._inbox._used if route.startswith("tag")]
    standings = json.loads(book.read_text())["standings"]
    assert "verse" in standings and not [route for route in standings if route.startswith("tag")]
