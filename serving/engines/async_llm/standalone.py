"""everdraft inside a vLLM that somebody else runs: nothing of Ray, no server of ours, no route that swaps.

Starts in vLLM's worker once it is warm, where `EVERDRAFT_REDIS_URL` is set: steps become records for Redis,
and the adapter feed is followed from there. A swap takes the lock that every step takes, so it falls between
two steps. Invariant: whatever Redis, the learner or this module does, a step waits at most for one swap.
"""

import functools
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from buffer.exporter import RecordExporter
from buffer.names import DEFAULT_ROUTE
from buffer.records import ServingStatus
from buffer.redis_feed import RedisAdapterFeed
from buffer.redis_store import RedisRecordStore
from serving.adapter_watcher import AdapterWatcher
from serving.engine.request import GenerationRequest, SamplingParams
from serving.engine.stats import SwapReport
from serving.engines.async_llm.counts import StepCounts
from serving.engines.async_llm.draft_port import AsyncLLMDrafts
from serving.engines.async_llm.generation import RunningGeneration
from serving.engines.async_llm.plugin import REDIS_URL, vllm_version
from serving.engines.async_llm.step_messages import StepMessage
from serving.models.loading import ModelPair, load_pair
from serving.recorder import Recorder
from serving.status import serving_status

_log = logging.getLogger(__name__)

CAPTURE_RATE, RECORD_TTL_S = "EVERDRAFT_CAPTURE_RATE", "EVERDRAFT_RECORD_TTL_S"
_ID_SUFFIX = 9
_WATCH_S, _STATUS_S = 0.2, 1.0


class Standalone:
    """One worker's records and drafts."""

    def __init__(self, worker: Any, environment: Mapping[str, str] = os.environ) -> None:
        """Loads both models once more for a moment, to name them as the learner does. Raises RuntimeError
        where several workers share a draft, and what the models raise."""
        config = worker.vllm_config
        if config.parallel_config.world_size != 1:
            raise RuntimeError(
                f"vLLM runs {config.parallel_config.world_size} workers for one engine, which would swap a "
                "draft one after the other; nothing is recorded and no draft is swapped"
            )
        pair = self._pair(config)
        self._worker = worker
        self._lock = threading.Lock()
        self._counts = StepCounts(
            config.scheduler_config.max_num_seqs, config.speculative_config.num_speculative_tokens
        )
        self._running: dict[str, RunningGeneration] = {}
        folder = Path(tempfile.mkdtemp(prefix="everdraft-vllm-"))
        self.drafts = AsyncLLMDrafts(
            pair.draft,  # type: ignore[arg-type]  # there is one: see _pair
            folder,
            draft_revision=pair.draft_revision,
            target_revision=pair.target_revision,
            call=self._call,
            swapped=self._swapped,
        )
        worker.everdraft_begin(self._hear, str(self.drafts.floor_path), capture_all=True)
        _between(worker.model_runner, ("execute_model", "sample_tokens"), self._lock)
        self._open_seams(environment, pair.target_revision)

    def _open_seams(self, environment: Mapping[str, str], target_revision: str) -> None:
        """Redis, at both ends."""
        url, replica_id = environment[REDIS_URL], f"vllm-{os.uname().nodename}-{os.getpid()}"
        self._exporter = RecordExporter(RedisRecordStore(url))
        self._recorder = Recorder(
            self._exporter,
            target_revision=target_revision,
            replica_id=replica_id,
            capture_rate=float(environment.get(CAPTURE_RATE, 1.0)),
            record_ttl_s=float(environment.get(RECORD_TTL_S, 7 * 24 * 3600.0)),
        )
        self._watcher = AdapterWatcher(
            self.drafts,
            RedisAdapterFeed(url, target_revision),
            replica_id=replica_id,
            status=partial(self._status, replica_id),
            watch_interval_s=_WATCH_S,
            status_interval_s=_STATUS_S,
        )
        self._watcher.start()

    @staticmethod
    def _pair(config: Any) -> ModelPair:
        speculative = config.speculative_config
        if speculative is None or speculative.method != "draft_model":
            raise RuntimeError(
                "vLLM serves without a draft model (--speculative-config with method draft_model); there is "
                "nothing to teach"
            )
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        return load_pair(config.model_config.model, speculative.model, dtype=dtype)

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        act: Callable[..., Any] = getattr(self._worker, method)
        if method == "everdraft_swap":
            self._worker.everdraft_wait()  # for the file, outside the lock
            with self._lock:
                return [act(*arguments)]
        return [act(*arguments)]

    def _swapped(self, draft_version: int, swap_s: float) -> SwapReport:
        report = SwapReport(draft_version, swap_s, under_load=bool(self._running))
        self._counts.add_swap(report)
        _log.warning("everdraft: draft_version=%d serves, swapped in %.1f ms", draft_version, 1000 * swap_s)
        return report

    def _hear(self, message: StepMessage) -> None:
        """On the step's own thread: short, and it does not raise."""
        self._counts.add_message(message)
        requests = self._worker.model_runner.requests
        state = requests.get(message.request_id)
        if state is None or message.captured is None:
            return
        running = self._running.get(message.request_id)
        if running is None and message.number == 0:
            running = RunningGeneration(_request(message.request_id, state))
            self._running[message.request_id] = running
        if running is None:
            return
        running.add_message(message)
        kept, reason = running.cut(message.emitted, state.sampling_params.all_stop_token_ids)
        running.add_output(SimpleNamespace(token_ids=kept, logprobs=None))
        if reason:
            self._end(message.request_id, reason)
        for name in [name for name in self._running if name not in requests]:
            self._end(name, "abort")

    def _end(self, name: str, reason: str) -> None:
        running = self._running.pop(name)
        nothing = running.add_output(SimpleNamespace(token_ids=[], logprobs=None))
        event = running.finished(nothing, reason, None, 0)
        if event.generation is not None and self._recorder.wants(event.request_id, None):
            self._recorder.record(event.generation)

    def _status(self, replica_id: str) -> ServingStatus:
        version = self.drafts.versions[DEFAULT_ROUTE]
        view: Any = SimpleNamespace(
            stats=lambda: self._counts.stats(
                num_running=len(self._running), num_waiting=0, draft_version=version
            ),
            costs=None,
            passes=f"vllm {vllm_version()}",
        )
        return serving_status(
            view,
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


def _request(name: str, state: Any) -> GenerationRequest:
    params = state.sampling_params
    return GenerationRequest(
        name[:-_ID_SUFFIX],
        tuple(state.prompt_token_ids),
        SamplingParams(
            temperature=params.temperature,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            min_p=params.min_p,
            max_tokens=params.max_tokens or 1 << 20,
            min_tokens=params.min_tokens,
            logit_bias=params.logit_bias or (),
            allowed_token_ids=params.allowed_token_ids,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            ignore_eos=params.ignore_eos,
        ),
        capture=True,
    )


def _between(runner: Any, names: tuple[str, ...], lock: threading.Lock) -> None:
    """Let each of these methods run under the lock."""
    for name in names:
        inner = getattr(runner, name)

        def locked(*arguments: Any, _inner: Any = inner, **named: Any) -> Any:
            with lock:
                return _inner(*arguments, **named)

        setattr(runner, name, functools.wraps(inner)(locked))
