"""The one place that chooses concrete parts: which Redis, which Ray, who learns, where runs are logged.

Read `running_system` for what a running everdraft is made of. Invariant: leaving it, by whatever
exception, takes down everything that it started, in reverse order.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from buffer.errors import PersistentStoreError, StoreUnavailableError
from buffer.redis_feed import RedisAdapterFeed, known_targets
from buffer.redis_server import EmbeddedRedis
from buffer.redis_store import RedisRecordStore
from buffer.store import AdapterFeed, RecordStore
from buffer.two_stores import TwoStores
from deploy.draft_checkpoint import with_draft_checkpoint
from deploy.environment import quieten_libraries
from deploy.errors import ClusterError, ModelPairError, SettingsError
from deploy.gguf_target import with_converted_target
from deploy.log_relay import log_relay
from deploy.part_choice import as_if_chosen, with_chosen_part
from deploy.ports import require_free_port
from deploy.private_memory import folder_in_memory, forbid_core_dumps, may_swap
from deploy.running import RunningNote, claimed_folder, own_note, write_learner_snapshot, write_note
from deploy.settings import ClusterSettings, Settings
from learner.settings import LearnerSettings
from serving.log_lines import LogPlan

if TYPE_CHECKING:
    from deploy.learner_process import LearnerHandle

_RAY_FILES_BYTES = 256 * 2**20
"""Room for a session's logs and what it spills."""

Narrate = Callable[[str], None]
"""Told what is being done, a line at a time, in words for a person."""


@dataclass(frozen=True)
class RunningSystem:
    """What runs, and where it answers."""

    settings: Settings
    url: str
    redis_url: str = field(repr=False)
    """With its password; not for printing."""
    learner: "LearnerHandle | None"
    target_revision: str
    """Of the target that the replicas loaded; the feed and the records are kept by it."""
    memory_url: str | None = field(default=None, repr=False)
    """Of records of capture mode `memory`, with its password; None: there are none."""

    def note_learner(self) -> None:
        """Leave word of the learner for `everdraft status`; to be called about once a second."""
        if self.learner is not None:
            write_learner_snapshot(self.settings.state_dir, self.learner.snapshot())

    def drain(self, abort: threading.Event) -> bool:
        """Take no new requests, and wait for those under way: for `serving.drain_timeout_s`, or until `abort`
        is set. Returns whether all were answered whole."""
        from deploy.draining import drain

        return drain(self.url, timeout_s=self.settings.serving.drain_timeout_s, abort=abort)


def check_redis_url(redis_url: str) -> None:
    """Raises SettingsError for a URL that is none; connects to nothing."""
    open_store(redis_url).close()


def targets_at(redis_url: str) -> list[str]:
    """The revisions of the targets that have drafts or replicas there. Raises SettingsError for a URL that is
    none, StoreUnavailableError."""
    check_redis_url(redis_url)
    return known_targets(redis_url)


def open_feed(redis_url: str, target_revision: str) -> AdapterFeed:
    """Raises SettingsError for a URL that is none; connects at the first call."""
    try:
        return RedisAdapterFeed(redis_url, target_revision)
    except ValueError as error:
        raise SettingsError(f"redis.url: {error}") from None


def open_store(redis_url: str, memory_url: str | None = None) -> RecordStore:
    """`memory_url`: of records of capture mode `memory`. Raises SettingsError for a URL that is none;
    connects at the first call."""
    try:
        durable = RedisRecordStore(redis_url)
    except ValueError as error:
        raise SettingsError(f"redis.url: {error}") from None
    return durable if memory_url is None else TwoStores(durable, _memory_store(memory_url))


def _memory_store(memory_url: str) -> RedisRecordStore:
    try:
        return RedisRecordStore(memory_url, in_memory=True)
    except ValueError as error:
        raise SettingsError(f"redis.memory_url: {error}") from None


@contextmanager
def running_system(settings: Settings, narrate: Narrate) -> Iterator[RunningSystem]:
    """Everything that `settings` asks for, up and answering inside the block.

    Raises DeployError; then nothing is left running.
    """
    quieten_libraries(os.environ)
    settings = with_absolute_paths(settings)
    cluster = settings.cluster
    with ExitStack() as parts:
        url, learns = _url(cluster.host, cluster.port), cluster.learn and settings.serving.draft is not None
        locks = parts.enter_context(claimed_folder(settings.state_dir, url=url, learns=learns))
        require_free_port(cluster.host, cluster.port)
        settings = with_converted_target(settings, narrate)
        check_models(as_if_chosen(settings))
        settings = with_draft_checkpoint(settings, narrate)
        if settings.serving.engine == "everdraft":  # vLLM plans its own memory
            from deploy.memory import check_memory

            for line in check_memory(as_if_chosen(settings)).lines():
                narrate(line)
        if "memory" in settings.serving.capture_modes:
            keep_off_disk(settings.cluster, narrate)
        redis_url = parts.enter_context(_redis(settings, narrate))
        memory_url = parts.enter_context(_memory_redis(settings, narrate))
        settings = with_chosen_part(settings, redis_url, narrate)
        urls = (redis_url, memory_url)
        learner, revision = parts.enter_context(_replicas_and_learner(settings, urls, locks, narrate))
        system = RunningSystem(settings, url, redis_url, learner, revision, memory_url)
        write_note(settings.state_dir, _note(system))
        yield system


@contextmanager
def _replicas_and_learner(
    settings: Settings, urls: tuple[str, str | None], locks: tuple[int, ...], narrate: Narrate
) -> Iterator[tuple["LearnerHandle | None", str]]:
    """The learner's handle, and the revision of the target that is served."""
    # Ray and torch take seconds to import: not before the quick checks have passed.
    from deploy.cluster import endpoint, ray_session
    from deploy.learner_process import learner_beside
    from serving.replica import build_deployment

    cluster = settings.cluster
    folder = _ray_folder(cluster) if "memory" in settings.serving.capture_modes else None
    with ExitStack() as parts:
        narrate("starting Ray" if cluster.ray_address is None else f"joining Ray at {cluster.ray_address}")
        parts.enter_context(
            ray_session(cluster, num_cpus=schedulable_cpus(settings), locks=locks, folder=folder)
        )
        narrate("loading the models and measuring what a pass costs")
        if (settings.serving.draft or "").split(":")[0] == "self":
            narrate(
                "a draft of the target's own layers is fitted to it at the first start, which takes minutes"
            )
        logs = parts.enter_context(_logs(cluster))
        application = build_deployment(
            settings.serving, *urls, num_gpus=cluster.num_gpus_per_replica, logs=logs
        )
        is_own_ray = cluster.ray_address is None
        revision = parts.enter_context(
            endpoint(application, host=cluster.host, port=cluster.port, keeps_door=is_own_ray)
        )
        learner = None
        if cluster.learn and settings.serving.draft is not None:
            narrate("starting the learner")
            learner = parts.enter_context(learner_beside(settings, learner_settings(settings), *urls, logs))
        yield learner, revision


@contextmanager
def _logs(cluster: ClusterSettings) -> Iterator[LogPlan]:
    """How the other processes log: JSON goes through this one, unless they run on a Ray that was joined,
    which may be elsewhere."""
    if cluster.log_format == "text" or cluster.ray_address is not None:
        yield LogPlan(cluster.log_format)
        return
    with log_relay() as path:
        yield LogPlan(cluster.log_format, path)


def check_models(settings: Settings) -> None:
    """Refuse at once what the replicas would refuse later: reads the device's name, configurations and the
    headers of files, no weights. Devices of machines behind a given Ray are looked at there.

    Raises ModelPairError.
    """
    from serving.engines.async_llm.plugin import require_vllm
    from serving.models.context_limit import fitted_context
    from serving.models.errors import UnsupportedModelError
    from serving.models.inspection import inspect_pair
    from serving.models.refusals import check_device

    serving = settings.serving
    try:
        if serving.engine == "vllm" and settings.cluster.ray_address is None:
            require_vllm()
        check_device(serving.device, is_here=settings.cluster.ray_address is None)
        inspected = inspect_pair(serving.target, serving.draft, dtype=serving.dtype)
        fitted_context(serving.max_seq_len, inspected.named)
    except UnsupportedModelError as error:
        raise ModelPairError(f"serving: {error}; nothing was started") from error


def with_absolute_paths(settings: Settings) -> Settings:
    """Models given as folders, made absolute: replicas and learner may have another working directory. A
    draft called `self` is the target's part, also beside a folder of that name."""
    serving = settings.serving
    names = {"target": serving.target, "draft": serving.draft}
    folders = {
        role: str(Path(name).resolve())
        for role, name in names.items()
        if name and Path(name).is_dir() and (role, name) != ("draft", "self")
    }
    return settings.model_copy(update={"serving": serving.model_copy(update=folders)})


def learner_settings(settings: Settings) -> LearnerSettings:
    """The learner's own, with its folders and its tracker put where this run keeps them."""
    learner = settings.learner
    return learner.model_copy(
        update={
            "checkpoint_folder": str(settings.state_dir / learner.checkpoint_folder),
            # two learners under one name would take each other's records as their own
            "consumer_name": f"{learner.consumer_name}@{socket.gethostname()}:{settings.state_dir}",
            "tracking_uri": settings.tracking_uri,
            # a route that no replica has room for would be learnt for nobody
            "max_routes": min(learner.max_routes, settings.serving.num_route_drafts),
        }
    )


def schedulable_cpus(settings: Settings) -> int:
    """Ray starts nothing that does not fit: room for every replica and the learner, cores or not."""
    return max(psutil.cpu_count() or 1, settings.serving.num_replicas + 2)


@contextmanager
def _redis(settings: Settings, narrate: Narrate) -> Iterator[str]:
    if settings.redis.url is not None:
        check_redis_url(settings.redis.url)
        yield settings.redis.url
        return
    narrate("starting Redis")
    with _running(EmbeddedRedis(folder=settings.state_dir / "redis", restarts=True)) as url:
        yield url


@contextmanager
def _memory_redis(settings: Settings, narrate: Narrate) -> Iterator[str | None]:
    """None where nothing is recorded in capture mode `memory`."""
    serving = settings.serving
    if not (serving.records and "memory" in serving.capture_modes):
        yield None
    elif settings.redis.memory_url is not None:
        check_memory_redis(settings.redis.memory_url, narrate)
        yield settings.redis.memory_url
    else:
        narrate("starting a second Redis, which persists nothing")
        with _running(EmbeddedRedis(is_sealed=True, restarts=True)) as url:
            yield url


@contextmanager
def _running(server: EmbeddedRedis) -> Iterator[str]:
    """Its URL, inside the block. Raises ClusterError where it does not start."""
    try:
        server.start()
    except StoreUnavailableError as error:
        raise ClusterError(str(error)) from error
    try:
        yield server.url
    finally:
        server.stop()


def check_memory_redis(memory_url: str, narrate: Narrate) -> None:
    """Raises SettingsError for a server that persists what it holds. One that is away is asked by whoever
    writes to it, before the first record."""
    with closing(_memory_store(memory_url)) as store:
        try:
            store.require_unpersisted()
        except PersistentStoreError as error:
            raise SettingsError(f"redis.memory_url: {error}; nothing was started") from None
        except StoreUnavailableError as error:
            narrate(f"redis.memory_url: {error}")


def keep_off_disk(cluster: ClusterSettings, narrate: Narrate) -> None:
    """For capture mode `memory`: what can be done, and a line for what cannot."""
    forbid_core_dumps()
    if may_swap():
        narrate(
            "this machine may swap memory to a disk, and no process can lock that of another: turn swap off, "
            "encrypt it, or run in a cgroup with memory.swap.max=0, or capture mode memory promises too much"
        )
    if cluster.ray_address is not None:
        narrate(
            f"Ray at {cluster.ray_address} keeps its own temporary files: start its nodes with "
            "--object-spilling-directory in memory and with core dumps off, for capture mode memory"
        )
    elif _ray_folder(cluster) is None:
        narrate(
            "/dev/shm is no memory here, or less than Ray needs (cluster.object_store_bytes and 256 MiB): "
            "large requests may reach a disk by Ray's temporary files"
        )


def _ray_folder(cluster: ClusterSettings) -> Path | None:
    """In memory; with too little room there Ray would take a disk for its objects."""
    return folder_in_memory(cluster.object_store_bytes + _RAY_FILES_BYTES)


def _url(host: str, port: int) -> str:
    """Where a client on this machine finds the endpoint."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reachable}:{port}"


def _note(system: RunningSystem) -> RunningNote:
    settings = system.settings
    return own_note(
        url=system.url,
        redis_url=system.redis_url,
        memory_url=system.memory_url or "",
        tracking_uri=settings.tracking_uri,
        target=settings.serving.target,
        draft=settings.serving.draft or "",
        target_revision=system.target_revision,
        learns=system.learner is not None,
    )
