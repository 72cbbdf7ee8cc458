"""What builds of schema 1 wrote, in the shape of schema 2: bodies as plain data, before they become values.

There a number stood for who drafted: versions from 0 up for the draft of the record's own route, -1 for what
copied from the text, -2 for another route's draft, which could only be the default route's and whose version
was not written down. Invariant: what a round is evidence of stays as it was, unknown versions unknown. Bodies
may be hostile: whatever is raised here is a corrupt body to `codec`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from buffer.names import DEFAULT_ROUTE, MODEL_DRAFTER, NGRAM_DRAFTER
from buffer.records import GenerationRecord, ServingStatus
from buffer.route_state import RouteState

KINDS_1: dict[type, int] = {RouteState: 5}
"""Kinds whose number was another one; the same as a status's."""

_NGRAM_VERSION = -1
_BORROWED_VERSION = -2
_VERSION_COLUMN = 1
"""Of the layout: the draft's version there, the place of a drafter in schema 2."""

Plain = dict[str, Any]


def from_schema_1(cls: type, plain: Any) -> Any:
    """The body that schema 2 has for the same value. Raises whatever a body that is none of `cls` causes."""
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
    found: tuple[str, str | None, int | None] = MODEL_DRAFTER, route, version
    if version == _NGRAM_VERSION:
        found = NGRAM_DRAFTER, None, None
    elif version == _BORROWED_VERSION:
        found = MODEL_DRAFTER, DEFAULT_ROUTE, None
    return dict(zip(("drafter_id", "draft_route", "draft_version"), found, strict=True))


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
