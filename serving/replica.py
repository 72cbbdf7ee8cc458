"""The Ray Serve deployment: HTTP ingress and engine in one process, so that tokens cross no process boundary.

Knows no learner. Invariant: a draft never changes through Serve (that would start a new process); it comes
through the adapter feed.
"""

import asyncio
import sys
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve

from serving.api.app import create_app
from serving.log_lines import LogPlan
from serving.replica_parts import open_parts
from serving.settings import ServingSettings

DEPLOYMENT_NAME = "replica"

_SWITCH_INTERVAL_S = 0.0005
"""Ten times shorter than Python's default switch interval, so that the event loop sends chunks sooner."""
_PLAIN_LOGS = LogPlan()
_SPARE_REQUESTS = 64
"""Room above our own bounds, so that /health always passes and Serve's plain-text refusal is only the last
resort."""


@serve.ingress()
class Replica:
    """One engine behind one app. A restarted replica runs only this constructor."""

    def __init__(
        self,
        settings: ServingSettings,
        redis_url: str | None,
        memory_url: str | None = None,
        logs: LogPlan = _PLAIN_LOGS,
    ) -> None:
        replica_id = serve.get_replica_context().replica_id.unique_id
        logs.begin(process="replica", replica=replica_id)
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        self._settings = settings
        self._parts = open_parts(settings, redis_url, replica_id, memory_url)

    def __serve_build_asgi_app__(self) -> FastAPI:  # Serve's hook: it calls this after the constructor
        return create_app(self._parts.context, sends_request_id=False)  # Serve's proxy sends it

    def target_revision(self) -> str:
        """Revision of the target that was loaded here."""
        return self._parts.engine.target_revision

    def check_health(self) -> None:
        """Raises if the replica must be restarted; Ray then does so."""
        if not self._parts.engine.is_alive:
            raise RuntimeError("the engine thread has ended; no request can be answered here")

    def drain(self) -> int:
        """Take no new requests from now on. Returns how many are under way."""
        return self._parts.context.drain()

    async def abort(self) -> int:
        """End what is under way with an error."""
        await asyncio.to_thread(self._parts.engine.close)
        return self._parts.context.drain()

    def __del__(self) -> None:
        """Ray waits for requests under way before it calls this, up to the drain timeout."""
        if hasattr(self, "_parts"):
            self._parts.close()


def build_deployment(
    settings: ServingSettings,
    redis_url: str | None,
    memory_url: str | None = None,
    *,
    num_gpus: float = 0.0,
    logs: LogPlan = _PLAIN_LOGS,
) -> serve.Application:
    """The application for `serve.run(..., route_prefix="/")`. Without `redis_url` nothing is recorded and
    the draft that was loaded serves. `memory_url`: for records of capture mode `memory`. `num_gpus`: what
    each replica asks Ray for. `logs`: how it logs."""
    deployment: Any = serve.deployment(
        name=DEPLOYMENT_NAME,
        num_replicas=settings.num_replicas,
        ray_actor_options={"num_gpus": num_gpus} if num_gpus else {},
        max_ongoing_requests=settings.num_slots + settings.max_queued_requests + _SPARE_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=5.0,
        max_constructor_retry_count=2,
    )(Replica)
    application: serve.Application = deployment.bind(settings, redis_url, memory_url, logs)
    return application
