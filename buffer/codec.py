"""Records, manifests, events, statuses, route states and route tables to bytes and back. No pickle.

Layout: magic, schema version, kind, checksum of the body; then the body, msgpack with raw little-endian
arrays. It knows nothing of where the bytes are stored. Invariant: `decode` returns what was encoded or raises
a SeamError, for any input bytes.

Schema 2 is written, schema 1 is read too (see `schema1`). Builds of schema 1 refuse schema 2, so the learner
is upgraded before the replicas: an old replica keeps the drafts it has and goes on writing records that the
new learner reads, whereas an old learner drops new records unread.
"""

import struct
import zlib
from collections.abc import Callable
from typing import Any, TypeVar, cast, get_type_hints

import msgpack  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from buffer.columns import decode_rounds, encode_rounds
from buffer.errors import CorruptRecordError, SchemaVersionError
from buffer.plain import from_plain, to_plain
from buffer.records import AdapterEvent, AdapterManifest, GenerationRecord, ServingStatus
from buffer.route_state import RouteState
from buffer.route_table import RouteTable, table_from_plain, table_to_plain
from buffer.schema1 import KINDS_1, from_schema_1

SCHEMA_VERSION = 2

_MAGIC = b"ed"
_PREFIX = struct.Struct("<2sH")
"""Magic and schema version: these two fields stay in place in every schema version."""
_HEADER = struct.Struct("<2sHBI")
_KINDS: dict[type, int] = {
    GenerationRecord: 1,
    AdapterManifest: 2,
    AdapterEvent: 3,
    ServingStatus: 5,
    RouteTable: 6,
    RouteState: 7,
}
"""No number is used twice or reused: 4 was a status before the first release, and 5 in schema 1 was a route
state too."""
KINDS_BY_SCHEMA = {1: {**_KINDS, **KINDS_1}, SCHEMA_VERSION: _KINDS}
_RECORD_HINTS = get_type_hints(GenerationRecord)
_TOKEN_FIELDS = ("prompt_token_ids", "output_token_ids")
_EMBEDDING = "prompt_embedding_H"
"""The key is absent if the record has no embedding, as in all records of builds that did not know it."""
_MAX_EMBEDDING = 2**16
_ISOLATED = "isolated"
"""There only if it is true: builds that do not know it read every other record, and refuse these."""
_RECORD_SCALARS = sorted(_RECORD_HINTS.keys() - {*_TOKEN_FIELDS, "rounds", _EMBEDDING, _ISOLATED})

T = TypeVar("T")


def encode(value: Any) -> bytes:
    """Bytes of one of the six kinds. Raises ValueError or TypeError for a malformed value."""
    body: bytes = msgpack.packb(_TO_PLAIN.get(type(value), to_plain)(value))
    return _HEADER.pack(_MAGIC, SCHEMA_VERSION, _KINDS[type(value)], zlib.crc32(body)) + body


def decode(cls: type[T], data: bytes) -> T:
    """The `cls` that was encoded; its arrays are read-only views.

    Raises SchemaVersionError for another schema version, CorruptRecordError for anything else."""
    version, body = _checked_body(cls, data)
    try:
        plain = msgpack.unpackb(body, strict_map_key=False)
        if version == 1:
            plain = from_schema_1(cls, plain)
        value = _FROM_PLAIN[cls](plain) if cls in _FROM_PLAIN else from_plain(cls, plain)
    except Exception as error:  # foreign bytes may fail in any way; callers handle exactly one
        raise _corrupt(cls, data, str(error)) from error
    assert isinstance(value, cls)
    return value


def _checked_body(cls: type, data: bytes) -> tuple[int, bytes]:
    """Schema version and body."""
    if len(data) < _PREFIX.size or not data.startswith(_MAGIC):
        raise _corrupt(cls, data, "no header")
    version = _PREFIX.unpack_from(data)[1]
    if version not in KINDS_BY_SCHEMA:
        readable = " and ".join(map(str, KINDS_BY_SCHEMA))
        raise SchemaVersionError(
            f"{cls.__name__} has schema version {version}, this build reads {readable}: "
            "nothing was decoded; run the build that wrote it, or discard it"
        )
    if len(data) < _HEADER.size:
        raise _corrupt(cls, data, "truncated header")
    _, _, kind, checksum = _HEADER.unpack_from(data)
    body = data[_HEADER.size :]
    expected = KINDS_BY_SCHEMA[version][cls]
    if kind != expected:
        raise _corrupt(cls, data, f"kind is {kind}, not {expected}")
    if zlib.crc32(body) != checksum:
        raise _corrupt(cls, data, "checksum does not match")
    return version, body


def _corrupt(cls: type, data: bytes, why: str) -> CorruptRecordError:
    text = f"{len(data)} bytes are no {cls.__name__}: {why}; nothing was decoded"
    return CorruptRecordError(text)


def _record_to_plain(record: GenerationRecord) -> dict[str, Any]:
    plain = {name: to_plain(getattr(record, name)) for name in _RECORD_SCALARS}
    for name in _TOKEN_FIELDS:
        plain[name] = np.ascontiguousarray(getattr(record, name), dtype="<i4").tobytes()
    if record.isolated:
        plain[_ISOLATED] = True
    try:
        if record.prompt_embedding_H is not None:
            plain[_EMBEDDING] = _checked_embedding(record.prompt_embedding_H).tobytes()
        return {**plain, "rounds": encode_rounds(record.rounds)}
    except ValueError as error:
        raise ValueError(f"record {record.record_id!r}: {error}") from error


def _record_from_plain(plain: dict[str, Any]) -> GenerationRecord:
    if plain.keys() | {_EMBEDDING, _ISOLATED} != _RECORD_HINTS.keys():
        raise ValueError(f"fields are {sorted(plain)}")
    values = {name: from_plain(_RECORD_HINTS[name], plain[name]) for name in _RECORD_SCALARS}
    for name in _TOKEN_FIELDS:
        values[name] = np.frombuffer(plain[name], dtype="<i4")
    if _EMBEDDING in plain:
        values[_EMBEDDING] = _checked_embedding(np.frombuffer(plain[_EMBEDDING], dtype="<f2"))
    values[_ISOLATED] = from_plain(bool, plain.get(_ISOLATED, False))
    return GenerationRecord(**values, rounds=decode_rounds(plain["rounds"]))


def _checked_embedding(embedding_H: NDArray[Any]) -> NDArray[np.float16]:
    """Centroids are means over records, so one value that is not finite would misroute all prompts."""
    halves_H = np.ascontiguousarray(embedding_H, dtype="<f2")
    if halves_H.ndim != 1 or not 0 < halves_H.size <= _MAX_EMBEDDING or not np.isfinite(halves_H).all():
        raise ValueError(
            f"prompt_embedding_H of shape {np.shape(embedding_H)} must be finite in float16, one axis of 1 "
            f"to {_MAX_EMBEDDING} entries; not encoded"
        )
    return halves_H


def _status_from_plain(plain: dict[str, Any]) -> ServingStatus:
    """Adds fields that earlier builds did not report: the extra cost of a first draft pass, whether the draft
    length is fixed, and how many records went to `default`."""
    costs = plain["costs"]
    if costs is not None:
        costs.setdefault("draft_start_s", [0.0] * len(costs["batch_sizes"]))
    absent = {"is_draft_length_fixed": False, "num_rerouted_records": 0}
    return cast(ServingStatus, from_plain(ServingStatus, absent | plain))


def _state_to_plain(state: RouteState) -> dict[str, Any]:
    """`settled` is there during a trial only, so that builds that know no trial read every other state."""
    plain: dict[str, Any] = to_plain(state)
    if state.settled is None:
        del plain["settled"]
    return plain


def _state_from_plain(plain: dict[str, Any]) -> RouteState:
    return cast(RouteState, from_plain(RouteState, {"settled": None} | plain))


_TO_PLAIN: dict[type, Callable[[Any], Any]] = {
    GenerationRecord: _record_to_plain,
    RouteTable: table_to_plain,
    RouteState: _state_to_plain,
}
_FROM_PLAIN: dict[type, Callable[[Any], Any]] = {
    GenerationRecord: _record_from_plain,
    ServingStatus: _status_from_plain,
    RouteState: _state_from_plain,
    RouteTable: table_from_plain,
}
