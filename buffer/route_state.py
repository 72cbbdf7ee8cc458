"""Which adapter of a route serves, and which are kept: the rules of an AdapterFeed, as pure functions.

It knows nothing of weights, clocks or storage; both feeds apply it, one under a lock, one under WATCH.
Invariants: versions only grow; the serving version, the one that would serve without the pin, the parents of
both, and what serves beside a canary are never trimmed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from buffer.errors import UnknownVersionError, VersionConflictError
from buffer.names import FLOOR_VERSION
from buffer.records import AdapterEvent, AdapterManifest, ServingStatus

MAX_VERSION_BYTES = 512 * 2**20
"""Of a route's kept adapters, beside those that a rollback or an unpin may need."""


def num_versions_kept(max_versions: int, max_bytes: int, num_bytes: int) -> int:
    """How many adapters of `num_bytes` a route keeps: whole weights of a draft are as large as the draft."""
    return max(1, min(max_versions, max_bytes // max(1, num_bytes)))


@dataclass(frozen=True)
class RouteState:
    """One route. `parents` maps every kept draft_version to the one it was judged against."""

    route: str
    last_version: int = 0
    """The greatest version ever published, kept or not."""
    pointer: int = FLOOR_VERSION
    """The version that serves while nothing is pinned."""
    pinned: int | None = None
    parents: Mapping[int, int] = field(default_factory=dict)
    settled: int | None = None
    """While `pointer` is on trial on one replica, the canary: the version that all others serve."""

    @property
    def serving(self) -> int:
        return self.pointer if self.pinned is None else self.pinned

    def served_by(self, replica_id: str | None, statuses: Callable[[], Iterable[ServingStatus]]) -> int:
        """The version for this replica. The canary is the first by name of those that report, so that another
        takes over from one that is gone; without a name it is meant. Asks for `statuses` only in a trial."""
        if self.settled is None or self.pinned is not None or replica_id is None:
            return self.serving
        is_canary = all(replica_id <= status.replica_id for status in statuses())
        return self.pointer if is_canary else self.settled

    def require(self, draft_version: int) -> None:
        """Raises UnknownVersionError unless the version is kept or the floor."""
        if draft_version != FLOOR_VERSION:
            self.require_adapter(draft_version)

    def require_adapter(self, draft_version: int) -> None:
        """Raises UnknownVersionError unless the version is kept; the floor is no adapter."""
        if draft_version not in self.parents:
            kept = sorted(self.parents)
            raise UnknownVersionError(
                f"route {self.route!r} keeps versions {kept}, not {draft_version}; nothing changed"
            )

    def published(
        self, draft_version: int, parent_version: int, max_versions: int, on_trial: bool = False
    ) -> "RouteState":
        """Point at a new version, for the canary alone if `on_trial`; keep the newest `max_versions` and
        those that a rollback or an unpin may need."""
        if draft_version <= self.last_version:
            raise VersionConflictError(
                f"route {self.route!r}: draft_version {draft_version} does not exceed "
                f"{self.last_version}; nothing was published"
            )
        grown = replace(
            self,
            last_version=draft_version,
            pointer=draft_version,
            parents={**self.parents, draft_version: parent_version},
            settled=(self.pointer if self.settled is None else self.settled) if on_trial else None,
        )
        return replace(grown, parents=grown._kept(max_versions))

    def rolled_back(self, to_version: int | None) -> "RouteState":
        """Point at `to_version`, or (None) at the parent of the pointer, or at the floor without one.

        A pin outlasts a rollback: the pinned version goes on serving."""
        if to_version is None:
            parent = self.parents.get(self.pointer, FLOOR_VERSION)
            to_version = parent if parent in self.parents else FLOOR_VERSION
        self.require(to_version)
        return replace(self, pointer=to_version, settled=None)

    def confirmed(self) -> "RouteState":
        """The pointer serves on every replica."""
        return replace(self, settled=None)

    def with_pin(self, draft_version: int) -> "RouteState":
        self.require(draft_version)
        return replace(self, pinned=draft_version)

    def without_pin(self) -> "RouteState":
        return replace(self, pinned=None)

    def _kept(self, max_versions: int) -> dict[int, int]:
        newest = sorted(self.parents)[-max_versions:]
        needed = {self.pointer, self.serving}
        needed |= {self.parents.get(version, FLOOR_VERSION) for version in needed}
        return {
            version: parent
            for version, parent in self.parents.items()
            if version in needed or version in newest or version == self.settled
        }


def promotion(manifest: AdapterManifest, at_s: float, on_trial: bool = False) -> AdapterEvent:
    """The history's event for a publish."""
    where = "on one replica first, " if on_trial else ""
    return AdapterEvent(
        kind="promoted",
        route=manifest.route,
        draft_version=manifest.draft_version,
        reason=f"{where}judged against version {manifest.parent_version}{_gain(manifest.evidence)}",
        at_s=at_s,
        evidence=dict(manifest.evidence),
    )


def _gain(evidence: Mapping[str, float]) -> str:
    """The gate's figures as text, if the evidence has them."""
    names = ("acceptance_incumbent", "acceptance_candidate", "gain_lower_bound")
    if not all(name in evidence for name in names):
        return ""
    before, after, least = (evidence[name] for name in names)
    return f": acceptance {before:.3f} -> {after:.3f}, lower bound of the gain {least:+.4f}"


def turn(kind: str, state: RouteState, reason: str, at_s: float) -> AdapterEvent:
    """The history's event for a rollback, a pin or an unpin: it names the version that serves afterwards."""
    return AdapterEvent(kind, state.route, state.serving, reason, at_s)
