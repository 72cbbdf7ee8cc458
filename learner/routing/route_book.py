"""The route book: open routes, the standing of each, and the table of centroids, in one small file.

Knows no drafts: each route has a checkpoint of its own, in the folder named here. Invariant: the file is
replaced atomically, so that it is either the old book or the new one; a file that cannot be read counts as no
book.
"""

import base64
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from buffer.codec import decode, encode
from buffer.errors import SeamError
from buffer.names import DEFAULT_ROUTE
from buffer.route_table import RouteTable
from learner.checkpoint import replace_file
from learner.routing.policy import Standing

logger = logging.getLogger(__name__)

_FILE = "routes.json"
_SCHEMA = 1


@dataclass(frozen=True, eq=False)
class RouteBook:
    """Standings by route; `default` has none, it is always open."""

    standings: Mapping[str, Standing] = field(default_factory=dict)
    table: RouteTable | None = None


def checkpoint_folder(folder: Path, route: str) -> Path:
    """Folder of the route's own checkpoints."""
    return folder if route == DEFAULT_ROUTE else folder / "routes" / route


def forget_checkpoints(folder: Path, route: str) -> None:
    """Delete a closed route's checkpoints, so that it starts without them when it is opened again."""
    assert route != DEFAULT_ROUTE
    shutil.rmtree(checkpoint_folder(folder, route), ignore_errors=True)


def write_book(folder: Path, book: RouteBook) -> None:
    """Write the book; after the call it survives a loss of power."""
    plain = {
        "schema": _SCHEMA,
        "standings": {route: asdict(standing) for route, standing in book.standings.items()},
        "table": None if book.table is None else base64.b64encode(encode(book.table)).decode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / _FILE, json.dumps(plain).encode())


def read_book(folder: Path) -> RouteBook:
    """Read the book; an empty one if there is none."""
    path = folder / _FILE
    if not path.exists():
        return RouteBook()
    try:
        plain = json.loads(path.read_bytes())
        if plain["schema"] != _SCHEMA:
            raise ValueError(f"schema {plain['schema']}, this build reads {_SCHEMA}")
        standings = {route: Standing(**fields) for route, fields in plain["standings"].items()}
        table = None if plain["table"] is None else decode(RouteTable, base64.b64decode(plain["table"]))
    except (ValueError, KeyError, TypeError, SeamError) as error:
        logger.warning("%s is no book of routes, starting with the default route alone: %s", path, error)
        return RouteBook()
    return RouteBook(standings, table)
