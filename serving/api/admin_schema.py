"""The bodies of admin calls: what operators send, validated strictly, and what they get."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from serving.api.response_schema import Body
from serving.api.strict_body import RequestBody, fault
from serving.api.unsupported import HARMLESS, NEUTRAL_VALUES

Reason = Annotated[str, Field(min_length=1, max_length=500)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class AdminBody(RequestBody):
    """Also refuses fields of generation that are harmless there: who gives one to an order means something
    that the order would not do."""

    @classmethod
    def _may_drop(cls, name: Any, value: Any) -> bool:
        return name not in HARMLESS and name not in NEUTRAL_VALUES and super()._may_drop(name, value)


class RollbackBody(AdminBody):
    """`POST /admin/drafts/{route}/rollback`."""

    version: int | None = Field(default=None, ge=0)
    """Where to go; 0 is the floor. Unset: the parent of the version that serves."""
    reason: Reason
    """Goes into the route's history and the audit log."""


class PinBody(AdminBody):
    """`POST /admin/drafts/{route}/pin`."""

    version: int = Field(ge=0)
    """0 is the floor."""
    reason: Reason


class UnpinBody(AdminBody):
    """`POST /admin/drafts/{route}/unpin`."""

    reason: Reason


class LearningBody(AdminBody):
    """`POST /admin/learning/pause` and `/admin/learning/resume`."""

    route: Name | None = None
    """The route whose draft is meant. Unset: all."""


class CaptureBody(AdminBody):
    """`PUT /admin/capture`; `DELETE /admin/capture` goes back to the replicas' setting."""

    rate: float = Field(ge=0, le=1)
    """Share of requests that all replicas record."""


class DrainBody(AdminBody):
    """`POST /admin/drain` and `/admin/undrain`."""

    replica_id: Name | None = None
    """Unset: all replicas, those that start later included."""


class PurgeBody(AdminBody):
    """`POST /admin/records/purge`: records that fit everything given are deleted."""

    request_id: Name | None = None
    """The `id` of an answer."""
    route: Name | None = None
    older_than_s: float | None = Field(default=None, ge=0)
    """Seconds since the record was stored."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.request_id is None and self.route is None and self.older_than_s is None:
            raise fault("request_id", "or route or older_than_s must be given; nothing was deleted")
        return self


class ServingVersion(Body):
    route: str
    draft_version: int
    """That serves from now on; 0 is the floor."""


class CaptureRate(Body):
    rate: float
    """Share of requests that this replica records now."""
    ordered: float | None
    """Null: nothing is ordered, so each replica's setting holds."""


class PurgedRecords(Body):
    num_records: int
    caveat: str
    """What may still hold them, in sentences; empty: nothing that is reached."""
