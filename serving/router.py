"""Chooses the route of a request, and with it the draft that serves it and is trained on it.

In order: the request's own tag; its header; the route whose centroid is nearest to its prompt's embedding;
`default`. Knows no HTTP framework: it is given the values of tag and header.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from buffer.names import DEFAULT_ROUTE
from buffer.route_table import RouteTable, check_route_name

ROUTE_HEADER = "X-Everdraft-Route"
ROUTE_TAG = "route"


def choose_route(metadata: Mapping[str, str] | None, header: str | None) -> str | None:
    """`metadata.route`, else the header; None: the prompt's embedding decides. Raises ValueError for a name
    that is invalid as a route."""
    tag = (metadata or {}).get(ROUTE_TAG)
    name = tag if tag is not None else header
    if name is None:
        return None
    try:
        check_route_name(name)
    except ValueError as error:
        raise ValueError(f"{error}; the request was not started") from None
    return name


class PromptRouter:
    """Routes prompts by the latest table. One thread may replace the table while another routes."""

    def __init__(self, target_revision: str) -> None:
        self._target_revision = target_revision
        self._table: RouteTable | None = None
        self.closed_routes: frozenset[str] = frozenset()
        """Routes that no prompt is of, only a tag: prompts near one are of the default route."""

    def use(self, table: RouteTable | None) -> None:
        """Use this table. None, or a table of another target: every prompt is of the default route."""
        if table is not None and table.target_revision != self._target_revision:
            table = None
        self._table = table

    def __call__(self, embedding_H: NDArray[np.float16]) -> str:
        """Raises ValueError for an embedding of another size than the table's."""
        table = self._table
        route = DEFAULT_ROUTE if table is None else table.route_of(embedding_H)
        return DEFAULT_ROUTE if route in self.closed_routes else route
