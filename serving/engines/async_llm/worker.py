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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from buffer.names import FLOOR_VERSION
from serving.engine.sampling import SamplingRow
from serving.engines.async_llm.draft_files import StagedFile, read_header
from serving.engines.async_llm.step_capture import RowCapture, read_rows
from serving.engines.async_llm.step_messages import CapturedArrays, MessageSender, StepMessage
from serving.engines.async_llm.transfer import apply_weights

_log = logging.getLogger(__name__)

CAPTURE = "everdraft_capture"
"""Key of `SamplingParams.extra_args`: record this request."""
_PAUSE_S = 1.0
T = TypeVar("T")


Wants = Callable[[str, Any], bool]
"""Whether to record a request, by its id inside vLLM and its sampling parameters; asked once a request."""


class EverdraftWorker:
    """Mixed into vLLM's worker class."""

    model_runner: Any
    vllm_config: Any
    rank: int

    def everdraft_open(self, socket_path: str, floor_path: str) -> None:
        """Begin to report steps. `floor_path`: file of the draft that is loaded; others must be like it.
        Empty: there is no draft."""
        sender = MessageSender(socket_path, lambda: _end(Path(socket_path).parent))
        self.everdraft_begin(sender.put, _asked_for, floor_path)

    def everdraft_begin(self, put: Callable[[StepMessage], None], wants: Wants, floor_path: str) -> None:
        """As `everdraft_open`, with messages given to `put` on the step's thread. Of several workers the
        first reports; all see the same tokens."""
        self._everdraft_floor = floor_path
        self._everdraft_staged: StagedFile | None = None
        self._everdraft = _Steps(self.model_runner, put, wants)
        if self.rank == 0:
            self._everdraft.install()

    def everdraft_stage(self, path: str, sha256: str, draft_version: int) -> None:
        """Begin to read a draft's file, on a thread of its own. Raises ValueError for a file that is not like
        the floor's."""
        if not self._everdraft_floor:
            raise ValueError(f"draft_version={draft_version} was not staged: no draft is loaded")
        like = read_header(self._everdraft_floor)
        self._everdraft_staged = StagedFile(path, sha256, draft_version, like)

    def everdraft_is_staged(self) -> bool:
        """Whether the file was read. Raises ValueError where it could not be, or has another sha256."""
        staged = self._everdraft_staged
        if staged is None or not staged.is_done:
            return False
        staged.result()
        return True

    def everdraft_swap(self) -> float:
        """Make the staged draft live. Returns the seconds that steps waited. Raises ValueError for a file
        that did not pass, after which nothing changed, and what vLLM raises, after which the floor serves."""
        staged, self._everdraft_staged = self._everdraft_staged, None
        if staged is None:
            raise ValueError("no draft is staged; nothing was swapped")
        began_s, tensors = time.perf_counter(), staged.result()
        try:
            apply_weights(self, tensors)
        except Exception:
            apply_weights(self, load_file(self._everdraft_floor))
            self._everdraft.draft_version = FLOOR_VERSION
            raise
        self._everdraft.draft_version = staged.draft_version
        return time.perf_counter() - began_s

    def everdraft_version(self) -> int:
        """Of the draft that serves."""
        return self._everdraft.draft_version


@dataclass
class _Told:
    """What is remembered of a request between two steps."""

    is_wanted: bool
    number: int = 0
    """Of its next step."""
    proposed_by: int = FLOOR_VERSION
    """Version that was live when its draft tokens were proposed: in its last step."""


@dataclass(frozen=True)
class _Step:
    """What is known of a step before its tokens are drawn. Lists have one entry a request."""

    request_ids: list[str]
    discarded: list[bool]
    """Of a prompt that is not read to its end, nothing is said."""
    num_drafted: list[int]
    drafted_token_ids: NDArray[np.int32]
    """Of all requests, one after the other."""
    draft_probs: torch.Tensor | None
    """Their rows; None where drafts are one-hot or no sampled request is recorded."""
    captures: dict[int, RowCapture]


class _Steps:
    """The runner's steps as messages."""

    def __init__(self, runner: Any, put: Callable[[StepMessage], None], wants: Wants) -> None:
        self.draft_version = FLOOR_VERSION
        self._runner, self._put, self._wants = runner, put, wants
        self._told: dict[str, _Told] = {}
        self._last_s = 0.0
        self._has_failed = False

    def install(self) -> None:
        inner = self._runner._sample

        @functools.wraps(inner)
        def sample(logits: torch.Tensor | None, metadata: Any) -> Any:
            step = self._guarded(self._before, logits, metadata)
            output = inner(logits, metadata)
            if step is not None:
                self._guarded(self._after, step, output.sampled_token_ids)
            return output

        self._runner._sample = sample

    def _guarded(self, act: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return act(*arguments)
        except Exception:
            if not self._has_failed:
                _log.exception("a step could not be reported; answers are unaffected, records are")
            self._has_failed = True
            return None

    def _before(self, logits_RV: torch.Tensor, metadata: Any) -> _Step:
        runner = self._runner
        names = list(runner.input_batch.req_ids)
        discarded: list[bool] = runner.discard_request_mask.np[: len(names)].astype(bool).tolist()
        num_drafted = [0] * len(names) if metadata is None else list(map(int, metadata.num_draft_tokens))
        params = [runner.requests[name].sampling_params for name in names]
        wanted = [
            index
            for index, name in enumerate(names)
            if self._told_of(name, params[index]).is_wanted and not discarded[index]
        ]
        if not wanted:
            return _Step(names, discarded, num_drafted, np.zeros(sum(num_drafted), np.int32), None, {})
        rows = [_sampling_row(params[index]) for index in wanted]
        starts = np.cumsum([0, *(count + 1 for count in num_drafted)])
        positions = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in wanted])
        read = read_rows(
            logits_RV[torch.from_numpy(positions)], [num_drafted[index] + 1 for index in wanted], rows
        )
        drafted, probs = np.zeros(0, np.int32), None
        if metadata is not None:
            drafted = metadata.draft_token_ids.to(torch.int32).cpu().numpy().copy()
            if any(temperature > 0.0 for temperature, *_ in rows):
                probs = runner._get_spec_decode_draft_probs(metadata)
        return _Step(names, discarded, num_drafted, drafted, probs, dict(zip(wanted, read, strict=True)))

    def _after(self, step: _Step, sampled_token_ids: torch.Tensor) -> None:
        now_s = time.perf_counter()
        step_s = now_s - self._last_s if now_s - self._last_s < _PAUSE_S else 0.0
        self._last_s = now_s
        sampled, at = sampled_token_ids.cpu().numpy(), 0
        for index, name in enumerate(step.request_ids):
            told, count = self._told[name], step.num_drafted[index]
            if not step.discarded[index]:
                emitted = [int(token) for token in sampled[index] if token >= 0]
                self._put(
                    StepMessage(
                        name,
                        told.number,
                        told.proposed_by if count else self.draft_version,
                        count,
                        emitted,
                        step_s,
                        len(step.request_ids),
                        _arrays(step, index, slice(at, at + count), emitted),
                    )
                )
                told.number += 1
                step_s = 0.0
            told.proposed_by = self.draft_version
            at += count

    def _told_of(self, name: str, params: Any) -> _Told:
        found = self._told.get(name)
        if found is None:
            alive = self._runner.requests
            self._told = {other: each for other, each in self._told.items() if other in alive}
            found = self._told[name] = _Told(self._wants(name, params))
        return found


def _arrays(step: _Step, index: int, span: slice, emitted: list[int]) -> CapturedArrays | None:
    """`span`: the request's own among all draft tokens."""
    capture = step.captures.get(index)
    if capture is None:
        return None
    drafted = step.drafted_token_ids[span]
    positions = np.arange(len(drafted))
    draft_logprobs = np.zeros(len(drafted), np.float32)
    if step.draft_probs is not None and capture.final_logprobs_EV is not None:
        rows = step.draft_probs[span].float().cpu().numpy()
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


def _asked_for(name: str, params: Any) -> bool:
    return bool((params.extra_args or {}).get(CAPTURE))


def _end(folder: Path) -> None:
    """The replica is gone, perhaps killed: nobody is left to answer, and vLLM's processes would stay, with
    the replica's folder. Its engine's process ends when it sees a worker end."""
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _sampling_row(params: Any) -> SamplingRow:
    return (float(params.temperature), max(int(params.top_k), 0), float(params.top_p), float(params.min_p))
