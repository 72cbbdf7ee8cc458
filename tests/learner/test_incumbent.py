"""The feed's word is final, version numbers only grow, and what cannot be read here is not pretended."""

from dataclasses import replace

import pytest
import torch

from buffer.memory_store import MemoryAdapterFeed
from buffer.records import AdapterEvent, AdapterManifest
from learner.draft import AdapterState, TrainableDraft, export_weights
from learner.incumbent import Incumbent
from serving.models.draft_weights import DraftWeights
from tests.buffer.samples import FakeClock
from tests.support.tiny_learner import MODULES, tiny_draft, tiny_pair

ROUTE = "sql"


@pytest.fixture(scope="module")
def draft() -> TrainableDraft:
    return tiny_draft()


@pytest.fixture
def feed() -> MemoryAdapterFeed:
    return MemoryAdapterFeed(max_versions=3)


def incumbent_of(feed: MemoryAdapterFeed, draft: TrainableDraft, **known: object) -> Incumbent:
    return Incumbent(
        feed,
        draft,
        route=ROUTE,
        target_revision="target-1",
        now_s=FakeClock(77.0),
        **known,  # type: ignore[arg-type]
    )


def state(draft: TrainableDraft, seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(weight.shape, generator=generator) for key, weight in draft.state().items()}


def same(one: AdapterState | None, other: AdapterState) -> bool:
    return (
        one is not None
        and one.keys() == other.keys()
        and all(torch.equal(one[key], other[key]) for key in other)
    )


def publish(incumbent: Incumbent, published: AdapterState) -> AdapterManifest:
    return incumbent.publish(published, {"gain_lower_bound": 0.1}, num_records_seen=30, run_id="run")


def foreign(feed: MemoryAdapterFeed, draft: TrainableDraft, version: int, **changes: object) -> AdapterState:
    """As another learner's, or an older one's, publication."""
    published = state(draft, 100 + version)
    other = MemoryAdapterFeed()
    manifest = publish(incumbent_of(other, draft, last_version=version - 1), published)
    feed.publish(replace(manifest, **changes), other.weights(ROUTE, version))  # type: ignore[arg-type]
    return published


def test_at_first_the_floor_serves(feed: MemoryAdapterFeed, draft: TrainableDraft) -> None:
    incumbent = incumbent_of(feed, draft)
    assert (incumbent.version, incumbent.state, incumbent.unreadable) == (0, None, "")
    assert incumbent.sync() is False
    assert (incumbent.parent(), incumbent.last_version) == (None, 0)
    assert incumbent.last_serving_change() == ("adopted", "the feed says so")


def test_what_is_published_serves_and_its_manifest_says_what_it_is(
    feed: MemoryAdapterFeed, draft: TrainableDraft
) -> None:
    incumbent, first, second = incumbent_of(feed, draft), state(draft, 1), state(draft, 2)
    publish(incumbent, first)
    manifest = publish(incumbent, second)
    assert feed.latest(ROUTE) == manifest == incumbent.manifest
    assert feed.weights(ROUTE, 2) == incumbent.weights == export_weights(second)
    assert same(incumbent.state, second) and same(incumbent.parent(), first)
    assert (incumbent.version, incumbent.last_version) == (2, 2)
    assert (manifest.draft_version, manifest.parent_version, manifest.route) == (2, 1, ROUTE)
    assert (manifest.draft_revision, manifest.target_revision) == ("draft-1", "target-1")
    assert (manifest.rank, manifest.alpha, manifest.num_bytes) == (16, 32.0, len(incumbent.weights))
    assert (manifest.created_at_s, manifest.num_records_seen, manifest.mlflow_run_id) == (77.0, 30, "run")
    assert manifest.evidence == {"gain_lower_bound": 0.1}
    assert set(manifest.target_modules) == set(MODULES)
    assert incumbent.last_serving_change()[0] == "promoted"


def test_a_replica_takes_what_was_published(feed: MemoryAdapterFeed, draft: TrainableDraft) -> None:
    manifest = publish(incumbent_of(feed, draft), state(draft, 1))
    weights = DraftWeights(tiny_pair()[1], draft_revision="draft-1", target_revision="target-1")
    staged = weights.stage(
        feed.weights(ROUTE, 1),
        draft_version=1,
        adapter_config_json=manifest.adapter_config_json,
        sha256=manifest.sha256,
        draft_revision=manifest.draft_revision,
        target_revision=manifest.target_revision,
    )
    assert staged.draft_version == 1 and staged.merged


def test_the_published_state_is_a_copy_of_the_mapping(feed: MemoryAdapterFeed, draft: TrainableDraft) -> None:
    incumbent, published = incumbent_of(feed, draft), state(draft, 1)
    publish(incumbent, published)
    published.clear()
    assert same(incumbent.state, state(draft, 1))


@pytest.mark.parametrize("act", ["rollback", "pin"])
def test_an_operators_word_is_adopted_once_and_not_fought(
    feed: MemoryAdapterFeed, draft: TrainableDraft, act: str
) -> None:
    incumbent, first = incumbent_of(feed, draft), state(draft, 1)
    publish(incumbent, first)
    publish(incumbent, state(draft, 2))
    if act == "rollback":
        feed.rollback(ROUTE, "too slow")
    else:
        feed.pin(ROUTE, 1, "too slow")
    assert incumbent.sync() is True
    assert incumbent.version == 1 and same(incumbent.state, first)
    assert incumbent.weights == feed.weights(ROUTE, 1)
    assert incumbent.sync() is False
    assert incumbent.last_serving_change() == ("rolled_back" if act == "rollback" else "pinned", "too slow")
    assert incumbent.parent() is None, "the floor"
    assert publish(incumbent, state(draft, 3)).draft_version == 3, "no number is given twice"
    manifest = incumbent.manifest
    assert manifest is not None and manifest.parent_version == 1


def test_a_rollback_to_the_floor_is_adopted(feed: MemoryAdapterFeed, draft: TrainableDraft) -> None:
    incumbent = incumbent_of(feed, draft)
    publish(incumbent, state(draft, 1))
    feed.rollback(ROUTE, "worse", to_version=0)
    assert incumbent.sync() is True
    assert (incumbent.version, incumbent.state, incumbent.weights) == (0, None, b"")
    assert incumbent.last_version == 1


def test_what_another_published_meanwhile_is_adopted(feed: MemoryAdapterFeed, draft: TrainableDraft) -> None:
    incumbent = incumbent_of(feed, draft)
    theirs = foreign(feed, draft, 4)
    assert incumbent.sync() is True
    assert (incumbent.version, incumbent.last_version) == (4, 4)
    assert same(incumbent.state, theirs)


def test_a_number_that_is_taken_is_passed_over(feed: MemoryAdapterFeed, draft: TrainableDraft) -> None:
    incumbent = incumbent_of(feed, draft)
    foreign(feed, draft, 4)
    manifest = publish(incumbent, state(draft, 1))
    assert manifest.draft_version == incumbent.last_version == 5
    assert feed.latest(ROUTE) == manifest


def test_an_emptied_feed_gets_its_adapter_back_under_its_number(
    feed: MemoryAdapterFeed, draft: TrainableDraft
) -> None:
    before, published = incumbent_of(feed, draft), state(draft, 1)
    for seed in (7, 8, 1):
        published = state(draft, seed)
        publish(before, published)
    empty = MemoryAdapterFeed()
    after = incumbent_of(empty, draft, manifest=before.manifest, weights=before.weights, last_version=5)
    assert same(after.state, published)
    assert after.sync() is False, "nothing changed for the learner"
    assert empty.latest(ROUTE) == before.manifest and empty.weights(ROUTE, 3) == before.weights
    assert after.parent() is None, "the feed keeps the parent no more"
    assert publish(after, state(draft, 2)).draft_version == 6, "numbers grow from the last one ever given"


def test_numbers_grow_on_the_floor_too_though_the_feed_has_forgotten_them(
    feed: MemoryAdapterFeed, draft: TrainableDraft
) -> None:
    incumbent = incumbent_of(feed, draft, last_version=5)
    assert incumbent.sync() is False
    assert publish(incumbent, state(draft, 1)).draft_version == 6


def test_a_refusal_is_a_line_in_the_history_and_takes_no_number(
    feed: MemoryAdapterFeed, draft: TrainableDraft
) -> None:
    incumbent = incumbent_of(feed, draft)
    publish(incumbent, state(draft, 1))
    incumbent.refuse("not better", {"gain_lower_bound": -0.1})
    event = feed.history(ROUTE)[-1]
    assert (event.kind, event.route, event.draft_version) == ("refused", ROUTE, 2)
    assert (event.reason, event.at_s, event.evidence) == ("not better", 77.0, {"gain_lower_bound": -0.1})
    assert incumbent.last_serving_change()[0] == "promoted", "a refusal changes nothing that serves"
    assert publish(incumbent, state(draft, 2)).draft_version == 2


REFUSED = pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"draft_revision": "draft-2"}, "was made for the draft draft-2"),
        ({"target_revision": "target-2"}, "was made for the target target-2"),
        ({"sha256": "0" * 64}, "bytes are not those"),
    ],
    ids=["another draft", "another target", "damaged"],
)


@REFUSED
def test_what_every_replica_refuses_is_taken_back_and_what_serves_stays_the_measure(
    feed: MemoryAdapterFeed, draft: TrainableDraft, changes: dict[str, object], reason: str
) -> None:
    incumbent, good = incumbent_of(feed, draft), state(draft, 1)
    publish(incumbent, good)
    foreign(feed, draft, 2, **changes)
    assert incumbent.sync() is False
    assert incumbent.version == 1 and same(incumbent.state, good)
    latest = feed.latest(ROUTE)
    assert latest is not None and latest.draft_version == 1
    event = feed.history(ROUTE)[-1]
    assert event.kind == "rolled_back" and reason in event.reason
    assert publish(incumbent, state(draft, 2)).draft_version == 3


@REFUSED
def test_a_pin_to_what_replicas_refuse_is_not_fought(
    feed: MemoryAdapterFeed, draft: TrainableDraft, changes: dict[str, object], reason: str
) -> None:
    incumbent = incumbent_of(feed, draft)
    publish(incumbent, state(draft, 1))
    foreign(feed, draft, 2, **changes)
    feed.pin(ROUTE, 2, "an operator's word")
    assert incumbent.sync() is True
    assert (incumbent.version, incumbent.state, incumbent.unreadable) == (2, None, "")
    assert feed.pinned(ROUTE) == 2


def test_an_adapter_of_another_draft_counts_as_the_floor_that_replicas_start_on(
    feed: MemoryAdapterFeed, draft: TrainableDraft
) -> None:
    incumbent = incumbent_of(feed, draft)
    foreign(feed, draft, 1, draft_revision="draft-2")
    assert incumbent.sync() is True
    assert (incumbent.version, incumbent.state, incumbent.unreadable) == (1, None, "")


def test_what_serves_and_cannot_be_scored_here_is_named(
    feed: MemoryAdapterFeed, draft: TrainableDraft
) -> None:
    incumbent = incumbent_of(feed, draft)
    foreign(feed, draft, 1, alpha=8.0)
    incumbent.sync()
    assert incumbent.state is None
    assert "draft 1 serves and cannot be scored under these settings" in incumbent.unreadable
    assert "its alpha is 8, not 32" in incumbent.unreadable
    publish(incumbent, state(draft, 2))
    assert incumbent.unreadable == "", "one of our own serves"


def test_a_parent_that_cannot_be_read_is_the_floor(feed: MemoryAdapterFeed, draft: TrainableDraft) -> None:
    incumbent = incumbent_of(feed, draft)
    foreign(feed, draft, 1, draft_revision="draft-2")
    incumbent.sync()
    manifest = publish(incumbent, state(draft, 1))
    assert manifest.parent_version == 1
    assert incumbent.parent() is None


def test_the_last_change_is_of_the_version_that_serves_and_of_no_other_kind(
    feed: MemoryAdapterFeed, draft: TrainableDraft
) -> None:
    incumbent = incumbent_of(feed, draft)
    publish(incumbent, state(draft, 1))
    serving = incumbent.version
    for kind, version in (("rejected_by_replica", serving), ("pinned", serving + 1)):
        feed.add_event(AdapterEvent(kind, ROUTE, version, f"{kind} of {version}", 80.0))
    assert incumbent.last_serving_change()[0] == "promoted"
