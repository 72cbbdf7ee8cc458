"""Creates one replica's parts in order and closes them in reverse; with or without Ray.

Invariant: a store or feed that cannot be reached delays the start by a bounded time, and never fails it.
"""

import importlib.metadata
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from buffer.administration import DirectAdministration
from buffer.controls import Controls
from buffer.exporter import MAX_QUEUE_BYTES, RecordExporter
from buffer.records import ServingStatus
from buffer.store import AdapterFeed, RecordStore
from buffer.two_stores import TwoStores
from serving.adapter_watcher import AdapterWatcher
from serving.api.admission import Admission
from serving.api.context import AppContext
from serving.api.keys import KeyRing
from serving.api.limits import RequestLimits
from serving.api.rate_limits import RateLimits
from serving.api.refused_calls import RefusedCalls
from serving.api.token_codec import TokenCodec
from serving.api.tool_parsing import parser_for
from serving.capture_mode import CaptureMode
from serving.generation_defaults import generation_defaults
from serving.local import load_engine
from serving.metrics import ServingMetrics
from serving.models.loading import UnsupportedModelError
from serving.options import EngineOptions
from serving.recorder import Recorder, RecordPlace
from serving.serving_engine import ServingEngine
from serving.settings import ServingSettings
from serving.status import serving_status
from serving.structured_output import GrammarCompiler

if TYPE_CHECKING:
    from serving.tracing import RequestTracing

_log = logging.getLogger(__name__)

_FEED_TIMEOUT_S = 2.0
_COLLECTOR_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

OpenFeed = Callable[[str], AdapterFeed]
"""Opens the feed of a target revision, which is known only once the models are loaded."""


class ReplicaParts:
    """A running engine and everything around it. `store` None: nothing is recorded. `open_feed` None: the
    draft that was loaded serves, and no status is reported. Closes stores and feed."""

    def __init__(
        self,
        settings: ServingSettings,
        *,
        store: RecordStore | None,
        open_feed: OpenFeed | None,
        replica_id: str,
        memory_store: RecordStore | None = None,
    ) -> None:
        """Loads the models. `memory_store`: of records of capture mode `memory`. Raises
        UnsupportedModelError, or MemoryPlanError for sizes that do not fit."""
        self._settings, self._replica_id = settings, replica_id
        stores: dict[CaptureMode, RecordStore | None] = {"replay": store, "memory": memory_store}
        modes = settings.capture_modes if settings.records else ()
        self._stores = {mode: kept for mode, kept in stores.items() if kept is not None}
        if missing := [mode for mode in modes if store is not None and mode not in self._stores]:
            _log.warning("requests of capture mode %s are not recorded: there is no store for it", *missing)
        recorded = [mode for mode in modes if mode in self._stores]
        self.engine: ServingEngine = _load(settings, export_queue_bytes=MAX_QUEUE_BYTES * len(recorded))
        if self.engine.router is not None:
            self.engine.router.closed_routes = settings.isolated_routes
        self._tracing = _tracing(replica_id)
        on_exported = None if self._tracing is None else self._tracing.exported
        self._exporters = {
            mode: RecordExporter(self._stores[mode], on_exported=on_exported) for mode in recorded
        }
        self._feed = None if open_feed is None else open_feed(self.engine.target_revision)
        self._watcher = None if self._feed is None else self._new_watcher(self._feed)
        if self._watcher is not None:
            self._watcher.serve_latest_before_ready(settings.boot_timeout_s)
            self._watcher.start()
        self.context = self._new_context()

    def status(self) -> ServingStatus:
        exporters = self._exporters.values()
        return serving_status(
            self.engine,
            replica_id=self._replica_id,
            at_s=time.time(),
            num_dropped_records=sum(exporter.num_dropped_records for exporter in exporters),
            num_rerouted_records=sum(exporter.num_rerouted_records for exporter in exporters),
            last_error="" if self._watcher is None else self._watcher.last_error or self._unrecorded,
        )

    def close(self) -> None:
        """Cancel what runs, flush records, end all threads. Safe to call twice."""
        self.context.draining = True
        if self._watcher is not None:
            self._watcher.close()
        self.engine.close()
        for exporter in self._exporters.values():
            exporter.close()
        for seam in (*self._stores.values(), self._feed, self._tracing):
            if seam is not None:
                seam.close()

    def _controls(self) -> Controls:
        return Controls() if self._watcher is None else self._watcher.controls

    @property
    def _unrecorded(self) -> str:
        """Why an order to record is not followed; empty if it is, or there is none."""
        rate = self._controls().capture_rate
        if not rate or self._exporters:
            return ""
        return f"capture_rate={rate:g} is ordered, and this replica was started without recording"

    def _new_watcher(self, feed: AdapterFeed) -> AdapterWatcher:
        return AdapterWatcher(
            self.engine.drafts,
            feed,
            replica_id=self._replica_id,
            status=self.status,
            watch_interval_s=self._settings.watch_interval_s,
            status_interval_s=self._settings.status_interval_s,
            router=self.engine.router,
        )

    def _new_context(self) -> AppContext:
        settings, engine, feed, store = self._settings, self.engine, self._feed, self._every_store()
        administration = (
            None
            if feed is None or store is None
            else partial(DirectAdministration, feed, store, engine.target_revision)
        )
        admission = Admission(
            num_slots=settings.num_slots,
            max_queued_requests=settings.max_queued_requests,
            max_queued_prompt_tokens=settings.max_queued_prompt_tokens,
            clock=time.monotonic,
            has_owners=bool(settings.tenants),
        )
        tenants = [tenant.share(settings.num_replicas) for tenant in settings.tenants]
        codec = TokenCodec(engine.tokenizer)
        grammars = GrammarCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
        grammars.prepare()
        return AppContext(
            engine=engine,
            codec=codec,
            model_names=settings.served_names,
            sampling_defaults=_sampling_defaults(settings),
            version=software_version(),
            started_at=int(time.time()),
            admission=admission,
            limits=RequestLimits(
                max_generations=settings.generations_per_request,
                max_prompt_tokens=settings.prompt_tokens_per_request,
            ),
            rate_limits=RateLimits(tenants, time.monotonic),
            isolated_routes=settings.isolated_routes,
            keys=KeyRing(settings.revealed_api_keys(), settings.revealed_admin_key(), tenants),
            allowed_origins=settings.allowed_origins,
            metrics=ServingMetrics(
                engine.stats,
                replica_id=self._replica_id,
                num_rejected=lambda: admission.num_rejected,
                exporters=tuple(self._exporters.values()),
                model_name=settings.served_name,
            ),
            recorder=self._new_recorder(engine),
            status=self.status,
            replica_id=self._replica_id,
            controls=self._controls,
            administration=administration,
            refused_calls=RefusedCalls(feed),
            request_timeout_s=settings.request_timeout_s,
            grammars=grammars,
            tool_parser=settings.tool_call_parser or parser_for(codec.chat_template),
            stream_interval=settings.stream_interval,
            stream_padding_bytes=settings.stream_padding_bytes,
            tracing=self._tracing,
        )

    def _every_store(self) -> RecordStore | None:
        """What an operator deletes from."""
        durable, in_memory = self._stores.get("replay"), self._stores.get("memory")
        return durable if durable is None or in_memory is None else TwoStores(durable, in_memory)

    def _new_recorder(self, engine: ServingEngine) -> Recorder | None:
        """None if records would be useless: no store, no draft to train, nothing to be captured."""
        settings = self._settings
        if not self._exporters:
            return None
        return Recorder(
            {mode: RecordPlace(sink, settings.ttl_s(mode)) for mode, sink in self._exporters.items()},
            target_revision=engine.target_revision,
            replica_id=self._replica_id,
            capture_rate=settings.capture_rate,
            policy=settings.capture_policy,
            isolated_routes=settings.isolated_routes,
            controls=self._controls,
        )


def open_parts(
    settings: ServingSettings, redis_url: str | None, replica_id: str, memory_url: str | None = None
) -> ReplicaParts:
    """Parts on Redis; None: no records, no adapters. `memory_url`: for records of capture mode `memory`.
    Raises ValueError for an invalid URL."""
    if redis_url is None:
        return ReplicaParts(settings, store=None, open_feed=None, replica_id=replica_id)
    from buffer.redis_feed import RedisAdapterFeed
    from buffer.redis_store import RedisRecordStore

    return ReplicaParts(
        settings,
        store=RedisRecordStore(redis_url, settings.record_bounds()),
        open_feed=partial(RedisAdapterFeed, redis_url, timeout_s=_FEED_TIMEOUT_S),
        replica_id=replica_id,
        memory_store=None
        if memory_url is None
        else RedisRecordStore(memory_url, settings.record_bounds("memory"), in_memory=True),
    )


def software_version() -> str:
    """Version of the installed package; `0` if it is not installed."""
    try:
        return importlib.metadata.version("everdraft")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _tracing(replica_id: str) -> "RequestTracing | None":
    """None unless OpenTelemetry's own variables name a collector."""
    asked = next((name for name in _COLLECTOR_VARIABLES if os.environ.get(name)), None)
    if asked is None:
        return None
    try:
        from serving.tracing import RequestTracing
    except ImportError as error:
        _log.warning(
            "%s is set and OpenTelemetry is not installed (%s), so no traces are sent: pip install "
            "'everdraft[otel]'",
            asked,
            error,
        )
        return None
    return RequestTracing(replica_id=replica_id, version=software_version())


def _sampling_defaults(settings: ServingSettings) -> dict[str, Any]:
    """The target's own, unless they are switched off."""
    found = generation_defaults(settings.target) if settings.generation_config == "auto" else {}
    if found:
        said = ", ".join(f"{name}={value}" for name, value in found.items())
        _log.warning(
            "requests that leave them out get %s, from generation_config.json of %s; "
            "serving.generation_config = 'none' turns that off",
            said,
            settings.target,
        )
    return found


def _load(settings: ServingSettings, *, export_queue_bytes: int) -> ServingEngine:
    options = EngineOptions.of(settings, export_queue_bytes=export_queue_bytes)
    engine: ServingEngine
    if settings.engine == "vllm":
        from serving.engines.async_llm.engine import load_async_llm

        engine = load_async_llm(
            settings.target,
            settings.draft,
            options,
            dtype=settings.dtype,
            num_threads=settings.num_threads,
        )
    else:
        engine = load_engine(
            settings.target,
            settings.draft,
            options,
            device=settings.device,
            dtype=settings.dtype,
            untie_draft=settings.untie_draft,
        )
    if engine.tokenizer is None:
        engine.close()
        raise UnsupportedModelError(
            f"target {settings.target!r} has no tokenizer, and the endpoint answers in text; add its files"
        )
    return engine
