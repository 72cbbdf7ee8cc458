"""Which route a prompt belongs to: one centroid a route, in the space of mean prompt embeddings.

Made by the learner, read by replicas. It knows nothing of traffic, drafts or storage. Invariant: a table is
complete and finite, or its construction fails. Legend: R routes, H the target's hidden size.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.names import DEFAULT_ROUTE

_ROUTE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAX_ROUTES = 256
_DTYPE = "<f4"


def check_route_name(name: str) -> None:
    """Raises ValueError for a name that could not be a stream's key."""
    if _ROUTE_NAME.fullmatch(name) is None:
        raise ValueError(
            f"route={name!r} must be 1 to 64 letters, digits, '_', '.' or '-', starting with a letter or "
            "digit"
        )


@dataclass(frozen=True, eq=False)
class RouteTable:
    """The centroids of all routes. Raises ValueError if the parts do not fit each other."""

    target_revision: str
    """The target whose hidden states these are; embeddings of another target cannot be compared with them."""
    updated_at_s: float
    mean_H: NDArray[np.float32]
    """Mean of all prompts' embeddings. All prompts share most of it; what remains after subtracting it
    differs by route."""
    centroids_RH: NDArray[np.float32]
    """Mean embedding of each route's prompts, before `mean_H` is subtracted."""
    routes: tuple[str, ...]
    """Route of each centroid; distinct except for `default`, which may have several centroids."""
    min_similarity: float
    """Cosine under which a prompt belongs to no route."""

    def __post_init__(self) -> None:
        for name in ("mean_H", "centroids_RH"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=_DTYPE))
        shape = (len(self.routes), self.mean_H.size)
        if self.mean_H.ndim != 1 or not self.mean_H.size or self.centroids_RH.shape != shape:
            raise ValueError(
                f"mean_H has shape {self.mean_H.shape} and centroids_RH {self.centroids_RH.shape} for "
                f"{len(self.routes)} routes; there is no such table"
            )
        if not (np.isfinite(self.mean_H).all() and np.isfinite(self.centroids_RH).all()):
            raise ValueError("mean_H or centroids_RH is not finite; every prompt would be misled")
        if not -1.0 <= self.min_similarity <= 1.0:
            raise ValueError(f"min_similarity={self.min_similarity!r} is no cosine; nothing was routed")
        named = [route for route in self.routes if route != DEFAULT_ROUTE]
        if len(self.routes) > _MAX_ROUTES or len(set(named)) < len(named):
            raise ValueError(f"routes={self.routes!r} must be distinct, {_MAX_ROUTES} at most")
        for route in self.routes:
            check_route_name(route)

    def route_of(self, embedding_H: NDArray[Any]) -> str:
        """The route of the nearest centroid, by cosine after subtracting the mean; `default` if none is near.
        Raises ValueError for an embedding of another size."""
        if embedding_H.shape != self.mean_H.shape:
            raise ValueError(
                f"embedding_H has shape {embedding_H.shape}, the table's are {self.mean_H.shape}: it is "
                "another model's; nothing was routed"
            )
        if not self.routes:
            return DEFAULT_ROUTE
        own_H = embedding_H.astype(np.float64) - self.mean_H
        centred_RH = self.centroids_RH.astype(np.float64) - self.mean_H
        norms_R = np.linalg.norm(centred_RH, axis=1) * np.linalg.norm(own_H)
        similarity_R = np.divide(
            centred_RH @ own_H, norms_R, out=np.full(len(self.routes), -1.0), where=norms_R > 0.0
        )
        best = int(similarity_R.argmax())  # the first NaN, if any
        return self.routes[best] if similarity_R[best] >= self.min_similarity else DEFAULT_ROUTE


def table_to_plain(table: RouteTable) -> dict[str, Any]:
    """Numbers, strings and raw little-endian arrays."""
    return {
        "target_revision": table.target_revision,
        "updated_at_s": float(table.updated_at_s),
        "mean_H": table.mean_H.tobytes(),
        "centroids_RH": table.centroids_RH.tobytes(),
        "routes": list(table.routes),
        "min_similarity": float(table.min_similarity),
    }


def table_from_plain(plain: Mapping[str, Any]) -> RouteTable:
    """Raises ValueError, TypeError or KeyError for what `table_to_plain` did not make."""
    routes = plain["routes"]
    if not isinstance(routes, list) or not isinstance(plain["target_revision"], str):
        raise ValueError("routes or target_revision is of another type")
    mean_H = np.frombuffer(plain["mean_H"], _DTYPE)
    return RouteTable(
        target_revision=plain["target_revision"],
        updated_at_s=float(plain["updated_at_s"]),
        mean_H=mean_H,
        centroids_RH=np.frombuffer(plain["centroids_RH"], _DTYPE).reshape(len(routes), mean_H.size),
        routes=tuple(routes),
        min_similarity=float(plain["min_similarity"]),
    )
