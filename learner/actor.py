"""The learner as a Ray actor: detached, named, restarted on death. The only learner file that imports Ray.

A factory, given by the composition root, builds the learner inside the actor's process. Invariant: the loop
starts in the constructor, because a restarted actor reruns nothing else; if the loop fails, the process
exits, and Ray restarts it from its checkpoint.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle

from learner.loop import Learner
from learner.trainer import limit_threads

logger = logging.getLogger(__name__)

ACTOR_NAME = "everdraft-learner"
RESTART_PAUSE_S = 2.0
"""Pause between the failure of a loop and the exit of its process, so that repeated failures at start do not
keep a core busy."""


class LearnerActor:
    """Wrapped by `start_learner_actor`; every method returns at once."""

    def __init__(self, build_learner: Callable[[], Learner], num_threads: int, niceness: int) -> None:
        os.nice(niceness)
        limit_threads(num_threads)
        self._build_learner = build_learner
        self._learner: Learner | None = None
        self._paused = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, name="learner", daemon=True)
        self._thread.start()

    def snapshot(self) -> dict[str, Any]:
        """See Learner.snapshot; only the state and the process id while models load."""
        learner = self._learner
        return {"state": "starting", "pid": os.getpid()} | (learner.snapshot() if learner else {})

    def pause(self) -> None:
        self._paused = True
        if self._learner:
            self._learner.pause()

    def resume(self) -> None:
        self._paused = False
        if self._learner:
            self._learner.resume()

    def pid(self) -> int:
        return os.getpid()

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Ends the loop; True once it has ended. Ending the actor itself is up to the caller."""
        self._stop.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _live(self) -> None:
        try:
            learner = self._build_learner()
            if self._paused:
                learner.pause()
            self._learner = learner
            learner.run(self._stop)
        except BaseException:
            logger.exception("the learner's loop failed; its process exits and is restarted")
            time.sleep(RESTART_PAUSE_S)
            os._exit(1)


def start_learner_actor(
    build_learner: Callable[[], Learner],
    *,
    namespace: str,
    name: str = ACTOR_NAME,
    num_threads: int = 1,
    niceness: int = 10,
) -> ActorHandle[Any]:
    """Start the detached actor, or return the one that already has this name."""
    remote: Any = ray.remote(LearnerActor)
    handle: ActorHandle[Any] = remote.options(
        name=name,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=0,
        num_cpus=0,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(num_threads)}},
    ).remote(build_learner, num_threads, niceness)
    return handle
