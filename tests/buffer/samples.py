"""Small valid records and manifests, and a clock that only a test moves."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from buffer.codec import SCHEMA_VERSION
from buffer.names import MODEL_DRAFTER
from buffer.records import AdapterManifest, GenerationRecord, RecordSampling, RoundTrace
from buffer.route_table import RouteTable
from buffer.store import RecordStore

START_S = 1_000_000.0
STATUS_TTL_S = 2.0

OpenStore = Callable[..., RecordStore]
"""Bounds -> a store with them."""


def sealed(kind: int, body: bytes, schema_version: int = SCHEMA_VERSION) -> bytes:
    """Any body behind a valid header, so that the checksum does not hide what lies behind it."""
    return struct.pack("<2sHBI", b"ed", schema_version, kind, zlib.crc32(body)) + body


@dataclass
class FakeClock:
    now_s: float = START_S

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


def make_round(*, num_drafted: int = 4, num_kept: int = 32, start: int = 8, seed: int = 0) -> RoundTrace:
    """A round that accepted half of what it drafted."""
    generator = np.random.default_rng(seed)
    num_accepted, positions = num_drafted // 2, num_drafted + 1
    num_attempted = min(num_accepted + 1, num_drafted)

    def logprobs(*shape: int) -> Any:
        return -generator.exponential(size=shape).astype(np.float32)

    return RoundTrace(
        start=start,
        drafter_id=MODEL_DRAFTER,
        draft_route="default",
        draft_version=3,
        num_accepted=num_accepted,
        num_attempted=num_attempted,
        drafted_token_ids_G=generator.integers(0, 1000, num_drafted, dtype=np.int32),
        drafted_target_logprobs_G=logprobs(num_drafted),
        drafted_draft_logprobs_G=logprobs(num_drafted),
        emitted_target_logprobs_C=logprobs(num_accepted + 1),
        topk_token_ids_EK=generator.integers(0, 1000, (positions, num_kept), dtype=np.int32),
        topk_logprobs_EK=logprobs(positions, num_kept).astype(np.float16),
        retemper_E=logprobs(positions),
    )


def make_record(
    record_id: str = "a", *, num_rounds: int = 1, num_kept: int = 4, **changes: Any
) -> GenerationRecord:
    record = GenerationRecord(
        record_id=record_id,
        request_id=f"request-{record_id}",
        route="default",
        target_revision="revision",
        sampling=RecordSampling(),
        prompt_token_ids=np.arange(8, dtype=np.int32),
        output_token_ids=np.arange(3 * num_rounds, dtype=np.int32),
        rounds=tuple(make_round(num_kept=num_kept, start=8 + 3 * r, seed=r) for r in range(num_rounds)),
        created_at_s=START_S,
        expires_at_s=START_S + 3600.0,
    )
    record = replace(record, **changes)
    own = tuple(replace(trace, draft_route=record.route) for trace in record.rounds)
    return replace(record, rounds=record.rounds if "rounds" in changes else own)


def borrowed(record_id: str, **changes: Any) -> GenerationRecord:
    """Of a route without a draft of its own: `default`'s drafted."""
    record = make_record(record_id, **changes)
    return replace(record, rounds=tuple(replace(trace, draft_route="default") for trace in record.rounds))


def make_manifest(draft_version: int, parent_version: int = 0, *, route: str = "default") -> AdapterManifest:
    return AdapterManifest(
        route=route,
        draft_version=draft_version,
        parent_version=parent_version,
        draft_id="draft",
        draft_revision="draft-revision",
        target_revision="revision",
        rank=8,
        alpha=16.0,
        target_modules=("q_proj", "v_proj"),
        adapter_config_json="{}",
        sha256="0" * 64,
        num_bytes=3,
        created_at_s=START_S,
        evidence={"gain": 0.25},
    )


def make_table(*routes: str, hidden_size: int = 3, **changes: Any) -> RouteTable:
    """Centroids along the axes, one unit from a mean of tens."""
    mean_H = np.full(hidden_size, 10.0, dtype=np.float32)
    centroids_RH = (
        mean_H + np.eye(max(hidden_size, len(routes)), hidden_size, dtype=np.float32)[: len(routes)]
    )
    table = RouteTable("revision", START_S, mean_H, centroids_RH, routes, min_similarity=0.5)
    return replace(table, **changes)
