"""Converts plain data of schema 1 to the shape of schema 2, before it is decoded into values.

In schema 1 a number said who drafted: versions from 0 up for the draft of the record's own route, -1 for
n-gram lookup, -2 for another route's draft, which could only be the default route's and whose version was not
stored. Invariant: each round still counts for the same drafter, and an unknown version stays unknown. Bodies
may be hostile: `codec` treats whatever is raised here as a corrupt body.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from buffer.names import DEFAULT_ROUTE, MODEL_DRAFTER, NGRAM_DRAFTER
from buffer.records import GenerationRecord, ServingStatus
from buffer.route_state import RouteState

KINDS_1: dict[type, int] = {RouteState: 5}
"""Kinds that had another number in schema 1; it was also the number of a status."""

_NGRAM_VERSION = -1
_BORROWED_VERSION = -2
_VERSION_COLUMN = 1
"""Column of the layout: the draft's version in schema 1, the index of a drafter in schema 2."""

Plain = dict[str, Any]


def from_schema_1(cls: type, plain: Any) -> Any:
    """The body of the same value in schema 2. Raises any exception for a body that is no `cls`."""
    upgrade = _UPGRADES.get(cls)
    return plain if upgrade is None else upgrade(plain)


def _record(plain: Plain) -> Plain:
    rounds = plain["rounds"]
    layout = np.frombuffer(rounds["layout"], "<i4").reshape(-1, 7).copy()
    versions, places = np.unique(layout[:, _VERSION_COLUMN], return_inverse=True)
    layout[:, _VERSION_COLUMN] = places
    drafters = [_drafted_by(int(version), plain["route"]) for version in versions]
    named = _added(rounds, {"drafters": drafters})
    return plain | {"rounds": named | {"layout": layout.tobytes()}}


def _drafted_by(version: int, route: str) -> Plain:
    fields: tuple[str, str | None, int | None] = MODEL_DRAFTER, route, version
    if version == _NGRAM_VERSION:
        fields = NGRAM_DRAFTER, None, None
    elif version == _BORROWED_VERSION:
        fields = MODEL_DRAFTER, DEFAULT_ROUTE, None
    return dict(zip(("drafter_id", "draft_route", "draft_version"), fields, strict=True))


def _status(plain: Plain) -> Plain:
    counts = [
        _added(counters, _counted(version, route))
        for route, by_version in plain["counts"].items()
        for version, counters in by_version.items()
    ]
    return plain | {"counts": counts}


def _counted(version: int, route: str) -> Plain:
    copied = version == _NGRAM_VERSION
    return {
        "drafter_id": NGRAM_DRAFTER if copied else MODEL_DRAFTER,
        "route": route,
        "draft_version": None if copied else version,
    }


def _added(plain: Plain, fields: Plain) -> Plain:
    if plain.keys() & fields.keys():
        raise ValueError(f"schema 1 had no fields {sorted(fields)}")
    return plain | fields


_UPGRADES: dict[type, Callable[[Plain], Plain]] = {GenerationRecord: _record, ServingStatus: _status}
