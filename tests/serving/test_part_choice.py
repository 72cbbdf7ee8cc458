"""`self:auto` weighs what passes cost here against what learning has shown."""

import pytest

from buffer.memory_store import MemoryAdapterFeed
from buffer.names import DEFAULT_ROUTE
from buffer.records import AdapterManifest
from serving import part_choice
from serving.models.target_part import TargetPart
from serving.part_choice import (
    LEARNT,
    Candidate,
    candidates,
    choose,
    expected_acceptance,
    shown_by,
    smaller_head,
)
from tests.support.tiny_models import tiny_model


def target_of(num_layers: int, vocab_size: int = 64):  # type: ignore[no-untyped-def]
    return tiny_model("llama", num_layers, vocab_size).eval().requires_grad_(False)


def test_every_exit_that_the_target_has_is_a_candidate() -> None:
    assert [str(part) for part in candidates(target_of(3))] == ["self:0", "self:1", "self:2"]


def test_a_large_vocabulary_may_have_a_smaller_head() -> None:
    parts = {str(part) for part in candidates(target_of(2, 8192))}
    assert parts == {"self:0", "self:0:4096", "self:1", "self:1:4096"}
    assert [smaller_head(size) for size in (8191, 49_152, 128_256)] == [None, 12_288, 32_064]


def test_all_are_measured_and_the_best_comes_first() -> None:
    found = choose(target_of(3), {})
    assert sorted(each.part for each in found) == ["self:0", "self:1", "self:2"]
    assert [each.speedup for each in found] == sorted((each.speedup for each in found), reverse=True)
    assert all(each.draft_pass_share > 0 and 1 <= each.num_draft_tokens <= 8 for each in found)


def chosen(costs: dict[int, float], shown: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> Candidate:
    """With passes of these costs by exit layer, of a target whose passes take 10 whatever they verify."""
    monkeypatch.setattr(part_choice, "_seconds", lambda _, part: ([10.0] * 9, costs[part.exit_layer]))
    return choose(target_of(8), shown)[0]


def test_a_dear_pass_leaves_the_choice_to_cost_and_a_cheap_one_to_acceptance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chosen({0: 1.0, 7: 9.0}, {}, monkeypatch).part == "self:0"
    assert chosen({0: 0.10, 7: 0.11}, {}, monkeypatch).part == "self:7"


def test_what_learning_has_shown_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {0: 1.0, 7: 8.0}
    assert chosen(costs, {}, monkeypatch).part == "self:0"
    assert chosen(costs, {"self:0": 0.2, "self:2": 0.9}, monkeypatch).part == "self:2"


def test_a_part_that_has_drafted_here_stays_for_a_little_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another would begin to learn again, and two measurements of one part differ."""
    alike = {"self:0": 0.80, "self:1": 0.80, "self:2": 0.80, "self:4": 0.80, "self:7": 0.80}
    costs = {0: 1.0, 7: 1.7}
    assert chosen(costs, alike, monkeypatch).part == "self:0"
    assert chosen(costs, {"self:2": 0.83}, monkeypatch).part == "self:2"
    assert chosen({0: 1.0, 7: 30.0}, {"self:2": 0.83}, monkeypatch).part == "self:0"


def test_another_part_is_expected_to_differ_as_it_did_elsewhere() -> None:
    assert expected_acceptance(TargetPart(2), {}) == pytest.approx(LEARNT[2])
    assert expected_acceptance(TargetPart(2), {"self:2": 0.3}) == 0.3
    better = expected_acceptance(TargetPart(2), {"self:0": LEARNT[0] + 0.1})
    worse = expected_acceptance(TargetPart(2), {"self:0": LEARNT[0] - 0.1})
    assert worse < LEARNT[2] < better < 1.0
    assert expected_acceptance(TargetPart(2), {"some/model": 0.9}) == pytest.approx(LEARNT[2])
    assert expected_acceptance(TargetPart(2, kept_tokens=9), {}) < LEARNT[2]


def test_the_newest_draft_of_a_part_tells_what_it_has_shown() -> None:
    feed = MemoryAdapterFeed()
    assert shown_by(feed) == {}
    for version, (draft_id, acceptance) in enumerate([("self:1", 0.5), ("self:2", 0.6), ("self:1", 0.7)]):
        feed.publish(manifest(version + 1, draft_id, {"acceptance_candidate": acceptance}), b"")
    feed.publish(manifest(4, "self:4", {}), b"")
    assert shown_by(feed) == {"self:1": 0.7, "self:2": 0.6}


def manifest(version: int, draft_id: str, evidence: dict[str, float]) -> AdapterManifest:
    return AdapterManifest(
        route=DEFAULT_ROUTE,
        draft_version=version,
        parent_version=0,
        draft_id=draft_id,
        draft_revision=draft_id,
        target_revision="target",
        rank=0,
        alpha=0.0,
        target_modules=(),
        adapter_config_json="{}",
        sha256="",
        num_bytes=0,
        created_at_s=0.0,
        mlflow_run_id="",
        evidence=evidence,
        num_records_seen=0,
    )
