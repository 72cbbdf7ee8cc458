"""The learner in a process of its own, as a Ray actor, and how to speak to it from here.

Knows nothing of learning: the factory is `learning.build_learner`, which Ray calls again after each
death. Invariant: no call to the learner waits for what it computes.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from deploy.learning import build_learner
from deploy.settings import Settings
from learner.actor import start_learner_actor
from learner.loop import Learner
from learner.settings import LearnerSettings
from serving.log_lines import LogPlan
from serving.settings import ServingSettings

ANSWER_S = 2.0
"""How long the learner's process may take to answer before it counts as away."""
STOP_S = 5.0


class LearnerHandle:
    """The learner in its own process, seen from here. No call waits longer than ANSWER_S."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def snapshot(self) -> dict[str, Any]:
        """See Learner.snapshot; `state` is `away` while Ray restarts it."""
        try:
            snapshot: dict[str, Any] = ray.get(self._actor.snapshot.remote(), timeout=ANSWER_S)
            return snapshot
        except (RayError, TimeoutError):
            return {"state": "away"}

    def pause(self) -> None:
        """Takes effect within about one step; see `snapshot()["state"]`."""
        self._actor.pause.remote()

    def resume(self) -> None:
        self._actor.resume.remote()

    def end(self) -> None:
        """Stop the loop, then the process, for good."""
        with suppress(RayError, TimeoutError):
            ray.get(self._actor.stop.remote(STOP_S), timeout=STOP_S + ANSWER_S)
        with suppress(RayError):
            ray.kill(self._actor, no_restart=True)


@contextmanager
def learner_beside(
    settings: Settings, learner: LearnerSettings, redis_url: str, memory_url: str | None, logs: LogPlan
) -> Iterator[LearnerHandle]:
    """A learner as a Ray actor, inside the block. `learner` has its folders made absolute."""
    actor = start_learner_actor(
        partial(_built, logs, settings.serving, learner, redis_url, memory_url),
        namespace=settings.cluster.namespace,
        num_threads=learner.num_threads,
        niceness=learner.niceness,
    )
    handle = LearnerHandle(actor)
    try:
        yield handle
    finally:
        handle.end()


def _built(
    logs: LogPlan,
    serving: ServingSettings,
    learner: LearnerSettings,
    redis_url: str,
    memory_url: str | None,
) -> Learner:
    logs.begin(process="learner")
    return build_learner(serving, learner, redis_url, memory_url)
