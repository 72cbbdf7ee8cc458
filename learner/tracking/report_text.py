"""The texts that the tracker writes beside a draft, a route and a run. Pure.

Knows no MLflow. Invariant: a text that says which draft serves also says since when, why, and what it gained.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from buffer.names import FLOOR_VERSION
from buffer.records import AdapterManifest

_MAX_REASON = 1000
_COLUMNS = ("decided_at", "kind", "reason", "draft_version", "num_records_seen")
"""The most important columns come first. MLflow's own page shows nothing under a column called `at`."""


@dataclass(frozen=True)
class Decision:
    """One event of a route's history (see AdapterEvent), with the number of records seen."""

    kind: str
    draft_version: int
    reason: str
    num_records_seen: int
    decided_at: str

    def tag(self, route: str) -> tuple[str, str]:
        """(key, value); keys of one route sort by time."""
        key = f"decision.{route}.{self.num_records_seen:09d}.{self.kind}.v{self.draft_version}"
        return key, f"{self.decided_at} {self.reason}"


def moment(at_s: float) -> str:
    """The time in UTC, to the second, without a space."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def shortened(reason: str) -> str:
    return reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}…"


def named(draft_version: int) -> str:
    return "the floor" if draft_version == FLOOR_VERSION else f"draft {draft_version}"


def version_tags(manifest: AdapterManifest, reason: str) -> dict[str, str]:
    """Tags of one draft: its parent, why it was promoted, and its gain. They are few, because a list shows
    all of them."""
    facts: dict[str, object] = {
        "route": manifest.route,
        "draft_version": manifest.draft_version,
        "parent": manifest.parent_version,
        "promoted_at": moment(manifest.created_at_s),
        "num_records_seen": manifest.num_records_seen,
        "reason": shortened(reason),
        "evidence": brought(manifest.evidence),
        "sha256": manifest.sha256,
    }
    return {name: str(fact) for name, fact in facts.items() if str(fact)}


def version_text(manifest: AdapterManifest, reason: str) -> str:
    """Description of a draft. Starts with plain text, because lists show its beginning unformatted."""
    weights = f"LoRA of rank {manifest.rank}" if manifest.rank else "full weights"
    lines = [
        f"{named(manifest.draft_version).capitalize()} of route {manifest.route}, promoted "
        f"{moment(manifest.created_at_s)} after {manifest.num_records_seen} records, judged against "
        f"{named(manifest.parent_version)}.",
        f"Why: {shortened(reason)}.",
    ]
    if gain := brought(manifest.evidence):
        lines.append(f"What it brought: {gain}.")
    lines.append(
        f"What it is: {weights} on draft {manifest.draft_id} ({manifest.draft_revision[:12]}), "
        f"for target {manifest.target_revision[:12]}; {manifest.num_bytes} bytes."
    )
    return "\n\n".join(lines)


def brought(evidence: Mapping[str, float]) -> str:
    """The draft's gain over the one before it, from the gate's figures; empty without figures."""
    parts = []
    if "acceptance_candidate" in evidence and "acceptance_incumbent" in evidence:
        before, after = evidence["acceptance_incumbent"], evidence["acceptance_candidate"]
        parts.append(f"acceptance {before:.3f} -> {after:.3f}")
    if "acceptance_floor" in evidence:
        parts.append(f"the floor's is {evidence['acceptance_floor']:.3f}")
    if "gain_lower_bound" in evidence:
        parts.append(f"gain at least {evidence['gain_lower_bound']:+.4f}")
    for name, unit, digits in (("tokens_per_round", "tokens a round", 2), ("tokens_per_s", "tokens/s", 0)):
        before_after = [evidence.get(f"{name}_{which}") for which in ("incumbent", "candidate")]
        if None not in before_after:
            parts.append(" -> ".join(f"{figure:.{digits}f}" for figure in before_after) + f" {unit} expected")
    return ", ".join(parts)


def serving_text(
    route: str, draft_version: int, previous_version: int, since: str, reason: str, gain: str
) -> str:
    """Description of a route: which draft serves, since when, why, and its gain."""
    lines = [f"{named(draft_version).capitalize()} serves route {route} since {since}."]
    lines.append(f"Why: {shortened(reason)}.")
    if gain:
        lines.append(f"What it brought: {gain}.")
    if draft_version != FLOOR_VERSION:
        lines.append(f"A rollback goes to {named(previous_version)}.")
    return "\n\n".join(lines)


def decisions_csv(decisions: Iterable[Decision]) -> str:
    """A CSV of the decisions, latest first."""
    text = io.StringIO()
    table = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(line) for line in _latest_first(decisions))
    return text.getvalue()


def decisions_from_csv(text: str) -> list[Decision]:
    """The decisions of a CSV, oldest first."""
    lines = [
        Decision(
            kind=line["kind"],
            draft_version=int(line["draft_version"]),
            reason=line["reason"],
            num_records_seen=int(line["num_records_seen"]),
            decided_at=line["decided_at"],
        )
        for line in csv.DictReader(io.StringIO(text))
    ]
    return _latest_first(lines)


def decisions_text(decisions: Sequence[Decision], num_lines: int = 10) -> str:
    """A Markdown table of the latest decisions."""
    head = "| at | records seen | decision | draft | reason |\n|---|---|---|---|---|\n"
    return head + "\n".join(
        f"| {line.decided_at} | {line.num_records_seen} | {line.kind.replace('_', ' ')} "
        f"| {line.draft_version} | {line.reason.replace('|', '/')} |"
        for line in _latest_first(decisions)[:num_lines]
    )


def _latest_first(decisions: Iterable[Decision]) -> list[Decision]:
    return list(decisions)[::-1]
