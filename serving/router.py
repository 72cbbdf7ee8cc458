"""Which route a request takes, and with it whose draft learns from it. First version: the request's own tag.

Knows no HTTP framework: it is given the tag and the header as they came. Raises ValueError for a name that
could not be a stream's key.
"""

import re
from collections.abc import Mapping

from buffer.records import DEFAULT_ROUTE

ROUTE_HEADER = "X-Everdraft-Route"
ROUTE_TAG = "route"
_ROUTE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def choose_route(metadata: Mapping[str, str] | None, header: str | None) -> str:
    """`metadata.route`, else the header, else `default`. Raises ValueError naming the value."""
    tag = (metadata or {}).get(ROUTE_TAG)
    name = tag if tag is not None else header
    if name is None:
        return DEFAULT_ROUTE
    if _ROUTE_NAME.fullmatch(name) is None:
        raise ValueError(
            f"route={name!r} must be 1 to 64 letters, digits, '_', '.' or '-', starting with a letter or "
            "digit; the request was not started"
        )
    return name
