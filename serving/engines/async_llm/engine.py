"""vLLM's AsyncLLM behind the ServingEngine Protocol.

A thread of its own runs the event loop that AsyncLLM needs; models, capture and swaps live in vLLM's process.
Invariant: whatever vLLM does, a handle's last event carries a Generation.
"""

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Self

from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION
from serving.engine.cost_table import CostTable
from serving.engine.engine import EngineClosedError
from serving.engine.handle import GenerationHandle
from serving.engine.logits_processing import check_processing
from serving.engine.passes.kv_shape import KvShape
from serving.engine.request import EventCallback, GenerationRequest, TokenEvent, check_fit, ending_ids
from serving.engine.stats import EngineStats, Meter, SwapReport
from serving.engines.async_llm.draft_files import new_folder
from serving.engines.async_llm.draft_port import AsyncLLMDrafts
from serving.engines.async_llm.environment import environment_of_vllm
from serving.engines.async_llm.generation import RunningGeneration
from serving.engines.async_llm.plugin import require_vllm, vllm_version
from serving.engines.async_llm.sampling import MAX_LOGPROBS, check_speculation, vllm_arguments
from serving.engines.async_llm.step_counts import count_step, stats_of
from serving.engines.async_llm.step_messages import MessageReceiver, StepMessage
from serving.engines.async_llm.worker import CAPTURE
from serving.models.context_limit import fitted_context
from serving.models.errors import UnsupportedModelError
from serving.models.loading import ModelPair, load_pair
from serving.models.target_part import TargetPart
from serving.options import EngineOptions

_log = logging.getLogger(__name__)

WORKER = "serving.engines.async_llm.worker.EverdraftWorker"
DEFAULT_DRAFT_TOKENS = 4
DEFAULT_OPTIONS = EngineOptions()
_START_S, _CALL_S, _CLOSE_S, _SHUTDOWN_S = 600.0, 60.0, 15.0, 5.0
_TOLD_S, _TOLD_STEP_S = 0.05, 0.002
"""How long the end of a generation waits for step messages that are still on their way."""


class AsyncLLMEngine:
    """Made by `load_async_llm`."""

    router = None
    costs: CostTable | None = None

    def __init__(self, pair: ModelPair, options: EngineOptions, arguments: dict[str, Any]) -> None:
        """`arguments` are of vLLM's AsyncEngineArgs. Raises what vLLM raises at its start."""
        self.pair = pair
        self._max_seq_len = int(arguments["max_model_len"])
        speculative = arguments.get("speculative_config")
        self._num_draft_tokens = int(speculative["num_speculative_tokens"]) if speculative else 0
        self._num_slots, self._meter = options.num_slots, Meter()
        self._running: dict[str, RunningGeneration] = {}
        self._tasks: set[asyncio.Task[TokenEvent]] = set()
        self._names = itertools.count()
        self._closed = False
        self._folder = new_folder()
        self._receiver = MessageReceiver(str(self._folder / "steps"), self._hear)
        self.drafts = None if pair.draft is None or not speculative else self._new_drafts()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="everdraft-vllm", daemon=True)
        self._thread.start()
        try:
            self._llm = self._wait(self._start(arguments), _START_S)
        except BaseException:
            self.close()
            raise

    @property
    def tokenizer(self) -> Any | None:
        return self.pair.tokenizer

    @property
    def target_revision(self) -> str:
        return self.pair.target_revision

    @property
    def vocab_size(self) -> int:
        return self.pair.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset(self.pair.eos_token_ids)

    @property
    def max_seq_len(self) -> int:
        return self._max_seq_len

    @property
    def passes(self) -> str:
        return f"vllm {vllm_version()}"

    @property
    def draft_version(self) -> int:
        return FLOOR_VERSION if self.drafts is None else self.drafts.versions[DEFAULT_ROUTE]

    @property
    def is_alive(self) -> bool:
        return not self._closed and self._thread.is_alive() and not self._llm.errored

    def submit(self, request: GenerationRequest, on_event: EventCallback | None = None) -> GenerationHandle:
        """See ServingEngine.submit."""
        self.check(request)
        if not self.is_alive:
            raise EngineClosedError(f"the engine is closed; request {request.request_id!r} was not started")
        if request.sampling.constraint is not None:  # vLLM's log-probabilities are of allowed tokens alone
            request = replace(request, capture=False)
        generation = RunningGeneration(request)
        name = f"{request.request_id}-{request.choice_index}-{next(self._names)}"
        task: asyncio.Task[TokenEvent] | None = None

        def cancel() -> None:
            if task is not None:
                task.cancel()

        handle = GenerationHandle(request.request_id, lambda: self._soon(cancel), on_event)

        def ended(
            task: asyncio.Task[TokenEvent],
        ) -> None:  # also where it was cancelled before its first line
            self._running.pop(name, None)
            self._tasks.discard(task)
            handle.deliver(generation.cancelled() if task.cancelled() else task.result())

        def begin() -> None:
            nonlocal task
            self._running[name] = generation
            task = self._loop.create_task(self._generate(name, generation, handle))
            self._tasks.add(task)
            task.add_done_callback(ended)

        self._soon(begin)
        if self._closed:  # closed in between: the loop may have ended without running `begin`
            raise EngineClosedError(f"the engine was closed; request {request.request_id!r} was not run")
        return handle

    def check(self, request: GenerationRequest) -> None:
        """See ServingEngine.check."""
        room = self._max_seq_len - (request.sampling.max_tokens == 0)  # vLLM draws a token in any case
        check_fit(request, max_seq_len=room, vocab_size=self.pair.vocab_size)
        check_processing(request.sampling, self._ending_ids(request), self.pair.vocab_size)
        if self.drafts is not None:
            check_speculation(request.sampling)

    def stats(self) -> EngineStats:
        running = list(self._running.values())
        num_running = sum(generation.has_begun for generation in running)
        return stats_of(
            self._meter,
            num_running=num_running,
            num_waiting=len(running) - num_running,
            num_slots=self._num_slots,
            num_draft_tokens=self._num_draft_tokens,
            draft_versions={DEFAULT_ROUTE: self.draft_version},
        )

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """A worker's method on every worker, between two steps. Raises what it raises."""
        found: list[Any] = self._wait(self._llm.collective_rpc(method, args=arguments), _CALL_S)
        return found

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """See ServingEngine.close."""
        if not self._closed and self._loop.is_running():
            self._closed = True
            with contextlib.suppress(Exception):
                self._wait(self._end(), timeout_s)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout_s)
            if not self._thread.is_alive():
                self._loop.close()
            self._receiver.close()
            if self.drafts is not None:
                self.drafts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def _start(self, arguments: dict[str, Any]) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        floor = "" if self.drafts is None else str(self.drafts.floor_path)
        await llm.collective_rpc("everdraft_open", args=(str(self._folder / "steps"), floor))
        return llm

    async def _end(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # each delivers its last event
        if hasattr(self, "_llm"):
            self._llm.shutdown(timeout=_SHUTDOWN_S)

    async def _generate(
        self, name: str, generation: RunningGeneration, handle: GenerationHandle
    ) -> TokenEvent:
        """Delivers all events but the last, which it returns."""
        try:
            return await self._outputs(name, generation, handle)
        except Exception as error:
            _log.exception("request %s failed in vLLM", generation.request.request_id)
            return generation.failed(f"{type(error).__name__}: {error}")

    async def _outputs(
        self, name: str, generation: RunningGeneration, handle: GenerationHandle
    ) -> TokenEvent:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        request = generation.request
        arguments = vllm_arguments(request, self._ending_ids(request), CAPTURE)
        if (form := arguments["structured_outputs"]) is not None:
            arguments["structured_outputs"] = StructuredOutputsParams(**form)
        sampling = SamplingParams(**arguments, output_kind=RequestOutputKind.DELTA)
        self._meter.count_prompt(len(request.prompt_token_ids))
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_token_ids)}
        if request.cache_salt is not None:
            prompt["cache_salt"] = request.cache_salt
        async for output in self._llm.generate(prompt, sampling, name):
            completion = output.outputs[0]
            event = generation.add_output(completion.token_ids, completion.logprobs, output.prompt_logprobs)
            if completion.finish_reason is not None:
                await self._messages_of(generation)
                reused = output.num_cached_tokens or 0
                return generation.finished(event, completion.finish_reason, completion.stop_reason, reused)
            handle.deliver(event)
        return generation.failed("vLLM ended without a reason")

    async def _messages_of(self, generation: RunningGeneration) -> None:
        waited_s = 0.0
        while not generation.is_told() and waited_s < _TOLD_S:
            await asyncio.sleep(_TOLD_STEP_S)
            waited_s += _TOLD_STEP_S

    def _hear(self, message: StepMessage) -> None:
        """On the channel's thread."""
        count_step(self._meter, message)
        generation = self._running.get(message.given_id)
        if generation is not None:
            generation.add_message(message)

    def _new_drafts(self) -> AsyncLLMDrafts:
        assert self.pair.draft is not None
        return AsyncLLMDrafts(
            self.pair.draft,
            self._folder,
            draft_revision=self.pair.draft_revision,
            target_revision=self.pair.target_revision,
            call=self.call,
            swapped=self._swapped,
        )

    def _swapped(self, draft_version: int, swap_s: float) -> SwapReport:
        report = SwapReport(draft_version, swap_s, under_load=bool(self._running))
        self._meter.count_swap(report, is_whole_pause=True)
        return report

    def _ending_ids(self, request: GenerationRequest) -> frozenset[int]:
        return ending_ids(request.sampling, self.pair.eos_token_ids, self.pair.vocab_size)

    def _soon(self, act: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it every generation
            self._loop.call_soon_threadsafe(act)

    def _wait(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)


def load_async_llm(
    target: str,
    draft: str | None = None,
    options: EngineOptions = DEFAULT_OPTIONS,
    *,
    dtype: str = "float32",
    num_threads: int | None = None,
    **arguments: Any,
) -> AsyncLLMEngine:
    """Check both models as our engine does, start vLLM on them. `arguments` go to AsyncEngineArgs. Raises
    UnsupportedModelError, also where vLLM is not installed or its version was not tested."""
    require_vllm()
    pair = load_pair(target, draft, dtype=dtype)
    if pair.draft is not None and TargetPart.of(pair.draft) is not None:
        raise UnsupportedModelError(
            f"draft {draft!r}: vLLM drafts with models from files; `everdraft serve` writes such a part as "
            "one, and so does `everdraft draft init`"
        )
    pair.target.to("meta")  # only its revision and shapes were wanted
    max_seq_len, note = fitted_context(options.max_seq_len, pair.named)
    if note:
        _log.warning("%s", note)
    speculative: dict[str, Any] = {}
    if draft is not None and options.uses_model and options.num_draft_tokens != 0:
        speculative["speculative_config"] = {
            "method": "draft_model",
            "model": draft,
            "num_speculative_tokens": options.num_draft_tokens or DEFAULT_DRAFT_TOKENS,
        }
    everything = {
        "model": target,
        "dtype": dtype,
        "max_model_len": max_seq_len,
        "max_num_seqs": options.num_slots,
        "max_logprobs": MAX_LOGPROBS,
        "enforce_eager": options.compile == "off",
        "enable_prefix_caching": options.prefix_cache_mib != 0,
        "async_scheduling": False,
        "worker_extension_cls": WORKER,
        "structured_outputs_config": {"backend": "guidance"},
        "disable_log_stats": True,
        **speculative,
        **arguments,
    }
    with environment_of_vllm(num_threads, options.num_slots * max_seq_len * _column_bytes(pair)):
        return AsyncLLMEngine(pair, options, everything)


def _column_bytes(pair: ModelPair) -> int:
    models = [model for model in (pair.target, pair.draft) if model is not None]
    return sum(KvShape.of(model).num_values * next(model.parameters()).dtype.itemsize for model in models)
