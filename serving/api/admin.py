"""`/admin`, behind a key of its own: drafts, learning, capture, drain, records, and the audit log.

Whatever is changed lives in Redis, so it does not matter which replica is asked: all replicas and the learner
follow it within about `watch_interval_s`. Handlers run in threads, because Redis may keep them waiting.
"""

import dataclasses
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.params import Path

from buffer.administration import Administration, DraftDetails, RouteDrafts
from buffer.audit import AuditLine
from buffer.controls import Controls
from buffer.errors import SeamError
from serving.api.admin_schema import (
    CaptureBody,
    CaptureRate,
    DrainBody,
    LearningBody,
    PinBody,
    PurgeBody,
    PurgedRecords,
    RollbackBody,
    ServingVersion,
    UnpinBody,
)
from serving.api.auth_middleware import AUDITED, caller_of
from serving.api.context import AppContext
from serving.api.errors import ApiError, bad_request
from serving.api.openapi import errors

Version = Annotated[int, Path(ge=0)]
NumEvents = Annotated[int, Query(ge=0, le=200)]
NumLines = Annotated[int, Query(ge=1, le=1000)]
"""Lines of the audit log."""


def admin_routes(context: AppContext) -> APIRouter:
    router = APIRouter()
    for add in (_add_status, _add_drafts, _add_learning, _add_capture, _add_drain, _add_records_and_audit):
        add(router, context)
    return router


def _administration(context: AppContext, request: Request) -> Administration:
    """On behalf of the caller, whose call it notes from here on."""
    if context.administration is None:
        raise ApiError(
            503, "This replica runs without Redis: there is nothing that an operator could change."
        )
    setattr(request.state, AUDITED, True)
    return context.administration(caller_of(request.scope))


def _add_status(router: APIRouter, context: AppContext) -> None:
    @router.get("/admin/status")
    def status(request: Request) -> dict[str, Any]:
        """The ServingStatus that the learner gets too; whether this replica is ready, what share of requests
        it records and the orders it follows; and the ids of all replicas, null while Redis is away."""
        try:
            replicas = (
                None if context.administration is None else _administration(context, request).replicas()
            )
        except SeamError:
            replicas = None
        return dataclasses.asdict(context.status()) | {
            "is_ready": context.is_ready,
            "capture_rate": _capture_rate(context),
            "controls": dataclasses.asdict(context.controls()),
            "replicas": replicas,
        }


def _add_drafts(router: APIRouter, context: AppContext) -> None:
    @router.get("/admin/drafts", responses=errors(400, 404, 503))
    def list_drafts(request: Request, route: str | None = None, events: NumEvents = 8) -> list[RouteDrafts]:
        """By route: the drafts that are kept, which one serves, and what happened last."""
        return _administration(context, request).drafts(route, events)

    @router.get("/admin/drafts/{route}/{version}", responses=errors(400, 404, 503))
    def show_draft(request: Request, route: str, version: Version) -> DraftDetails:
        """What one draft fits, why it was let in, and what became of it."""
        return _administration(context, request).draft(route, version)

    @router.post("/admin/drafts/{route}/rollback", responses=errors(400, 404, 413, 503))
    def rollback(request: Request, route: str, body: RollbackBody) -> ServingVersion:
        version = _administration(context, request).rollback(route, body.reason, body.version)
        return ServingVersion(route=route, draft_version=version)

    @router.post("/admin/drafts/{route}/pin", responses=errors(400, 404, 413, 503))
    def pin(request: Request, route: str, body: PinBody) -> ServingVersion:
        """Serve this version whatever the learner promotes, until unpinned."""
        version = _administration(context, request).pin(route, body.version, body.reason)
        return ServingVersion(route=route, draft_version=version)

    @router.post("/admin/drafts/{route}/unpin", responses=errors(400, 404, 413, 503))
    def unpin(request: Request, route: str, body: UnpinBody) -> ServingVersion:
        version = _administration(context, request).unpin(route, body.reason)
        return ServingVersion(route=route, draft_version=version)


def _add_learning(router: APIRouter, context: AppContext) -> None:
    @router.post("/admin/learning/pause", responses=errors(400, 404, 413, 503))
    def pause_learning(request: Request, body: LearningBody | None = None) -> Controls:
        """The learner trains and promotes no more, and goes on watching what serves."""
        return _administration(context, request).pause_learning(body.route if body else None)

    @router.post("/admin/learning/resume", responses=errors(400, 404, 413, 503))
    def resume_learning(request: Request, body: LearningBody | None = None) -> Controls:
        return _administration(context, request).resume_learning(body.route if body else None)


def _add_capture(router: APIRouter, context: AppContext) -> None:
    @router.get("/admin/capture")
    def capture_rate() -> CaptureRate:
        return CaptureRate(rate=_capture_rate(context), ordered=context.controls().capture_rate)

    @router.put("/admin/capture", responses=errors(400, 413, 503))
    def set_capture_rate(request: Request, body: CaptureBody) -> Controls:
        administration = _administration(context, request)
        if context.recorder is None and body.rate > 0.0:
            raise bad_request(
                f"rate={body.rate:g}: this replica was started without recording (serving.capture_rate is 0, "
                "or there is no draft to teach), and keeps to that; nothing was changed",
                "rate",
            )
        return administration.set_capture_rate(body.rate)

    @router.delete("/admin/capture", responses=errors(503))
    def reset_capture_rate(request: Request) -> Controls:
        """Each replica's setting holds again."""
        return _administration(context, request).set_capture_rate(None)


def _add_drain(router: APIRouter, context: AppContext) -> None:
    @router.post("/admin/drain", responses=errors(400, 404, 413, 503))
    def drain(request: Request, body: DrainBody | None = None) -> Controls:
        """`/ready` and new generations are answered with 503; what is under way goes on to its end."""
        return _administration(context, request).drain(body.replica_id if body else None)

    @router.post("/admin/undrain", responses=errors(400, 404, 413, 503))
    def undrain(request: Request, body: DrainBody | None = None) -> Controls:
        return _administration(context, request).undrain(body.replica_id if body else None)


def _add_records_and_audit(router: APIRouter, context: AppContext) -> None:
    @router.post("/admin/records/purge", responses=errors(400, 404, 413, 503))
    def purge_records(request: Request, body: PurgeBody) -> PurgedRecords:
        """Delete records for good, from files and from the learner too. What it has learnt stays learnt."""
        report = _administration(context, request).purge(
            request_id=body.request_id, route=body.route, older_than_s=body.older_than_s
        )
        return PurgedRecords(num_records=report.num_records, caveat=report.caveat)

    @router.get("/admin/audit", responses=errors(400, 503))
    def audit_log(request: Request, lines: NumLines = 100) -> list[AuditLine]:
        """The last calls that changed something or were refused, oldest first."""
        return _administration(context, request).audit_log(lines)


def _capture_rate(context: AppContext) -> float:
    return 0.0 if context.recorder is None else context.recorder.capture_rate
