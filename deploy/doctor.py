"""Looks at what a run needs and says, for each thing, what was found and what follows.

Starts nothing that stays and changes nothing. Invariant: a check never raises; what goes wrong in it
is its finding.
"""

import functools
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from deploy.ports import port_is_free

if TYPE_CHECKING:
    from serving.models.loading import ModelPair

Verdict = Literal["ok", "warning", "failure"]

MIN_MEMORY_BYTES = 2 * 2**30
MIN_DISK_BYTES = 2**30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    finding: str
    consequence: str = ""
    """What follows from it; empty when all is well."""


@dataclass(frozen=True)
class Subject:
    """What to examine."""

    host: str
    port: int
    state_dir: Path
    redis_url: str | None = None
    target: str | None = None
    draft: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    num_slots: int = 8
    max_seq_len: int = 1024


def examine(subject: Subject) -> Iterator[Check]:
    """Every check, in the order in which a start would meet the thing."""
    checks: list[tuple[str, Callable[[Subject], Check]]] = [
        ("python", _python),
        ("torch", _torch),
        ("ray", lambda _: _library("ray", "everdraft serve cannot start")),
        ("redis", _redis),
        ("mlflow", lambda _: _library("mlflow", "runs are not tracked")),
        ("port", _port),
        ("memory", _memory),
        ("disk", _disk),
    ]
    if subject.target is not None:
        pair = functools.cache(lambda: _load(subject))
        checks.append(("models", lambda _: _models(pair())))
        checks.append(("plan", lambda _: _plan(subject, pair())))
    for name, check in checks:
        yield _safely(name, check, subject)


def _safely(name: str, check: Callable[[Subject], Check], subject: Subject) -> Check:
    try:
        return check(subject)
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        return Check(name, "failure", reason, "everdraft serve cannot start")


def _python(_: Subject) -> Check:
    return Check("python", "ok", platform.python_version())


def _torch(subject: Subject) -> Check:
    import torch

    from serving.models.errors import UnsupportedModelError
    from serving.models.refusals import check_device

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    found = f"{torch.__version__}, {gpus or 'no'} CUDA device{'' if gpus == 1 else 's'}, {cores} cores"
    try:
        check_device(subject.device)
    except UnsupportedModelError as error:
        return Check("torch", "failure", found, str(error))
    return Check("torch", "ok", found)


def _library(name: str, consequence: str) -> Check:
    try:
        return Check(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, "failure", "not installed", consequence)


def _redis(subject: Subject) -> Check:
    from buffer.errors import StoreUnavailableError
    from buffer.redis_server import find_server_binary

    if subject.redis_url is not None:
        return _redis_at(subject.redis_url)
    try:
        return Check("redis", "ok", f"embedded, {find_server_binary()}")
    except StoreUnavailableError as error:
        return Check("redis", "failure", str(error), "nothing can be learned")


def _redis_at(url: str) -> Check:
    from deploy.wiring import targets_at

    targets_at(url)
    return Check("redis", "ok", "answers at the given address")


def _port(subject: Subject) -> Check:
    if port_is_free(subject.host, subject.port):
        return Check("port", "ok", f"{subject.host}:{subject.port} is free")
    return Check("port", "failure", f"{subject.host}:{subject.port} is taken", "choose another with --port")


def _memory(_: Subject) -> Check:
    free = psutil.virtual_memory().available
    found = f"{free / 2**30:.1f} GiB free"
    if free >= MIN_MEMORY_BYTES:
        return Check("memory", "ok", found)
    return Check("memory", "warning", found, "Ray's processes alone take about 1.5 GiB")


def _disk(subject: Subject) -> Check:
    folder = next(path for path in (subject.state_dir, *subject.state_dir.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    found = f"{free / 2**30:.1f} GiB free for {subject.state_dir}"
    if free >= MIN_DISK_BYTES:
        return Check("disk", "ok", found)
    return Check("disk", "warning", found, "checkpoints and MLflow may run out of space")


def _load(subject: Subject) -> "ModelPair":
    from serving.models.loading import load_pair

    assert subject.target is not None
    return load_pair(subject.target, subject.draft, device=subject.device, dtype=subject.dtype)


def _plan(subject: Subject, pair: "ModelPair") -> Check:
    """The memory that serving would hold, beside the models just loaded."""
    import torch

    from buffer.exporter import MAX_QUEUE_BYTES
    from serving.free_memory import free_memory
    from serving.memory_plan import MemoryPlan, MemoryPlanError
    from serving.options import EngineOptions

    queue_bytes = MAX_QUEUE_BYTES if pair.draft is not None else 0
    options = EngineOptions(subject.num_slots, subject.max_seq_len, export_queue_bytes=queue_bytes)
    plan = MemoryPlan.of(pair, options)
    found = "\n".join(plan.lines())
    try:
        plan.require_fit(free_memory(torch.device(subject.device)))
    except MemoryPlanError as error:
        return Check("plan", "failure", found, str(error))
    return Check("plan", "ok", found)


def _models(pair: "ModelPair") -> Check:
    from serving.models.target_part import own_parameters

    sizes = [("target", pair.target), ("draft", pair.draft)]
    found = ", ".join(
        f"{role} of {sum(weight.numel() for weight in own_parameters(model).values()) / 1e6:.1f} M parameters"
        for role, model in sizes
        if model is not None
    )
    if pair.draft is None:
        return Check("models", "warning", found, "without a draft nothing is sped up and nothing learned")
    if pair.tokenizer is None:
        return Check("models", "warning", found, "no tokenizer: prompts must be token ids")
    return Check("models", "ok", found)
