"""What a build of schema 1 wrote is read as what it meant. Such a build wrote the bytes in `schema1.json`."""

import json
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from buffer.codec import SCHEMA_VERSION, decode, encode
from buffer.errors import CorruptRecordError
from buffer.records import (
    AdapterEvent,
    AdapterManifest,
    DrafterCounts,
    GenerationRecord,
    PassCosts,
    RecordSampling,
    ServingStatus,
)
from buffer.route_state import RouteState
from buffer.route_table import RouteTable
from tests.buffer.samples import make_manifest, sealed

KINDS = (GenerationRecord, AdapterManifest, AdapterEvent, ServingStatus, RouteState, RouteTable)
SCHEMA_1: dict[type, bytes] = {
    cls: bytes.fromhex(json.loads(Path(__file__).with_name("schema1.json").read_text())[cls.__name__])
    for cls in KINDS
}
STATUS = ServingStatus(
    replica_id="r0",
    at_s=1_000_001.5,
    serving_versions={"default": 0, "sql": 7},
    counts=(
        DrafterCounts("draft", "default", 0, 1, 2, 3, 4, 5),
        DrafterCounts("ngram", "default", None, 6, 7, 8, 9, 10),  # -1 there
        DrafterCounts("draft", "sql", 7, 11, 12, 13, 14, 15),
    ),
    costs=PassCosts((1, 8), (1, 5), ((0.1, 0.2), (0.3, 0.4)), (0.01, 0.02), (0.0, 0.0)),
    mean_batch_size=1.5,
    num_draft_tokens=4,
    num_dropped_records=3,
    num_swaps=2,
    num_swaps_under_load=1,
    swap_pause_s_max=0.25,
    round_s_median=0.125,
    passes="compiled",
    last_error="oops",
)


def record() -> GenerationRecord:
    return decode(GenerationRecord, SCHEMA_1[GenerationRecord])


def test_the_bytes_are_of_schema_1_and_two_kinds_share_a_number() -> None:
    assert {data[:4] for data in SCHEMA_1.values()} == {b"ed\x01\x00"} and SCHEMA_VERSION == 2
    assert [SCHEMA_1[cls][4] for cls in KINDS] == [1, 2, 3, 5, 5, 6]


def test_who_drafted_a_round_is_named() -> None:
    """There -1 stood for what copied, -2 for the default route's draft where the record's had none."""
    by = [(trace.drafter_id, trace.draft_route, trace.draft_version) for trace in record().rounds]
    assert by == [
        ("draft", "sql", 7),
        ("draft", "sql", 0),
        ("ngram", None, None),
        ("draft", "default", None),
        ("draft", "sql", 7),
    ]


def test_a_round_is_evidence_of_the_version_that_it_was_evidence_of() -> None:
    versions = range(10)
    evidence = [[version for version in versions if trace.is_by("sql", version)] for trace in record().rounds]
    assert evidence == [[7], [0], [], [], [7]]
    assert [trace.is_by_draft for trace in record().rounds] == [True, True, False, True, True]


def test_everything_else_of_a_record_is_as_it_was() -> None:
    found = record()
    assert (found.record_id, found.request_id, found.route) == ("a", "request-a", "sql")
    assert found.sampling == RecordSampling(0.5, 3, 0.75, 0.125, "coupled", context_dependent=True)
    assert (found.created_at_s, found.expires_at_s) == (1_000_000.0, 1_003_600.0)
    assert (found.replica_id, found.segment, found.target_revision) == ("r0", 1, "revision")
    assert (found.prompt_token_ids.tolist(), found.output_token_ids.tolist()) == ([*range(8)], [*range(6)])
    assert found.prompt_embedding_H is not None and found.prompt_embedding_H.tolist() == [0.5, -2.0]
    assert [trace.start for trace in found.rounds] == [8, 9, 10, 11, 12]
    assert [(trace.num_accepted, trace.num_attempted) for trace in found.rounds] == [(0, 1), (1, 2)] * 2 + [
        (0, 1)
    ]
    drafted = [trace.drafted_token_ids_G.tolist() for trace in found.rounds]
    assert drafted == [[850], [473, 511], [837], [811, 85], [726]]
    assert found.rounds[3].topk_token_ids_EK.tolist() == [[264, 159], [691, 734], [32, 113]]
    assert found.rounds[4].retemper_E.tobytes() == np.array([-0.92448884, -0.936959], np.float32).tobytes()


@pytest.mark.parametrize(
    ("expected", "cls"),
    [
        (make_manifest(3, 2, route="sql"), AdapterManifest),
        (AdapterEvent("promoted", "sql", 3, "why", 1_000_002.0, {"gain": 0.25}), AdapterEvent),
        (STATUS, ServingStatus),
        (RouteState("sql", last_version=9, pointer=7, pinned=5, parents={5: 4, 7: 5}), RouteState),
    ],
)
def test_manifests_events_statuses_and_states_are_what_they_were(expected: object, cls: type) -> None:
    assert decode(cls, SCHEMA_1[cls]) == expected


def test_a_route_table_is_what_it_was() -> None:
    found = decode(RouteTable, SCHEMA_1[RouteTable])
    assert (found.target_revision, found.routes, found.min_similarity) == ("revision", ("sql", "code"), 0.5)
    assert (found.mean_H.tolist(), found.centroids_RH.tolist()) == ([10] * 3, [[11, 10, 10], [10, 11, 10]])


@pytest.mark.parametrize("cls", KINDS)
def test_what_was_read_is_written_in_the_schema_of_today_and_stays_the_same(cls: type) -> None:
    once = decode(cls, SCHEMA_1[cls])
    data = encode(once)
    assert data[:4] == b"ed\x02\x00"
    assert encode(decode(cls, data)) == data


@pytest.mark.parametrize("version", [-3, -(2**31)])
def test_a_number_that_stood_for_nothing_is_corrupt(version: int) -> None:
    body: dict[str, Any] = msgpack.unpackb(SCHEMA_1[GenerationRecord][9:])
    layout = np.frombuffer(body["rounds"]["layout"], "<i4").reshape(-1, 7).copy()
    layout[2, 1] = version
    body["rounds"]["layout"] = layout.tobytes()
    with pytest.raises(CorruptRecordError, match=f"draft_version={version} is negative"):
        decode(GenerationRecord, sealed(1, msgpack.packb(body), 1))


def test_a_body_of_schema_1_behind_a_header_of_schema_2_is_corrupt_and_the_other_way_round() -> None:
    old, new = SCHEMA_1[GenerationRecord], encode(record())
    for body, schema in ((old[9:], 2), (new[9:], 1)):
        with pytest.raises(CorruptRecordError):
            decode(GenerationRecord, sealed(1, body, schema))
