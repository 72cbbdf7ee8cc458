"""A whole experiment on the demo's pair and a few requests; and the figures that are read off curves."""

import json
from pathlib import Path

import pytest
import typer

from benchmarks.forwards import ForwardTimes
from benchmarks.osd import views
from benchmarks.osd.changing_traffic import purity, shift
from benchmarks.osd.commands import _check_arms
from benchmarks.osd.experiment_cache import ExperimentCache
from benchmarks.osd.jobs import Job, Result, run
from benchmarks.osd.parts import LORA, at, best_length, parts
from benchmarks.osd.per_domain import first_at, per_domain
from benchmarks.osd.plan import ExperimentPlan, moving_acceptance
from benchmarks.osd.privacy import privacy
from benchmarks.osd.recorded_answers import Asking
from deploy.commands.demo import PAIR
from tests.benchmarks.osd.rows import write_rows


@pytest.fixture
def cache(tmp_path: Path) -> ExperimentCache:
    write_rows(tmp_path / "data", 600)
    asking = Asking(prompt_tokens=48, max_tokens=12)
    return ExperimentCache(
        str(PAIR / "target"), str(PAIR / "draft"), tmp_path / "data", tmp_path / "cache", asking, 96, 16
    )


def test_where_a_curve_reaches_a_value_is_read_between_two_looks() -> None:
    curve = [(0, 0.1), (100, 0.3), (200, 0.5)]
    assert first_at(curve, 0.4) == pytest.approx(150)
    assert first_at(curve, 0.05) == 0
    assert first_at(curve, 0.6) is None


def test_acceptance_at_some_learner_seconds_is_that_of_the_last_look_before() -> None:
    looks_s, values = [0.0, 5.0, 12.0], [0.1, 0.4, 0.6]
    assert at(looks_s, values, 10.0) == 0.4 and at(looks_s, values, 12.0) == 0.6
    assert at(looks_s, values, 30.0) is None


def test_the_best_draft_length_is_longer_for_a_better_draft() -> None:
    times = ForwardTimes((0, 1, 4, 8), (0.004, 0.0042, 0.005, 0.006), (0.0, 0.001, 0.001, 0.001))
    (short, slow), (long, fast) = best_length(times, 0.3), best_length(times, 0.95)
    assert short < long and slow < fast


def test_purity_is_one_where_every_route_is_of_one_domain_alone() -> None:
    assert purity({"sql": {"a": 3, "b": 2}, "chat": {"c": 5}}) == 1.0
    assert purity({"sql": {"a": 4, "b": 1}, "chat": {"a": 1, "b": 4}}) == 0.8
    assert purity({"sql": {"default": 5}, "chat": {"default": 5}}) == 0.5


def test_the_moving_average_is_of_tokens_not_of_requests() -> None:
    assert moving_acceptance([5] * 50, [5] * 25 + [15] * 25) == [[50, 0.5]]


@pytest.mark.slow
def test_a_job_is_worked_out_once(cache: ExperimentCache) -> None:
    job = Job("paper", ("gsm8k",), num_records=64, settings=(("learning_rate", 1e-3),), evaluate_every=32)
    first = run(job, cache)
    kept = cache.folder() / "runs" / job.key / "result.json"
    written = kept.stat().st_mtime_ns
    assert run(job, cache) == Result.read(kept.parent)
    assert kept.stat().st_mtime_ns == written
    assert len(first.accepted) == 64 and first.num_steps == 8
    assert [count for count, _ in first.held_out["gsm8k"]] == [0, 32, 64]


@pytest.mark.slow
def test_on_traffic_of_one_kind_ours_and_the_paper_s_setting_beat_the_floor(cache: ExperimentCache) -> None:
    """Word problems that differ in their numbers alone: whoever learns at all gains much here."""
    plan = ExperimentPlan(cache, ("gsm8k",), 96, 1, 2, lambda line: None, temperatures=(0.0,))
    plan.record_answers()
    metrics, series, adapters = per_domain(plan)
    rates = metrics["acceptance_rate"]["gsm8k"]
    assert rates["offline"] > rates["floor"] + 0.1
    assert rates["paper"] > rates["floor"] and rates["ours"] > rates["floor"]
    assert rates["self"] > rates["floor"]
    assert metrics["to_reach_ours"]["gsm8k"].keys() == {"held_out", "learner_s"}
    assert adapters["gsm8k"]["floor"] == "" and Path(adapters["gsm8k"]["ours"]).is_dir()
    assert series["gsm8k/ours/0"]
    views.plot_domains(metrics, series, plan.cache.cache / "domains.png")
    assert (plan.cache.cache / "domains.png").stat().st_size > 0
    json.dumps([metrics, series])


def test_an_arm_belongs_to_its_experiment() -> None:
    _check_arms("shift", ["replay", "self"], "self:1", None)
    with pytest.raises(typer.BadParameter, match="paper is no arm of shift, which has replay, no_replay"):
        _check_arms("shift", ["paper"], "self:1", None)
    with pytest.raises(typer.BadParameter, match="ours is no arm of cost, which has none"):
        _check_arms("cost", ["ours"], "self:1", None)


@pytest.mark.slow
def test_a_shift_is_compared_with_lives_of_one_domain(cache: ExperimentCache) -> None:
    asked = {"temperatures": (0.0,), "part": "self:1", "arms": ("self", "replay")}
    plan = ExperimentPlan(cache, ("gsm8k",), 96, 1, 2, lambda line: None, **asked)
    plan.record_answers()
    metrics, series = shift(plan)
    assert metrics["replay"]["forgotten_of_first"] == pytest.approx(0.0)
    assert "routes" not in metrics, "arms that were not asked for are not run"
    for arm, single in (("replay", "single"), ("self", "single of self:1")):
        reached = metrics[arm]["at_end_of_phase"]["gsm8k"]
        behind = metrics[arm]["behind_single"]["gsm8k"]["as_many_records"]
        assert metrics[single]["gsm8k"]["as_many_records"] == pytest.approx(reached + behind)
    views.plot_phases(metrics, series, plan.domains, plan.cache.cache / "shift.png")


@pytest.mark.slow
def test_records_that_live_for_an_hour_teach_too(
    cache: ExperimentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At twelve requests an hour the learner knows one and a half turns; at the usual pace, all 96."""
    plan = ExperimentPlan(cache, ("gsm8k",), 96, 1, 1, lambda line: None, temperatures=(0.0,))
    plan.record_answers()
    metrics, series = privacy(plan)
    rates = metrics["acceptance_rate"]["gsm8k"]
    assert rates.keys() == {"ours", "memory"} and series["gsm8k/memory/0"]
    assert metrics["memory_behind"]["gsm8k"] == pytest.approx(rates["ours"] - rates["memory"])
    [held_out] = [run(Job("memory", ("gsm8k",), num_records=96), cache).facts["num_held_out_records"]]
    monkeypatch.setattr("benchmarks.osd.arms.REQUESTS_PER_HOUR", 12)
    quick = Job("memory", ("gsm8k",), num_records=96, evaluate_every=48)
    assert run(quick, cache).facts["num_held_out_records"] < held_out
    json.dumps([metrics, series])


@pytest.mark.slow
def test_every_part_learns_and_is_priced(cache: ExperimentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.osd.parts.EXIT_LAYERS", (1,))
    monkeypatch.setattr("benchmarks.osd.parts.smaller_head", lambda vocab_size: 512)
    plan = ExperimentPlan(cache, ("gsm8k",), 96, 1, 2, lambda line: None, temperatures=(0.0,))
    plan.record_answers()
    metrics, series = parts(plan, compile="off")
    parts_of = ("self:1", "self:1:attention", "self:1:512", "self:1:attention:512")
    assert metrics["parts"].keys() == {LORA, *parts_of}
    for row in metrics["parts"].values():
        assert row["acceptance_rate"] > row["acceptance_at_start"] and row["predicted_speedup"] > 0
    assert metrics["parts"]["self:1"]["own_weights"] > metrics["parts"]["self:1:attention"]["own_weights"]
    json.dumps([metrics, series])
