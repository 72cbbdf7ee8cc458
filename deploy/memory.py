"""What replicas and learner of one machine will hold together, before anything is started.

Reads configurations, no weights. A CUDA device is asked by the replica that opens it, and machines behind a
given Ray by theirs.
"""

from dataclasses import dataclass
from importlib import import_module

import psutil
import torch

from buffer.exporter import MAX_QUEUE_BYTES
from deploy.errors import SettingsError
from deploy.learner_plan import LearnerPlan
from deploy.settings import Settings
from serving.free_memory import FreeMemory, host_free_bytes
from serving.memory_plan import MemoryPlan, MemoryPlanError, Part, lines_of
from serving.models.loading import load_outlines
from serving.options import EngineOptions


@dataclass(frozen=True)
class ServicePlan:
    """The replicas and the learner; None: no learner runs beside them."""

    replica: MemoryPlan
    num_replicas: int
    learner: LearnerPlan | None
    libraries_bytes: int
    """Of each process: what this one holds, once it has imported the same ones."""

    @classmethod
    def of(cls, settings: Settings) -> "ServicePlan":
        """Raises UnsupportedModelError."""
        serving = settings.serving
        num_queues = len(serving.capture_modes) if serving.records else 0
        options = EngineOptions.of(serving, export_queue_bytes=MAX_QUEUE_BYTES * num_queues)
        replica = MemoryPlan.outlined(
            serving.target, serving.draft, options, dtype=serving.dtype, untie_draft=serving.untie_draft
        )
        learner = None
        if settings.cluster.learn and serving.records:
            learner = learner_plan(settings, replica.options.max_seq_len)
        import_module("serving.replica")
        return cls(replica, serving.num_replicas, learner, psutil.Process().memory_info().rss)

    @property
    def libraries(self) -> Part:
        return Part("libraries", self.libraries_bytes)

    @property
    def replica_bytes(self) -> int:
        return sum(part.num_bytes for part in (self.libraries, *self.replica.parts()))

    @property
    def learner_bytes(self) -> int:
        if self.learner is None:
            return 0
        return sum(part.num_bytes for part in (self.libraries, *self.learner.parts()))

    def lines(self) -> list[str]:
        """For display."""
        lines = self.replica.lines(self.libraries)
        if self.learner is not None:
            lines += lines_of("memory planned for the learner:", (self.libraries, *self.learner.parts()))
        return lines

    def require_fit(self, free_bytes: int) -> None:
        """Raises SettingsError with numbers that fit."""
        left = free_bytes - self.learner_bytes
        try:
            self.replica.require_fit(FreeMemory(left // self.num_replicas - self.libraries_bytes))
        except MemoryPlanError as error:
            held = f" beside the learner's {self.learner_bytes >> 20:,} MiB" if self.learner else ""
            several = f" for each of {self.num_replicas} replicas" if self.num_replicas > 1 else ""
            raise SettingsError(f"serving: {error}{held}{several}; nothing was started") from None


def check_memory(settings: Settings) -> ServicePlan:
    """The plan. Raises SettingsError for what cannot fit."""
    plan = ServicePlan.of(settings)
    if settings.cluster.ray_address is None and torch.device(settings.serving.device).type != "cuda":
        plan.require_fit(host_free_bytes())
    return plan


def learner_plan(settings: Settings, max_record_tokens: int) -> LearnerPlan:
    """Of the draft that is served."""
    serving = settings.serving
    _, draft = load_outlines(
        serving.target, serving.draft, dtype=serving.dtype, untie_draft=serving.untie_draft
    )
    assert draft is not None, "without a draft nothing is recorded and nothing learns"
    num_routes = 0
    if serving.max_route_drafts is not None:
        num_routes = min(serving.num_route_drafts, settings.learner.max_routes)
    return LearnerPlan.outlined(
        draft, settings.learner, max_record_tokens=max_record_tokens, num_routes=num_routes
    )
