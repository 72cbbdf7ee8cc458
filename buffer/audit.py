"""One line of the audit log for each admin call: who did what from where, and what came of it. Plain data.

Knows no storage. Invariant: a line holds neither a key nor a user's text; of a key it has the first digits of
the digest.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

ALLOWED = "allowed"
REFUSED_BY_KEY = "refused: no valid admin key"

Argument = str | int | float | None


@dataclass(frozen=True)
class Caller:
    """Who calls, and from where."""

    who: str
    """The first 8 hex digits of a key's sha256 digest; for a command, the local user."""
    address: str


@dataclass(frozen=True)
class AuditLine:
    """`outcome` is `allowed`, written before the change is made; `failed: ...`, a second line where the
    change could then not be made; or `refused: ...`."""

    time: str
    """ISO 8601 in UTC, to the millisecond."""
    who: str
    address: str
    operation: str
    outcome: str
    arguments: Mapping[str, Argument] = field(default_factory=dict)

    @property
    def is_refused_by_key(self) -> bool:
        """Whether the caller had no valid key. Anybody can make such calls, so these lines are kept apart:
        they must not push others out of a bounded log."""
        return self.outcome == REFUSED_BY_KEY

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> "AuditLine":
        return AuditLine(**json.loads(text))


def audit_line(
    caller: Caller,
    operation: str,
    outcome: str,
    *,
    at_s: float,
    arguments: Mapping[str, Argument] | None = None,
) -> AuditLine:
    time = datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")
    return AuditLine(time, caller.who, caller.address, operation, outcome, dict(arguments or {}))
