"""The memory plan against what the processes of a service hold: replica and learner, under requests that fill
every slot and the learner's passes.

Resident size as the kernel counts it, sampled; pages that processes share, such as a model's file, count in
each. The plan's libraries are those of the process that starts the others.
"""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil

from deploy.memory import ServicePlan
from deploy.settings_source import load_settings
from deploy.wiring import RunningSystem, running_system
from serving.memory_plan import Part

SAMPLE_S = 0.1
_REPLICA = "ray::ServeReplica"
"""How Ray names its process."""
_PROMPT_SHARE = 0.82
"""Of a request's tokens, so that a pass of the learner is full in tokens and in positions."""
_REQUEST_S = 600.0
LEARNER: dict[str, Any] = {
    "max_records_per_cycle": 32,
    "min_records_per_cycle": 16,
    "max_steps_per_cycle": 4,
    "held_out_window_records": 8,
    "gate_min_records": 2,
    "max_rest_records": 0,
}
"""Cycles as small as the few records of this run."""


def measure_memory(
    target: str, draft: str, *, num_slots: int, max_seq_len: int, num_requests: int, port: int, report: Any
) -> dict[str, Any]:
    """Largest resident size of each process once it is up, and its plan, in MiB."""
    with TemporaryDirectory() as folder:
        serving = {"target": target, "draft": draft, "num_slots": num_slots, "max_seq_len": max_seq_len}
        cluster = {"port": port, "state_dir": str(Path(folder) / "state")}
        sections = {"serving": serving, "cluster": cluster, "learner": LEARNER, "mlflow": {"enabled": False}}
        settings = load_settings(None, {}, sections)
        plan = ServicePlan.of(settings)
        with running_system(settings, report) as system, _watched(system) as held:
            report(f"{num_requests} requests of {max_seq_len} tokens")
            _fill(system, num_requests, max_seq_len, num_slots)
            learner = _wait_for_steps(system)
    return {
        "num_steps": learner.get("num_steps", 0),
        "replica": _compared((plan.libraries, *plan.replica.parts()), held["replica"]),
        "learner": _compared(
            (plan.libraries, *(() if plan.learner is None else plan.learner.parts())), held["learner"]
        ),
    }


def _compared(parts: tuple[Part, ...], measured: int) -> dict[str, Any]:
    planned = sum(part.num_bytes for part in parts)
    return {
        "planned_mib": planned / 2**20,
        "measured_mib": measured / 2**20,
        "planned_over_measured": planned / max(1, measured),
        "parts_mib": {part.name: part.num_bytes / 2**20 for part in parts},
    }


@contextmanager
def _watched(system: RunningSystem) -> Iterator[dict[str, int]]:
    """The largest resident sizes inside the block, in bytes, by process."""
    found = {"replica": _replica(), "learner": _learner(system)}
    held, ends = dict.fromkeys(found, 0), threading.Event()

    def watch() -> None:
        while not ends.wait(SAMPLE_S):
            for name, process in found.items():
                held[name] = max(held[name], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        ends.set()
        thread.join()


def _replica() -> psutil.Process:
    """The youngest: this service's."""
    named = [each for each in psutil.process_iter(["cmdline", "create_time"]) if _is_replica(each)]
    return max(named, key=lambda each: float(each.info["create_time"]))


def _is_replica(process: psutil.Process) -> bool:
    return " ".join(process.info["cmdline"] or ()).startswith(_REPLICA)


def _learner(system: RunningSystem) -> psutil.Process:
    """Once its models are loaded."""
    assert system.learner is not None
    while "num_steps" not in (snapshot := system.learner.snapshot()):
        time.sleep(1.0)
    return psutil.Process(snapshot["pid"])


def _fill(system: RunningSystem, num_requests: int, max_seq_len: int, num_clients: int) -> None:
    """Requests that use their slot to its end."""
    rng, prompt_tokens = random.Random(0), int(_PROMPT_SHARE * max_seq_len)

    def ask(number: int) -> None:
        body = {
            "prompt": [rng.randrange(100, 2_000) for _ in range(prompt_tokens)],
            "max_tokens": max_seq_len - prompt_tokens,
            "temperature": 1.0,
            "seed": number,
            "ignore_eos": True,
        }
        httpx.post(f"{system.url}/v1/completions", json=body, timeout=_REQUEST_S).raise_for_status()

    with ThreadPoolExecutor(num_clients) as pool:
        list(pool.map(ask, range(num_requests)))


def _wait_for_steps(system: RunningSystem) -> dict[str, Any]:
    """Until the learner has taken what is there."""
    snapshot: dict[str, Any] = {}
    deadline_s = time.monotonic() + _REQUEST_S
    while system.learner is not None and time.monotonic() < deadline_s:
        snapshot = system.learner.snapshot()
        if snapshot.get("num_steps", 0) > 0 and snapshot.get("state") == "waiting":
            break
        time.sleep(1.0)
    return snapshot
