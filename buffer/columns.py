"""The rounds of a record as columns: each array concatenated over the rounds, raw little-endian.

A position costs 6 K bytes of top-K, 8 of re-tempering and emitted log-probability, 12 when drafted; a round
adds 28 of layout. Each drafter is named once a record; rounds refer to it by index. It knows nothing of
headers, checksums or schema versions: that is `codec`. Invariant: `decode_rounds(encode_rounds(rounds))` is
bit-identical, NaN payloads and infinities included.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.plain import from_plain, to_plain
from buffer.records import RoundTrace

LAYOUT = "layout"
"""int32 [rounds, 7]: start, index in DRAFTERS, num_accepted, num_attempted, G, C, K."""

DRAFTERS = "drafters"
"""The distinct DraftedBy values of the rounds."""

_DTYPES = {
    "drafted_token_ids_G": "<i4",
    "drafted_target_logprobs_G": "<f4",
    "drafted_draft_logprobs_G": "<f4",
    "emitted_target_logprobs_C": "<f4",
    "topk_token_ids_EK": "<i4",
    "topk_logprobs_EK": "<f2",
    "retemper_E": "<f4",
}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class DraftedBy:
    """The fields of a RoundTrace that say who drafted; most rounds of a record share them."""

    drafter_id: str
    draft_route: str | None
    draft_version: int | None

    def __post_init__(self) -> None:
        if self.draft_version is not None and self.draft_version < 0:
            raise ValueError(f"draft_version={self.draft_version} is negative; it names no version")


def encode_rounds(rounds: Sequence[RoundTrace]) -> dict[str, Any]:
    """Column name -> bytes, and the drafters. Raises ValueError for a round whose arrays do not fit each
    other, or whose version is negative."""
    sizes = [_checked_sizes(index, trace) for index, trace in enumerate(rounds)]
    places: dict[DraftedBy, int] = {}
    layout = [
        (t.start, places.setdefault(_drafted_by(t), len(places)), t.num_accepted, t.num_attempted, *size)
        for t, size in zip(rounds, sizes, strict=True)
    ]
    columns = {LAYOUT: np.array(layout, dtype="<i4").tobytes(), DRAFTERS: to_plain(list(places))}
    for name, dtype in _DTYPES.items():
        parts = (np.ascontiguousarray(getattr(trace, name), dtype=dtype) for trace in rounds)
        columns[name] = b"".join(part.tobytes() for part in parts)
    return columns


def decode_rounds(columns: Mapping[str, Any]) -> tuple[RoundTrace, ...]:
    """Rounds whose arrays are read-only views of the columns. Raises ValueError if they do not fit."""
    if columns.keys() != {LAYOUT, DRAFTERS, *_DTYPES}:
        raise ValueError(f"columns are {sorted(columns)}")
    drafters = from_plain(tuple[DraftedBy, ...], columns[DRAFTERS])
    layout = [list(map(int, row)) for row in np.frombuffer(columns[LAYOUT], "<i4").reshape(-1, 7)]
    if any(size < 0 for row in layout for size in row[4:]):
        raise ValueError("a round has a negative size")
    if any(not 0 <= row[1] < len(drafters) for row in layout):
        raise ValueError(f"a round's drafter is none of {len(drafters)}")
    shapes = [_shapes(*row[4:]) for row in layout]
    split = {name: _split(name, columns[name], [by_name[name] for by_name in shapes]) for name in _DTYPES}
    return tuple(
        _round(row, drafters[row[1]], {name: next(arrays) for name, arrays in split.items()})
        for row in layout
    )


def _round(row: Sequence[int], by: DraftedBy, arrays: dict[str, Any]) -> RoundTrace:
    start, _, num_accepted, num_attempted = row[:4]
    identity = (by.drafter_id, by.draft_route, by.draft_version)
    return RoundTrace(start, *identity, num_accepted, num_attempted, **arrays)


def _drafted_by(trace: RoundTrace) -> DraftedBy:
    return DraftedBy(trace.drafter_id, trace.draft_route, trace.draft_version)


def _shapes(num_drafted: int, num_emitted: int, num_kept: int) -> dict[str, Shape]:
    drafted, positions = (num_drafted,), num_drafted + 1
    return {
        "drafted_token_ids_G": drafted,
        "drafted_target_logprobs_G": drafted,
        "drafted_draft_logprobs_G": drafted,
        "emitted_target_logprobs_C": (num_emitted,),
        "topk_token_ids_EK": (positions, num_kept),
        "topk_logprobs_EK": (positions, num_kept),
        "retemper_E": (positions,),
    }


def _checked_sizes(index: int, trace: RoundTrace) -> tuple[int, int, int]:
    sizes = (
        trace.num_drafted,
        len(trace.emitted_target_logprobs_C),
        np.shape(trace.topk_token_ids_EK)[-1],
    )
    for name, shape in _shapes(*sizes).items():
        found = np.shape(getattr(trace, name))
        if found != shape:
            raise ValueError(f"round {index}: {name} has shape {found}, not {shape}; not encoded")
    return sizes


def _split(name: str, column: bytes, shapes: Sequence[Shape]) -> Iterator[NDArray[Any]]:
    flat = np.frombuffer(column, _DTYPES[name])
    ends = [0]
    for shape in shapes:
        ends.append(ends[-1] + prod(shape))
    if ends[-1] != len(flat):
        raise ValueError(f"{name} holds {len(flat)} entries, its rounds need {ends[-1]}")
    spans = zip(pairwise(ends), shapes, strict=True)
    return (flat[begin:end].reshape(shape) for (begin, end), shape in spans)
