"""Bytes and back: bit-identical, compact, and never another exception than the seam's."""

import pickle
import struct
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from buffer.codec import KINDS_BY_SCHEMA, SCHEMA_VERSION, decode, encode
from buffer.errors import CorruptRecordError, SchemaVersionError, SeamError
from buffer.records import (
    AdapterEvent,
    AdapterManifest,
    DrafterCounts,
    GenerationRecord,
    PassCosts,
    RecordSampling,
    RoundTrace,
    ServingStatus,
)
from buffer.route_state import RouteState
from tests.buffer.samples import make_manifest, make_record, make_round, sealed
from tests.buffer.test_schema1 import KINDS, SCHEMA_1

int32 = st.integers(-(2**31), 2**31 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.floats(allow_nan=False)
evidence = st.dictionaries(texts, numbers, max_size=3)
counts = st.integers(0, 2**53)


def floats(width: Any, shape: int | tuple[int, ...]) -> st.SearchStrategy[Any]:
    """NaN, both infinities, subnormals and the extremes included."""
    return arrays(np.dtype(f"<f{width // 8}"), shape, elements=st.floats(width=width))


def token_ids(shape: int | tuple[int, ...]) -> st.SearchStrategy[Any]:
    return arrays(np.dtype("<i4"), shape, elements=int32)


@st.composite
def rounds(draw: st.DrawFn) -> RoundTrace:
    num_drafted, num_emitted, num_kept = (draw(st.integers(0, most)) for most in (4, 5, 6))
    return RoundTrace(
        start=draw(st.integers(0, 2**31 - 1)),
        drafter_id=draw(texts),
        draft_route=draw(st.none() | texts),
        draft_version=draw(st.none() | counts),
        num_accepted=draw(st.integers(0, 4)),
        num_attempted=draw(st.integers(0, 4)),
        drafted_token_ids_G=draw(token_ids(num_drafted)),
        drafted_target_logprobs_G=draw(floats(32, num_drafted)),
        drafted_draft_logprobs_G=draw(floats(32, num_drafted)),
        emitted_target_logprobs_C=draw(floats(32, num_emitted)),
        topk_token_ids_EK=draw(token_ids((num_drafted + 1, num_kept))),
        topk_logprobs_EK=draw(floats(16, (num_drafted + 1, num_kept))),
        retemper_E=draw(floats(32, num_drafted + 1)),
    )


records = st.builds(
    GenerationRecord,
    record_id=texts,
    request_id=texts,
    route=texts,
    target_revision=texts,
    sampling=st.builds(
        RecordSampling, temperature=numbers, top_k=counts, top_p=numbers, min_p=numbers, mode=texts
    ),
    prompt_token_ids=token_ids(3),
    output_token_ids=token_ids(2),
    rounds=st.lists(rounds(), max_size=4).map(tuple),
    created_at_s=numbers,
    expires_at_s=numbers,
    replica_id=texts,
    segment=counts,
    prompt_embedding_H=st.none()
    | arrays(np.dtype("<f2"), 5, elements=st.floats(width=16, allow_nan=False, allow_infinity=False)),
)
costs = st.builds(
    PassCosts,
    batch_sizes=st.just((1, 8)),
    token_counts=st.just((1, 5)),
    target_pass_s=st.tuples(st.tuples(numbers, numbers), st.tuples(numbers, numbers)),
    draft_pass_s=st.tuples(numbers, numbers),
    draft_start_s=st.tuples(numbers, numbers),
)
drafter_counts = st.builds(DrafterCounts, texts, texts, st.none() | counts, *[counts] * 5)
others = st.one_of(
    st.builds(
        AdapterManifest,
        **dict.fromkeys(("route", "draft_id", "draft_revision", "target_revision", "mlflow_run_id"), texts),
        **dict.fromkeys(("draft_version", "parent_version", "rank", "num_bytes", "num_records_seen"), counts),
        alpha=numbers,
        target_modules=st.lists(texts, max_size=3).map(tuple),
        adapter_config_json=texts,
        sha256=texts,
        created_at_s=numbers,
        evidence=evidence,
    ),
    st.builds(AdapterEvent, texts, texts, counts, texts, numbers, evidence),
    st.builds(
        ServingStatus,
        replica_id=texts,
        at_s=numbers,
        serving_versions=st.dictionaries(texts, counts, max_size=2),
        counts=st.lists(drafter_counts, max_size=3).map(tuple),
        costs=st.none() | costs,
        round_s_median=numbers,
        last_error=texts,
    ),
    st.builds(
        RouteState,
        texts,
        counts,
        counts,
        st.none() | counts,
        st.dictionaries(counts, counts, max_size=3),
        st.none() | counts,
    ),
)


def assert_same_record(found: Any, expected: Any) -> None:
    """Arrays by dtype, shape and bits, so that NaN equals itself; the rest by value."""
    for name in (field.name for field in fields(expected)):
        one, other = getattr(found, name), getattr(expected, name)
        if isinstance(other, np.ndarray):
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), name
        elif name != "rounds":
            assert one == other, name


@given(records)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_record_comes_back_bit_for_bit(record: GenerationRecord) -> None:
    found = decode(GenerationRecord, encode(record))
    assert_same_record(found, record)
    assert len(found.rounds) == len(record.rounds)
    for found_round, expected_round in zip(found.rounds, record.rounds, strict=True):
        assert_same_record(found_round, expected_round)


@given(others)
@settings(max_examples=100, deadline=None)
def test_manifests_events_statuses_and_states_come_back_equal(value: Any) -> None:
    found = decode(type(value), encode(value))
    assert found == value
    assert repr(found) == repr(value)  # tuples stay tuples, floats floats


def test_what_numpy_computed_is_stored_as_a_plain_number() -> None:
    manifest = replace(make_manifest(1), evidence={"gain": np.float32(0.5), "records": 3})
    assert decode(AdapterManifest, encode(manifest)).evidence == {"gain": 0.5, "records": 3.0}


def test_other_float_widths_and_strides_are_brought_into_form() -> None:
    trace = make_round(num_drafted=4, num_kept=8)
    changed = replace(
        trace,
        drafted_target_logprobs_G=trace.drafted_target_logprobs_G.astype(np.float64),
        topk_token_ids_EK=np.asfortranarray(trace.topk_token_ids_EK.astype(np.int64)),
    )
    [found] = decode(GenerationRecord, encode(make_record(rounds=(changed,)))).rounds
    assert_same_record(found, trace)


def test_decoded_arrays_cannot_be_written_to() -> None:
    [trace] = decode(GenerationRecord, encode(make_record())).rounds
    with pytest.raises(ValueError, match="read-only"):
        trace.retemper_E[0] = 0.0


def test_a_position_costs_about_210_bytes_with_32_kept_entries() -> None:
    record = make_record(num_rounds=100, num_kept=32)
    grown = make_record(num_rounds=200, num_kept=32)
    num_positions = grown.num_positions - record.num_positions
    num_token_bytes = 4 * (len(grown.output_token_ids) - len(record.output_token_ids))
    num_bytes = len(encode(grown)) - len(encode(record)) - num_token_bytes
    assert num_bytes / num_positions < 216


@pytest.mark.parametrize(
    "name",
    [field.name for field in fields(RoundTrace) if field.name.endswith(("_G", "_EK", "_E"))],
)
def test_arrays_that_do_not_fit_each_other_are_refused_before_they_are_stored(name: str) -> None:
    trace = make_round()
    torn = replace(trace, **{name: getattr(trace, name)[1:]})
    with pytest.raises(ValueError, match=r"record 'a': round 1: .* not encoded"):
        encode(make_record(rounds=(trace, torn)))


@pytest.mark.parametrize(
    "embedding",
    [np.array([]), np.zeros((2, 2)), np.array([1.0, np.nan]), np.array([1e6]), np.zeros(2**16 + 1)],
)
def test_an_embedding_that_could_mislead_is_refused_before_it_is_stored(embedding: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"record 'a': prompt_embedding_H .* not encoded"),
        np.errstate(all="ignore"),
    ):
        encode(make_record(prompt_embedding_H=embedding))


def test_a_stored_embedding_that_is_not_finite_is_corrupt() -> None:
    body = msgpack.unpackb(encode(make_record(prompt_embedding_H=np.ones(4, dtype=np.float16)))[9:])
    body["prompt_embedding_H"] = np.array([1.0, np.inf], dtype="<f2").tobytes()
    with pytest.raises(CorruptRecordError, match="prompt_embedding_H"):
        decode(GenerationRecord, sealed(1, msgpack.packb(body)))


def test_a_record_without_an_embedding_is_what_builds_before_it_wrote() -> None:
    body = msgpack.unpackb(encode(make_record())[9:])
    assert "prompt_embedding_H" not in body
    assert decode(GenerationRecord, encode(make_record())).prompt_embedding_H is None


def test_a_status_of_a_build_before_the_one_cost_model_is_read() -> None:
    costs = PassCosts((1, 8), (1, 5), ((0.1, 0.2), (0.3, 0.4)), (0.01, 0.02), (0.0, 0.0))
    status = ServingStatus("one", 1.0, {}, (), costs)
    data = encode(status)
    body = msgpack.unpackb(data[9:])
    del body["costs"]["draft_start_s"], body["is_draft_length_fixed"]
    assert decode(ServingStatus, sealed(data[4], msgpack.packb(body))) == status


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, 65535])
def test_another_schema_version_is_named_and_refused(version: int) -> None:
    data = encode(make_record())
    foreign = data[:2] + struct.pack("<H", version) + b"whatever that version means"
    expected = f"schema version {version}, this build reads 1 and 2: nothing was decoded"
    with pytest.raises(SchemaVersionError, match=expected):
        decode(GenerationRecord, foreign)


def test_one_kind_is_not_read_as_another() -> None:
    with pytest.raises(CorruptRecordError, match="kind is 2, not 1"):
        decode(GenerationRecord, encode(make_manifest(1)))


def test_every_truncation_is_corrupt() -> None:
    data = encode(make_record())
    for length in range(len(data)):
        with pytest.raises(CorruptRecordError, match="nothing was decoded"):
            decode(GenerationRecord, data[:length])


def test_errors_cross_processes() -> None:
    with pytest.raises(CorruptRecordError) as caught:
        decode(GenerationRecord, b"")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


SAMPLES = {1: SCHEMA_1, 2: {cls: encode(decode(cls, data)) for cls, data in SCHEMA_1.items()}}
schemas = st.sampled_from(sorted(KINDS_BY_SCHEMA))


def test_every_kind_has_a_number_of_its_own() -> None:
    numbers = KINDS_BY_SCHEMA[SCHEMA_VERSION]
    assert numbers.keys() == set(KINDS)
    assert len(set(numbers.values())) == len(KINDS)


def test_a_status_is_no_route_state() -> None:
    """Both were of kind 5 in schema 1."""
    with pytest.raises(CorruptRecordError, match="kind is 7, not 5"):
        decode(ServingStatus, encode(RouteState("default")))


@pytest.mark.parametrize("version", [-1, -2])
def test_a_number_that_is_no_version_is_refused_before_it_is_stored(version: int) -> None:
    """What stood for another drafter in schema 1 has a name now."""
    with pytest.raises(ValueError, match=f"draft_version={version} is negative"):
        encode(make_record(rounds=(replace(make_round(), draft_version=version),)))
    with pytest.raises(ValueError, match=f"draft_version={version} is negative"):
        DrafterCounts("draft", "default", version)


@given(st.sampled_from(KINDS), st.binary(max_size=64))
@settings(max_examples=300, deadline=None)
def test_garbage_is_corrupt(cls: type, data: bytes) -> None:
    with pytest.raises(SeamError):
        decode(cls, data)


plain = st.recursive(
    st.none() | st.booleans() | int32 | numbers | texts | st.binary(max_size=16),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(KINDS), schemas, st.binary(max_size=64) | plain.map(msgpack.packb))
@settings(max_examples=300, deadline=None)
def test_a_foreign_body_behind_a_valid_header_is_corrupt(cls: type, schema: int, body: bytes) -> None:
    with pytest.raises(CorruptRecordError):
        decode(cls, sealed(KINDS_BY_SCHEMA[schema][cls], body, schema))


@given(st.data(), st.sampled_from(KINDS), schemas)
@settings(max_examples=300, deadline=None)
def test_a_value_with_one_foreign_field_is_corrupt_or_still_such_a_value(
    data: st.DataObject, cls: type, schema: int
) -> None:
    body = msgpack.unpackb(SAMPLES[schema][cls][9:], strict_map_key=False)
    place = data.draw(st.sampled_from([inner for inner in inner_values(body) if inner]))
    spots = range(len(place)) if isinstance(place, list) else sorted(place, key=str)
    place[data.draw(st.sampled_from(spots))] = data.draw(plain)
    try:
        decoded = decode(cls, sealed(KINDS_BY_SCHEMA[schema][cls], msgpack.packb(body), schema))
    except CorruptRecordError:
        return
    again = encode(decoded)
    assert encode(decode(cls, again)) == again, "what is let in can be passed on"


def inner_values(value: Any) -> Iterator[Any]:
    """Every map and list in it, itself first."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from inner_values(inner)


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_a_flipped_bit_never_goes_unnoticed(place: int, flip: int) -> None:
    data = bytearray(encode(make_record()))
    data[place % len(data)] ^= flip
    with pytest.raises(SeamError):
        decode(GenerationRecord, bytes(data))


def test_a_record_says_that_it_is_isolated_and_others_are_as_they_were() -> None:
    """Builds that know no isolation read every other record, and refuse these rather than share them."""
    record = make_record()
    assert b"isolated" not in encode(record)
    assert not decode(GenerationRecord, encode(record)).isolated
    kept = encode(replace(record, isolated=True))
    assert b"isolated" in kept and decode(GenerationRecord, kept).isolated
