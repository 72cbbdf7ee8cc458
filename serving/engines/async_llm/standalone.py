"""everdraft inside a vLLM that somebody else runs: nothing of Ray, no server of ours, no route that swaps.

Starts in vLLM's worker once it is warm, where `EVERDRAFT_REDIS_URL` is set: steps become records for Redis,
and the adapter feed is followed from there. A swap takes the lock that every step takes, so it falls between
two steps. Invariant: whatever Redis, the learner or this module does, a step waits at most for one swap.
"""

import atexit
import contextlib
import functools
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from buffer.exporter import RecordExporter
from buffer.records import ServingStatus
from buffer.redis_feed import RedisAdapterFeed
from buffer.redis_store import RedisRecordStore
from serving.adapter_watcher import AdapterWatcher
from serving.engine.request import GenerationRequest
from serving.engine.stats import EngineStats, Meter, SwapReport
from serving.engines.async_llm.draft_files import new_folder
from serving.engines.async_llm.draft_port import AsyncLLMDrafts
from serving.engines.async_llm.generation import RunningGeneration
from serving.engines.async_llm.plugin import REDIS_URL, vllm_version
from serving.engines.async_llm.sampling import from_vllm
from serving.engines.async_llm.step_counts import count_step, stats_of
from serving.engines.async_llm.step_messages import ID_SUFFIX, StepMessage
from serving.engines.async_llm.worker import CAPTURE
from serving.models.loading import ModelPair, load_pair
from serving.recorder import Recorder, RecordPlace
from serving.status import serving_status

_log = logging.getLogger(__name__)

CAPTURE_RATE, RECORD_TTL_S = "EVERDRAFT_CAPTURE_RATE", "EVERDRAFT_RECORD_TTL_S"
_WATCH_S, _STATUS_S = 0.2, 1.0


class Standalone:
    """One worker's records and drafts; a status is made of `costs`, `passes` and `stats`."""

    costs = None
    passes = f"vllm {vllm_version()}"

    def __init__(self, worker: Any, environment: Mapping[str, str] = os.environ) -> None:
        """Loads both models once more for a moment, to name them as the learner does. Raises RuntimeError
        where several workers share a draft, and what the models raise; then the worker is as it was."""
        config = worker.vllm_config
        self._require_one_worker(config)
        pair = self._pair(config)
        self._worker, self._lock, self._meter = worker, threading.Lock(), Meter()
        self._num_slots = config.scheduler_config.max_num_seqs
        self._num_draft_tokens = config.speculative_config.num_speculative_tokens
        self._running: dict[str, RunningGeneration] = {}
        folder = new_folder()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        assert pair.draft is not None
        self.drafts = AsyncLLMDrafts(
            pair.draft,
            folder,
            draft_revision=pair.draft_revision,
            target_revision=pair.target_revision,
            call=self._call,
            swapped=self._swapped,
        )
        url, replica_id = environment[REDIS_URL], f"vllm-{os.uname().nodename}-{os.getpid()}"
        self._exporter = RecordExporter(RedisRecordStore(url))
        self._recorder = Recorder(
            {"replay": RecordPlace(self._exporter, float(environment.get(RECORD_TTL_S, 7 * 24 * 3600.0)))},
            target_revision=pair.target_revision,
            replica_id=replica_id,
            capture_rate=float(environment.get(CAPTURE_RATE, 1.0)),
            controls=lambda: self._watcher.controls,
        )
        self._watcher = AdapterWatcher(
            self.drafts,
            RedisAdapterFeed(url, pair.target_revision),
            replica_id=replica_id,
            status=partial(self._status, replica_id),
            watch_interval_s=_WATCH_S,
            status_interval_s=_STATUS_S,
        )
        worker.everdraft_begin(self._hear, self._wants, str(self.drafts.floor_path))
        _between(worker.model_runner, ("execute_model", "sample_tokens"), self._lock)
        self._watcher.start()

    def stats(self) -> EngineStats:
        return stats_of(
            self._meter,
            num_running=len(self._running),
            num_waiting=0,
            num_slots=self._num_slots,
            num_draft_tokens=self._num_draft_tokens,
            draft_versions=self.drafts.versions,
        )

    @staticmethod
    def _require_one_worker(config: Any) -> None:
        if config.parallel_config.world_size != 1:
            raise RuntimeError(
                f"vLLM runs {config.parallel_config.world_size} workers for one engine, which would swap a "
                "draft one after the other"
            )

    @staticmethod
    def _pair(config: Any) -> ModelPair:
        speculative = config.speculative_config
        if speculative is None or speculative.method != "draft_model":
            raise RuntimeError(
                "vLLM serves without a draft model (--speculative-config with method draft_model); there is "
                "nothing to teach"
            )
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        pair = load_pair(config.model_config.model, speculative.model, dtype=dtype)
        pair.target.to("meta")  # only its revision was wanted
        return pair

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """A worker's method, between two steps where it changes the draft."""
        with self._lock if method == "everdraft_swap" else contextlib.nullcontext():
            return [getattr(self._worker, method)(*arguments)]

    def _swapped(self, draft_version: int, swap_s: float) -> SwapReport:
        report = SwapReport(draft_version, swap_s, under_load=bool(self._running))
        self._meter.count_swap(report, is_whole_pause=True)
        _log.warning("everdraft: draft_version=%d serves, swapped in %.1f ms", draft_version, 1000 * swap_s)
        return report

    def _wants(self, name: str, params: Any) -> bool:
        """Begins the request's record, if it has one: unless it says no, at the capture rate, and where we
        can say how it is sampled."""
        given = name[:-ID_SUFFIX]
        asked = (params.extra_args or {}).get(CAPTURE, True)
        if self._recorder.mode_of(given, store=None if asked else False) == "off":
            return False
        requests = self._worker.model_runner.requests
        for other in [other for other in self._running if other not in requests]:
            self._end(other, "abort")
        prompt = tuple(requests[name].prompt_token_ids or ())
        try:
            request = GenerationRequest(given, prompt, from_vllm(params), capture=True)
        except ValueError as error:
            _log.info("request %s is not recorded: %s", given, error)
            return False
        self._running[name] = RunningGeneration(request)
        return True

    def _hear(self, message: StepMessage) -> None:
        """On the step's own thread: short."""
        count_step(self._meter, message)
        running = self._running.get(message.request_id)
        if running is None:
            return
        running.add_message(message)
        params = self._worker.model_runner.requests[message.request_id].sampling_params
        kept, reason = running.cut(message.emitted, params.all_stop_token_ids)
        running.add_output(kept)
        if reason:
            self._end(message.request_id, reason)

    def _end(self, name: str, reason: str) -> None:
        running = self._running.pop(name)
        generation = running.finished(running.add_output(()), reason, None, 0).generation
        assert generation is not None
        self._recorder.record(generation, "replay")

    def _status(self, replica_id: str) -> ServingStatus:
        return serving_status(
            self,
            replica_id=replica_id,
            at_s=time.time(),
            num_dropped_records=self._exporter.num_dropped_records,
            num_rerouted_records=self._exporter.num_rerouted_records,
            last_error=self._watcher.last_error,
        )


def start(worker: Any) -> None:
    """From the plugin, once the worker is warm; whatever fails, vLLM serves on as it is."""
    try:
        worker.everdraft_standalone = Standalone(worker)
    except Exception:
        _log.exception("everdraft does not run in this vLLM: nothing is recorded, no draft is swapped")


def _between(runner: Any, names: tuple[str, ...], lock: threading.Lock) -> None:
    """Let each of these methods run under the lock."""
    for name in names:
        inner = getattr(runner, name)

        def locked(*arguments: Any, _inner: Any = inner, **named: Any) -> Any:
            with lock:
                return _inner(*arguments, **named)

        setattr(runner, name, functools.wraps(inner)(locked))
