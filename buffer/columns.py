"""The rounds of a record as columns: each array concatenated over the rounds, raw little-endian.

A position costs 6 K bytes of top-K, 8 of re-tempering and emitted log-probability, 12 when drafted;
a round adds 28 of layout. It knows nothing of headers, checksums or versions: that is `codec`.
Invariant: `decode_rounds(encode_rounds(rounds))` is bit-identical, NaN payloads and infinities included.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.records import RoundTrace

LAYOUT = "layout"
"""int32 [rounds, 7]: start, draft_version, num_accepted, num_attempted, G, C, K."""

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


def encode_rounds(rounds: Sequence[RoundTrace]) -> dict[str, bytes]:
    """Column name -> bytes. Raises ValueError for a round whose arrays do not fit each other."""
    sizes = [_checked_sizes(index, trace) for index, trace in enumerate(rounds)]
    layout = [
        (t.start, t.draft_version, t.num_accepted, t.num_attempted, *size)
        for t, size in zip(rounds, sizes, strict=True)
    ]
    columns = {LAYOUT: np.array(layout, dtype="<i4").tobytes()}
    for name, dtype in _DTYPES.items():
        parts = (np.ascontiguousarray(getattr(trace, name), dtype=dtype) for trace in rounds)
        columns[name] = b"".join(part.tobytes() for part in parts)
    return columns


def decode_rounds(columns: Mapping[str, bytes]) -> tuple[RoundTrace, ...]:
    """Rounds whose arrays are read-only views of the columns. Raises ValueError if they do not fit."""
    if columns.keys() != {LAYOUT, *_DTYPES}:
        raise ValueError(f"columns are {sorted(columns)}")
    layout = [list(map(int, row)) for row in np.frombuffer(columns[LAYOUT], "<i4").reshape(-1, 7)]
    if any(size < 0 for row in layout for size in row[4:]):
        raise ValueError("a round has a negative size")
    shapes = [_shapes(*row[4:]) for row in layout]
    split = {name: _split(name, columns[name], [by_name[name] for by_name in shapes]) for name in _DTYPES}
    return tuple(_round(row, {name: next(arrays) for name, arrays in split.items()}) for row in layout)


def _round(row: Sequence[int], arrays: dict[str, Any]) -> RoundTrace:
    start, draft_version, num_accepted, num_attempted = row[:4]
    return RoundTrace(start, draft_version, num_accepted, num_attempted, **arrays)


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
