"""What a vLLM worker does for everdraft, as its `worker_extension_cls`: capture, versions, swaps.

Every public method is called by `collective_rpc`, between two steps. Capture wraps the runner's sampling: it
reads the target's logits before a token is drawn. Invariant: nothing here raises into a step; a draft that
serves changes whole, or not at all.
"""

import functools
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from buffer.names import FLOOR_VERSION
from serving.engine.sampling import SamplingRow
from serving.engines.async_llm.draft_files import Header, StagedFile, read_header
from serving.engines.async_llm.step_capture import RowCapture, read_rows
from serving.engines.async_llm.step_messages import CapturedArrays, MessageSender, StepMessage
from serving.engines.async_llm.transfer import apply_weights

_log = logging.getLogger(__name__)

CAPTURE = "everdraft_capture"
"""Key of `SamplingParams.extra_args`: record this request."""
_PAUSE_S = 1.0
_PRUNE_STEPS = 256


class EverdraftWorker:
    """Mixed into vLLM's worker class."""

    model_runner: Any
    vllm_config: Any

    def everdraft_open(self, socket_path: str, floor_path: str) -> None:
        """Begin to report steps. `floor_path`: file of the draft that is loaded; others must be like it.
        Empty: there is no draft."""
        self._everdraft_sender = MessageSender(socket_path, lambda: _end(Path(socket_path).parent))
        self.everdraft_begin(self._everdraft_sender.put, floor_path)

    def everdraft_begin(
        self, put: Callable[[StepMessage], None], floor_path: str, capture_all: bool = False
    ) -> None:
        """As `everdraft_open`, with messages given to `put` on the step's thread."""
        floor = read_header(floor_path) if floor_path else None
        self._everdraft = _Steps(self.model_runner, put, floor, capture_all)
        self._everdraft.install()

    def everdraft_stage(self, path: str, sha256: str, draft_version: int) -> None:
        """Begin to read a draft's file, on a thread of its own. Raises ValueError for a file that is not like
        the floor's."""
        steps = self._everdraft
        if steps.floor is None:
            raise ValueError(f"draft_version={draft_version} was not staged: no draft is loaded")
        steps.staged = StagedFile(path, sha256, draft_version, steps.floor)

    def everdraft_swap(self) -> float:
        """Make the staged draft live. Returns the seconds that steps waited. Raises ValueError for a file
        that did not pass, after which nothing changed."""
        steps = self._everdraft
        staged, steps.staged = steps.staged, None
        if staged is None:
            raise ValueError("no draft is staged; nothing was swapped")
        tensors = staged.result()
        began_s = time.perf_counter()
        apply_weights(self, tensors)
        steps.draft_version = staged.draft_version
        return time.perf_counter() - began_s

    def everdraft_wait(self) -> None:
        """Until the staged file was read, or failed to be."""
        if self._everdraft.staged is not None:
            self._everdraft.staged.wait()

    def everdraft_dropped(self) -> int:
        """Messages that the channel dropped."""
        return self._everdraft_sender.num_dropped


class _Steps:
    """The runner's steps as messages."""

    def __init__(
        self, runner: Any, put: Callable[[StepMessage], None], floor: Header | None, capture_all: bool
    ) -> None:
        """`capture_all`: requests are recorded unless they say no, else only those that ask for it."""
        self.runner, self.floor = runner, floor
        self._put, self._capture_all = put, capture_all
        self.staged: StagedFile | None = None
        self.draft_version = FLOOR_VERSION
        self._proposed_by: dict[str, int] = {}
        """Version that was live when a request's draft tokens were proposed: in its last step."""
        self._numbers: dict[str, int] = {}
        self._last_s = 0.0
        self._has_failed = False

    def install(self) -> None:
        inner = self.runner._sample

        @functools.wraps(inner)
        def sample(logits: torch.Tensor | None, metadata: Any) -> Any:
            before = self._guarded(self._before, logits, metadata)
            output = inner(logits, metadata)
            if before is not None:
                self._guarded(self._after, before, output.sampled_token_ids)
            return output

        self.runner._sample = sample

    def _guarded(self, act: Any, *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except Exception:
            if not self._has_failed:
                _log.exception("a step could not be reported; answers are unaffected, records are")
            self._has_failed = True
            return None

    def _before(self, logits: torch.Tensor, metadata: Any) -> "_Step":
        batch = self.runner.input_batch
        request_ids = list(batch.req_ids)
        discarded = self.runner.discard_request_mask.np[: len(request_ids)]
        if metadata is None:
            drafts = [0] * len(request_ids)
            drafted, probs = np.zeros(0, np.int32), None
        else:
            drafts = [int(count) for count in metadata.num_draft_tokens]
            drafted = metadata.draft_token_ids.to(torch.int32).cpu().numpy().copy()
            probs = self.runner._get_spec_decode_draft_probs(metadata)
        params = [self.runner.requests[name].sampling_params for name in request_ids]
        wanted = [
            index
            for index, each in enumerate(params)
            if not discarded[index] and (each.extra_args or {}).get(CAPTURE, self._capture_all)
        ]
        captures: dict[int, RowCapture] = {}
        if wanted:
            starts = np.cumsum([0, *(count + 1 for count in drafts)])
            rows = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in wanted])
            read = read_rows(
                logits[torch.from_numpy(rows)],
                [drafts[index] + 1 for index in wanted],
                [_sampling_row(params[index]) for index in wanted],
            )
            captures = dict(zip(wanted, read, strict=True))
        return _Step(request_ids, discarded.astype(bool).copy(), drafts, drafted, probs, captures)

    def _after(self, step: "_Step", sampled_token_ids: torch.Tensor) -> None:
        now_s = time.perf_counter()
        step_s = now_s - self._last_s if now_s - self._last_s < _PAUSE_S else 0.0
        self._last_s = now_s
        sampled = sampled_token_ids.cpu().numpy()
        at = 0
        for index, name in enumerate(step.request_ids):
            count = step.drafts[index]
            drafted = step.drafted[at : at + count]
            if not step.discarded[index]:
                emitted = [int(token) for token in sampled[index] if token >= 0]
                self._put(
                    StepMessage(
                        name,
                        self._number(name),
                        self._proposed_by.get(name, self.draft_version) if count else self.draft_version,
                        count,
                        emitted,
                        step_s,
                        len(step.request_ids),
                        step.arrays(index, drafted, emitted, at),
                    )
                )
            self._proposed_by[name] = self.draft_version
            at += count
        if len(self._numbers) > _PRUNE_STEPS:
            self._prune()

    def _number(self, name: str) -> int:
        number = self._numbers.get(name, 0)
        self._numbers[name] = number + 1
        return number

    def _prune(self) -> None:
        alive = self.runner.requests
        self._numbers = {name: count for name, count in self._numbers.items() if name in alive}
        self._proposed_by = {name: count for name, count in self._proposed_by.items() if name in alive}


class _Step:
    """What is known of a step before its tokens are drawn."""

    def __init__(
        self,
        request_ids: Sequence[str],
        discarded: Any,
        drafts: list[int],
        drafted: Any,
        probs: torch.Tensor | None,
        captures: dict[int, RowCapture],
    ) -> None:
        self.request_ids, self.discarded, self.drafts = request_ids, discarded, drafts
        self.drafted, self._probs, self._captures = drafted, probs, captures

    def arrays(self, index: int, drafted: Any, emitted: list[int], at: int) -> CapturedArrays | None:
        capture = self._captures.get(index)
        if capture is None:
            return None
        positions = np.arange(len(drafted))
        draft_logprobs = np.zeros(len(drafted), np.float32)
        if self._probs is not None and capture.final_logprobs_EV is not None:
            rows = self._probs[at : at + len(drafted)].float().cpu().numpy()
            with np.errstate(divide="ignore"):
                draft_logprobs = np.log(rows[positions, drafted.astype(np.int64)]).astype(np.float32)
        return CapturedArrays(
            drafted,
            capture.target_logprobs(positions, drafted),
            draft_logprobs,
            capture.target_logprobs(np.arange(len(emitted)), emitted),
            capture.topk_token_ids_EK,
            capture.topk_logprobs_EK,
            capture.retemper_E,
        )


def _end(folder: Path) -> None:
    """The replica is gone, perhaps killed: nobody is left to answer, and vLLM's processes would stay, with
    the replica's folder. Its engine's process ends when it sees a worker end."""
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _sampling_row(params: Any) -> SamplingRow:
    return (float(params.temperature), max(int(params.top_k), 0), float(params.top_p), float(params.min_p))
