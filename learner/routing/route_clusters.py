"""Finds kinds of prompts by clustering their embeddings, and makes the table that assigns prompts to them.

Knows no drafts and no store. Prompts are split only if the split shows on prompts that did not make it: one
half places the centroids (k-means), the other must have a valley between each two of them. Prompts of one
kind have one peak along a direction that does not depend on them, so that midway between two places at least
as many lie as around the lower of the two: two kinds are separated by mistake with a probability of at most
`FALSE_ALARM`.

Legend: N prompts, H hidden size, P principal directions, K clusters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.names import AUTO_PREFIX, DEFAULT_ROUTE
from buffer.route_table import RouteTable

LEAST_PROMPTS = 40
"""A kind needs at least so many prompts to be shown to be separate."""
FALSE_ALARM = 1e-3
MAX_VALLEY = 0.5
"""Largest ratio of prompts midway between two groups to those around the middle of the smaller group, in
equal widths."""
STRAY_SHARE = 0.01
"""Share of known prompts that may go to `default` because they are unlike their route."""
NUM_DIRECTIONS, NUM_POWERS = 32, 4
NUM_LOOKS = 3
"""Number of random halvings of the prompts; one may show a split that another misses."""
NUM_STARTS, MAX_ROUNDS = 4, 30

Floats = NDArray[np.float64]
Members = NDArray[np.int64]


def fit_routes(
    embeddings_NH: NDArray[Any],
    labels: Sequence[str] | None = None,
    *,
    previous: RouteTable | None = None,
    max_kinds: int = 8,
    target_revision: str = "",
    now_s: float = 0.0,
    seed: int = 0,
) -> RouteTable:
    """A centroid for each kind of prompts that is separate from all others; none if all are of one kind.

    `labels` are the known routes of the prompts. Prompts of `default` (all, without labels) take the name
    that `previous` gives them; those that it gives none are clustered, and a separate cluster gets a new name
    (`auto-1`, ...). If all untagged prompts form more kinds than have a name, they are clustered anew,
    because early kinds are coarse; a new kind with most prompts of an old one keeps its name. The rest of
    `default` has a centroid of its own. A label that is not separate from another kind gets no centroid: its
    requests must carry their tag. An old centroid is kept if there are now too few prompts of its kind, or if
    its kind was found by clustering and is not separate this time.
    """
    points_NH, rng = np.asarray(embeddings_NH, np.float64), np.random.default_rng(seed)
    names = np.array(labels if labels is not None else [DEFAULT_ROUTE] * len(points_NH), dtype=object)
    old = _centroids(previous)
    if previous is not None:
        for row in np.flatnonzero(names == DEFAULT_ROUTE):
            names[row] = previous.route_of(points_NH[row])
    members = {str(name): np.flatnonzero(names == name) for name in sorted({*names, DEFAULT_ROUTE})}
    members = {name: rows for name, rows in members.items() if len(rows) >= LEAST_PROMPTS}
    untagged = {name: rows for name, rows in members.items() if _is_untagged(name)}
    clusters, successors = _finest(points_NH, untagged, max_kinds, rng)
    if len(clusters) <= len(untagged) and {*untagged} - {DEFAULT_ROUTE}:
        untagged = {name: rows for name, rows in untagged.items() if name == DEFAULT_ROUTE}
        clusters, successors = _finest(points_NH, untagged, max_kinds, rng)
    known = {name: rows for name, rows in members.items() if name not in untagged}
    kinds = _told_apart(points_NH, known, clusters, successors, {*known, *old}, rng)
    gone = {*kinds, *(name for name in members if not name.startswith(AUTO_PREFIX))}
    kept = {name: centroid_H for name, centroid_H in old.items() if name not in gone}
    return _table(points_NH, kinds, kept, target_revision, now_s)


def restricted(table: RouteTable, routes: Sequence[str]) -> RouteTable:
    """The table with only these routes and `default`."""
    rows = [row for row, name in enumerate(table.routes) if name in routes or name == DEFAULT_ROUTE]
    names = tuple(table.routes[row] for row in rows)
    return replace(table, centroids_RH=table.centroids_RH[rows], routes=names)


def told_of(table: RouteTable, routes: Sequence[str]) -> RouteTable:
    """The table for a reader that knows only these routes: every other centroid is labelled `default`."""
    names = tuple(name if name in routes else DEFAULT_ROUTE for name in table.routes)
    return replace(table, routes=names)


def find_clusters(points_NH: Floats, max_clusters: int, rng: np.random.Generator) -> Members:
    """Cluster of each point: as many clusters as are all separate from each other, else one."""
    order_N = rng.permutation(len(points_NH))
    half_N, other_N = order_N[::2], order_N[1::2]
    most = min(max_clusters, len(points_NH) // LEAST_PROMPTS)
    points_NP = _principal(points_NH, half_N, rng) if most > 1 else points_NH
    for num_clusters in range(most, 1, -1):
        centroids_KP = k_means(points_NP[half_N], num_clusters, rng)
        cluster_N = nearest(points_NP, centroids_KP)
        if np.bincount(cluster_N, minlength=num_clusters).min() < LEAST_PROMPTS:
            continue
        unseen = [points_NP[other_N[cluster_N[other_N] == k]] for k in range(num_clusters)]
        pairs = [(a, b) for a in range(num_clusters) for b in range(a)]
        if all(has_valley(unseen[a], unseen[b], centroids_KP[a] - centroids_KP[b]) for a, b in pairs):
            return cluster_N
    return np.zeros(len(points_NH), np.int64)


def k_means(points_NP: Floats, num_clusters: int, rng: np.random.Generator) -> Floats:
    """Centroids [K, P], the best of several starts."""
    runs = [_one_k_means(points_NP, num_clusters, rng) for _ in range(NUM_STARTS)]
    return min(runs, key=lambda centroids_KP: float(_distances(points_NP, centroids_KP).min(1).sum()))


def nearest(points_NP: Floats, centroids_KP: Floats) -> Members:
    return np.asarray(_distances(points_NP, centroids_KP).argmin(1), np.int64)


def has_valley(a_NP: Floats, b_NP: Floats, direction_P: Floats) -> bool:
    """Whether there is a valley between the medians of the two groups, along a direction that was not
    computed from them."""
    if not len(a_NP) or not len(b_NP):
        return False
    a_N, b_N = a_NP @ direction_P, b_NP @ direction_P
    both_N, middles = np.concatenate([a_N, b_N]), (float(np.median(a_N)), float(np.median(b_N)))
    half_width = abs(middles[1] - middles[0]) / 6
    sides = [int((abs(both_N - middle) < half_width).sum()) for middle in middles]
    between, lesser = int((abs(both_N - sum(middles) / 2) < half_width).sum()), min(sides)
    return between <= MAX_VALLEY * lesser and _least_half(between, between + lesser) <= FALSE_ALARM


def _is_untagged(route: str) -> bool:
    return route == DEFAULT_ROUTE or route.startswith(AUTO_PREFIX)


def _finest(
    points_NH: Floats, untagged: Mapping[str, Members], max_clusters: int, rng: np.random.Generator
) -> tuple[list[Members], dict[int, str]]:
    """Clusters of all untagged prompts, from the halving that shows most, and the named kind that each
    cluster continues: the cluster with most of a kind's prompts continues it."""
    rows_N = np.concatenate([*untagged.values(), np.zeros(0, np.int64)])
    looks = [find_clusters(points_NH[rows_N], max_clusters, rng) for _ in range(NUM_LOOKS)]
    cluster_N = max(looks, key=lambda look_N: int(look_N.max(initial=0)))
    clusters = [rows_N[cluster_N == cluster] for cluster in sorted(set(cluster_N.tolist()))]
    successors = dict[int, str]()
    for name in sorted(untagged, key=lambda name: -len(untagged[name])):
        free = [number for number in range(len(clusters)) if number not in successors]
        if name != DEFAULT_ROUTE and free:
            shared = {number: len(np.intersect1d(clusters[number], untagged[name])) for number in free}
            successors[max(free, key=lambda number: shared[number])] = name
    return clusters, successors


def _told_apart(
    points_NH: Floats,
    known: Mapping[str, Members],
    clusters: Sequence[Members],
    successors: Mapping[int, str],
    taken: set[str],
    rng: np.random.Generator,
) -> dict[str, Members]:
    """Members of each kind that gets a centroid. A single cluster is the rest of `default`; of several, one
    that is not separate from a known kind joins it, and the others take the name of the kind that they
    continue, or a new one."""
    kinds = {DEFAULT_ROUTE: clusters[0]} if len(clusters) == 1 else {}
    for name in sorted(known, key=lambda name: -len(known[name])):
        if all(_are_apart(points_NH, known[name], other, rng) for other in kinds.values()):
            kinds[name] = known[name]
    if len(clusters) == 1:
        return kinds
    fresh = (name for number in range(1, 1000) if (name := f"{AUTO_PREFIX}{number}") not in taken)
    for number in sorted(range(len(clusters)), key=lambda number: -len(clusters[number])):
        rows = clusters[number]
        like = [name for name in known if not _are_apart(points_NH, rows, known[name], rng)]
        name = like[0] if like else successors.get(number) or next(fresh)
        kinds[name] = np.concatenate([kinds[name], rows]) if name in kinds else rows
    return kinds


def _are_apart(points_NH: Floats, a_N: Members, b_N: Members, rng: np.random.Generator) -> bool:
    """Whether two groups are separate: one half of each gives the direction, the other half is tested."""
    a_N, b_N = rng.permutation(a_N), rng.permutation(b_N)
    if min(len(a_N), len(b_N)) < LEAST_PROMPTS:
        return False
    direction_H = points_NH[a_N[::2]].mean(0) - points_NH[b_N[::2]].mean(0)
    return has_valley(points_NH[a_N[1::2]], points_NH[b_N[1::2]], direction_H)


def _table(
    points_NH: Floats,
    kinds: Mapping[str, Members],
    kept: Mapping[str, Floats],
    target_revision: str,
    now_s: float,
) -> RouteTable:
    """The table of all centroids; empty for a single kind. `mean_H` averages kinds, not prompts: a rare kind
    counts as much as a frequent one."""
    centroids = {**kept, **{name: points_NH[rows].mean(0) for name, rows in kinds.items()}}
    if len(centroids) < 2:
        nowhere_H = points_NH.mean(0)
        return RouteTable(target_revision, now_s, nowhere_H, nowhere_H[None, :][:0], (), 0.0)
    names = tuple(sorted(centroids))
    mean_H = np.stack([centroids[name] for name in names]).mean(0)
    cosines = [_cosines(points_NH[rows] - mean_H, centroids[name] - mean_H) for name, rows in kinds.items()]
    least = float(np.quantile(np.concatenate(cosines), STRAY_SHARE)) if cosines else 0.0
    centroids_RH = np.stack([centroids[name] for name in names])
    return RouteTable(target_revision, now_s, mean_H, centroids_RH, names, min(1.0, max(0.0, least)))


def _centroids(table: RouteTable | None) -> dict[str, Floats]:
    if table is None:
        return {}
    return {name: table.centroids_RH[row].astype(np.float64) for row, name in enumerate(table.routes)}


def _principal(points_NH: Floats, half_N: Members, rng: np.random.Generator) -> Floats:
    """[N, P] along the directions in which one half of the points varies most, nearly: by power iteration,
    since a full decomposition takes seconds for a wide model."""
    centred_NH = points_NH[half_N] - points_NH[half_N].mean(0)
    directions_HP = rng.normal(size=(points_NH.shape[1], min(NUM_DIRECTIONS, *centred_NH.shape)))
    for _ in range(NUM_POWERS):
        directions_HP = np.linalg.qr(centred_NH.T @ (centred_NH @ directions_HP))[0]
    return np.asarray(points_NH @ directions_HP)


def _one_k_means(points_NP: Floats, num_clusters: int, rng: np.random.Generator) -> Floats:
    """One run of k-means from points far from each other (k-means++) until nothing changes."""
    centroids_KP: Floats = points_NP[rng.integers(len(points_NP))][None]
    while len(centroids_KP) < num_clusters:
        far_N = _distances(points_NP, centroids_KP).min(1) + 1e-12
        chosen = points_NP[rng.choice(len(points_NP), p=far_N / far_N.sum())]
        centroids_KP = np.concatenate([centroids_KP, chosen[None]])
    for _ in range(MAX_ROUNDS):
        cluster_N = nearest(points_NP, centroids_KP)
        before_KP = centroids_KP.copy()
        for k in set(cluster_N.tolist()):
            centroids_KP[k] = points_NP[cluster_N == k].mean(0)
        if np.array_equal(before_KP, centroids_KP):
            break
    return centroids_KP


def _distances(points_NP: Floats, centroids_KP: Floats) -> Floats:
    """Squared distances, [N, K]."""
    norms_NK = (points_NP**2).sum(1)[:, None] + (centroids_KP**2).sum(1)
    return np.asarray(np.maximum(norms_NK - 2 * points_NP @ centroids_KP.T, 0.0))


def _cosines(points_NH: Floats, centroid_H: Floats) -> Floats:
    norms_N = np.linalg.norm(points_NH, axis=1) * np.linalg.norm(centroid_H)
    return np.asarray(points_NH @ centroid_H / np.maximum(norms_N, 1e-12))


def _least_half(count: int, trials: int) -> float:
    """Probability that at most `count` of `trials` fair coin tosses are heads."""
    return float(sum(comb(trials, k) for k in range(count + 1)) / 2**trials)
