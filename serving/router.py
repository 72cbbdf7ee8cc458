"""Which route a request takes, and with it whose draft learns from it. First version: the request's own tag.

Knows no HTTP framework: it is given the tag and the header as they came. Raises ValueError for a name that
could not be a stream's key.
"""

from collections.abc import Mapping

from buffer.records import DEFAULT_ROUTE
from buffer.route_table import check_route_name

ROUTE_HEADER = "X-Everdraft-Route"
ROUTE_TAG = "route"


def choose_route(metadata: Mapping[str, str] | None, header: str | None) -> str:
    """`metadata.route`, else the header, else `default`. Raises ValueError naming the value."""
    tag = (metadata or {}).get(ROUTE_TAG)
    name = tag if tag is not None else header
    if name is None:
        return DEFAULT_ROUTE
    try:
        check_route_name(name)
    except ValueError as error:
        raise ValueError(f"{error}; the request was not started") from None
    return name
