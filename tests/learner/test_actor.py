"""The learner as a detached Ray actor: it answers, and it comes back after SIGKILL."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from learner.actor import start_learner_actor
from learner.loop import Learner
from tests.support.tiny_learner import quick_settings, tiny_draft

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray's and its libraries' own

NAMESPACE = "learner-test"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, namespace="another")
    yield
    ray.shutdown()


def build(folder: str) -> Learner:
    store, feed = MemoryRecordStore(), MemoryAdapterFeed()
    settings = quick_settings(checkpoint_folder=folder)
    return Learner(tiny_draft(), store, feed, settings, target_revision="target-1")


def wait_for(found: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline_s, f"not true within {timeout_s} s"
        time.sleep(0.1)


def state(actor: object) -> str:
    try:
        return str(ray.get(actor.snapshot.remote(), timeout=120)["state"])  # type: ignore[attr-defined]
    except ray.exceptions.RayActorError:
        return ""


@pytest.mark.slow
@pytest.mark.timeout(600)  # of a machine with much else to do
def test_it_lives_under_its_name_pauses_and_returns_after_sigkill(cluster: None, tmp_path: Path) -> None:
    folder = str(tmp_path)
    actor = start_learner_actor(lambda: build(folder), namespace=NAMESPACE, niceness=3)
    wait_for(lambda: state(actor) == "waiting")
    assert start_learner_actor(lambda: build(folder), namespace=NAMESPACE) == actor

    ray.get(actor.pause.remote())
    wait_for(lambda: state(actor) == "paused")
    ray.get(actor.resume.remote())
    wait_for(lambda: state(actor) == "waiting")

    pid = ray.get(actor.pid.remote())
    assert os.getpriority(os.PRIO_PROCESS, pid) >= 3
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: state(actor) == "waiting")
    assert ray.get(actor.pid.remote()) != pid

    assert ray.get(actor.stop.remote())
    assert state(actor) == "stopped"
    ray.kill(actor)
