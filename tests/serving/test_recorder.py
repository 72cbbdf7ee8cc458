"""Finished generations become records: whole, self-contained, sampled by request id, never in the way."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from buffer.codec import decode, encode
from buffer.names import NGRAM_DRAFTER
from buffer.records import GenerationRecord, ServingStatus
from buffer.store import StreamKey
from serving import recorder as recorder_module
from serving.capture_mode import CaptureMode, CapturePolicy
from serving.drafters.ngram_drafter import NgramDrafter
from serving.engine import Generation, GenerationRequest, SamplingParams
from serving.engine.engine import Engine
from serving.local import load_engine
from serving.metrics import ServingMetrics
from serving.options import EngineOptions
from serving.recorder import Recorder, RecordPlace
from serving.status import serving_status
from tests.support.table_engine import table_engine
from tests.support.table_model import TableModel


class ListSink:
    """Builds at once what it is given."""

    def __init__(self) -> None:
        self.submitted: list[tuple[StreamKey, GenerationRecord]] = []

    def submit(
        self, key: StreamKey, record: GenerationRecord | Callable[[], GenerationRecord], num_bytes: int
    ) -> None:
        assert num_bytes > 0
        self.submitted.append((key, record() if callable(record) else record))


class BrokenSink:
    def submit(self, key: StreamKey, record: object, num_bytes: int) -> None:
        raise RuntimeError("full of water")


def new_recorder(sink: ListSink | BrokenSink, rate: float = 1.0) -> Recorder:
    return Recorder(
        {"replay": RecordPlace(sink, 60.0)},
        target_revision="t0",
        replica_id="r0",
        capture_rate=rate,
        clock=lambda: 1000.0,
    )


@pytest.fixture(scope="module")
def engine(tiny_pair: tuple[str, str]) -> Iterator[Engine]:
    with load_engine(
        *tiny_pair, options=EngineOptions(num_slots=2, max_seq_len=128, num_draft_tokens=3)
    ) as running:
        yield running


def generated(engine: Engine, *, capture: bool = True, **sampling: Any) -> Generation:
    params = SamplingParams(**{"temperature": 0.7, "max_tokens": 30, "ignore_eos": True} | sampling)
    request = GenerationRequest("cmpl-1-0", (5, 6, 7), params, 1, "sql", capture)
    return engine.submit(request).result(timeout_s=30)


def records_of(generation: Generation) -> list[GenerationRecord]:
    sink = ListSink()
    new_recorder(sink).record(generation, "replay")
    assert all(key == StreamKey("t0", generation.route) for key, _ in sink.submitted)
    return [record for _, record in sink.submitted]


def test_a_record_says_what_was_generated_and_how(engine: Engine) -> None:
    generation = generated(engine, top_k=10)
    [record] = records_of(generation)
    assert (record.record_id, record.request_id, record.route) == ("cmpl-1-0-1-0", "cmpl-1-0", "sql")
    assert record.prompt_token_ids.tolist() == [5, 6, 7]
    assert record.output_token_ids.tolist() == generation.output_token_ids
    assert (record.created_at_s, record.expires_at_s) == (1000.0, 1060.0)
    assert (record.sampling.temperature, record.sampling.top_k) == (pytest.approx(0.7), 10)
    assert (record.sampling.mode, record.sampling.context_dependent) == ("standard", False)
    assert len(record.rounds) == generation.num_rounds
    assert sum(trace.num_accepted for trace in record.rounds) == generation.num_accepted
    assert encode(decode(GenerationRecord, encode(record))) == encode(record)


def test_what_copied_is_named_in_records_status_and_metrics_and_has_no_version() -> None:
    table, sink = TableModel(3, seed=4, sharpness=2.0), ListSink()
    with table_engine(table, None, num_draft_tokens=3, ngram=NgramDrafter(4)) as engine:
        asked = GenerationRequest("r", (1, 2, 0, 1, 2), SamplingParams(max_tokens=30), capture=True)
        generation = engine.submit(asked).result(30)
        status = serving_status(engine, replica_id="r0", at_s=1.0, num_dropped_records=0)
        metrics = ServingMetrics(engine.stats, replica_id="r0", num_rejected=lambda: 0, exporters=())
        lines = metrics.render().decode().splitlines()
    new_recorder(sink).record(generation, "replay")
    [(_, record)] = sink.submitted
    traces = [trace for trace in decode(GenerationRecord, encode(record)).rounds if trace.num_drafted]
    assert {(trace.drafter_id, trace.draft_route, trace.draft_version) for trace in traces} == {
        (NGRAM_DRAFTER, None, None)
    }
    found = decode(ServingStatus, encode(status))
    [counts] = (each for each in found.counts if each.num_drafted)
    assert (counts.drafter_id, counts.route, counts.draft_version) == (NGRAM_DRAFTER, "default", None)
    assert counts.num_accepted == generation.num_accepted > 0
    name = "everdraft_spec_decode_num_accepted_tokens_total"
    labels = '{draft_version="",drafter="ngram",replica="r0",route="default"}'
    assert f"{name}{labels} {float(generation.num_accepted)}" in lines


@pytest.mark.parametrize(
    "asked",
    [
        {"min_tokens": 5},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {5: 1.0}},
        {"allowed_token_ids": (5, 6)},
    ],
)
def test_what_changes_logits_marks_a_distribution_that_depends_on_the_context(
    engine: Engine, asked: dict[str, Any]
) -> None:
    [record] = records_of(generated(engine, **asked))
    assert record.sampling.context_dependent


def test_segments_stand_alone_and_together_hold_every_token(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "MAX_RECORD_TOKENS", 8)
    generation = generated(engine)
    records = records_of(generation)
    assert len(records) >= 3
    context = [5, 6, 7]
    for number, record in enumerate(records):
        assert (record.segment, record.record_id) == (number, f"cmpl-1-0-1-{number}")
        assert record.prompt_token_ids.tolist() == context
        assert record.rounds[0].start == len(context)
        context += record.output_token_ids.tolist()
        emitted = sum(len(trace.emitted_target_logprobs_C) for trace in record.rounds)
        assert emitted == len(record.output_token_ids)
    assert context[3:] == generation.output_token_ids


def test_every_segment_carries_the_embedding_of_the_requests_prompt(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "MAX_RECORD_TOKENS", 8)
    generation = generated(engine)
    assert {record.prompt_embedding_H is None for record in records_of(generation)} == {True}
    generation.prompt_embedding_H = np.array([0.5, -2.0], dtype=np.float16)
    found = [record.prompt_embedding_H for record in records_of(generation)]
    assert len(found) >= 3
    assert all(embedding_H is not None and embedding_H.tolist() == [0.5, -2.0] for embedding_H in found)


def test_what_was_not_captured_is_not_recorded(engine: Engine) -> None:
    assert records_of(generated(engine, capture=False)) == []


def test_a_cancelled_generation_is_recorded_too(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    handle = engine.submit(GenerationRequest("cmpl-2-0", (5,), params, capture=True))
    next(iter(handle))
    handle.cancel()
    generation = handle.result(timeout_s=30)
    [record] = records_of(generation)
    assert record.output_token_ids.tolist() == generation.output_token_ids
    assert 0 < len(generation.output_token_ids) < 100


def test_the_same_requests_are_captured_every_time_at_about_the_rate() -> None:
    """8 standard deviations of a binomial: a false alarm in 10^14 runs, if ids were random."""
    ids = [f"cmpl-{number}" for number in range(4000)]
    half = new_recorder(ListSink(), rate=0.25)
    captured = [half.mode_of(request_id, None) == "replay" for request_id in ids]
    assert captured == [half.mode_of(request_id, True) == "replay" for request_id in ids]
    assert abs(np.mean(captured) - 0.25) < 8 * (0.25 * 0.75 / 4000) ** 0.5
    assert {half.mode_of(request_id, False) for request_id in ids} == {"off"}
    assert {new_recorder(ListSink(), rate=1.0).mode_of(name, None) for name in ids} == {"replay"}
    assert {new_recorder(ListSink(), rate=0.0).mode_of(name, None) for name in ids} == {"off"}


def test_a_broken_sink_does_not_reach_the_engine(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    new_recorder(BrokenSink()).record(generated(engine), "replay")
    assert "full of water" in caplog.text


def private_recorder(policy: CapturePolicy, **changes: Any) -> tuple[Recorder, ListSink, ListSink]:
    """With its two sinks: of mode `replay`, and of mode `memory`."""
    replay, memory = ListSink(), ListSink()
    places: dict[CaptureMode, RecordPlace] = {
        "replay": RecordPlace(replay, 60.0),
        "memory": RecordPlace(memory, 5.0),
    }
    given = {"target_revision": "t0", "replica_id": "r0", "capture_rate": 1.0, "clock": lambda: 1000.0}
    return Recorder(places, policy=policy, **given | changes), replay, memory


@pytest.mark.parametrize(
    ("service", "of_route", "admitted", "goes_to"),
    [
        ("replay", None, "replay", "replay"),
        ("replay", None, "memory", "memory"),
        ("replay", "memory", "replay", "memory"),
        ("replay", "off", "replay", "off"),
        ("replay", "off", "memory", "off"),
        ("memory", "replay", "replay", "memory"),
        ("replay", "replay", "off", "off"),
    ],
)
def test_a_record_goes_where_its_route_and_its_admission_allow(
    engine: Engine, service: CaptureMode, of_route: CaptureMode | None, admitted: CaptureMode, goes_to: str
) -> None:
    """The route is known for sure only when the generation has ended: its record goes by that one."""
    policy = CapturePolicy(service, {} if of_route is None else {"sql": of_route})
    recorder, replay, memory = private_recorder(policy)
    recorder.record(generated(engine), admitted)
    sinks = {"replay": replay, "memory": memory}
    assert {name for name, sink in sinks.items() if sink.submitted} == {goes_to} - {"off"}
    lives = {"replay": 1060.0, "memory": 1005.0}
    for name, sink in sinks.items():
        assert all(record.expires_at_s == lives[name] for _, record in sink.submitted)


def test_at_admission_what_is_known_decides() -> None:
    policy = CapturePolicy("replay", {"sql": "memory", "health": "off"})
    recorder, *_ = private_recorder(policy)
    assert recorder.mode_of("r", None) == "replay"
    assert recorder.mode_of("r", None, "sql") == "memory"
    assert recorder.mode_of("r", None, "health") == "off"
    assert recorder.mode_of("r", None, "sql", tenant_capture="off") == "off"
    assert recorder.mode_of("r", None, tenant_capture="memory") == "memory"
    assert recorder.mode_of("r", False, "sql", tenant_capture="replay") == "off"


def test_a_mode_without_a_store_is_no_other_mode(engine: Engine) -> None:
    """What may only be in memory is not put on a disk because there is no such memory."""
    sink, policy = ListSink(), CapturePolicy("memory")
    recorder = Recorder(
        {"replay": RecordPlace(sink, 60.0)},
        target_revision="t0",
        replica_id="r0",
        capture_rate=1.0,
        policy=policy,
    )
    assert recorder.mode_of("r", None) == "off"
    recorder.record(generated(engine), "replay")
    assert sink.submitted == []
