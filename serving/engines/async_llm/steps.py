"""A model runner's steps as messages, whichever runner it is: what was drafted, emitted and, of recorded
requests, what the target said.

Knows no vLLM but its sampling parameters' names. Invariant: nothing here raises into a step.

R rows of a step, one a position that is verified or drawn; V vocabulary; G draft tokens of all requests.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from buffer.names import FLOOR_VERSION
from serving.engine.sampling import SamplingRow
from serving.engines.async_llm.step_capture import RowCapture, read_rows
from serving.engines.async_llm.step_messages import CapturedArrays, StepMessage

_log = logging.getLogger(__name__)

_PAUSE_S = 1.0
T = TypeVar("T")

Wants = Callable[[str, Any], bool]
"""Whether to record a request, by its id inside vLLM and its sampling parameters; asked once a request."""


@dataclass(frozen=True)
class StepRows:
    """What a runner knows of a step before its tokens are drawn. Lists have one entry a request, rows and
    draft tokens follow one another in the order of the requests."""

    request_ids: list[str]
    params: list[Any]
    """Sampling parameters."""
    discarded: list[bool]
    """Of a prompt that is not read to its end, nothing is said."""
    num_drafted: list[int]
    logits_RV: Tensor
    """A request has one row more than draft tokens."""
    drafted_token_ids: Callable[[], NDArray[np.int32]]
    """(G,); asked for only where a request is recorded."""
    draft_probs: Callable[[], Tensor | None]
    """(G, V); None where drafts are one-hot. Asked for only where a sampled request is recorded."""


@dataclass
class _Told:
    """What is remembered of a request between two steps."""

    is_wanted: bool
    number: int = 0
    """Of its next step."""
    proposed_by: int = FLOOR_VERSION
    """Version that was live when its draft tokens were proposed: in its last step."""


@dataclass(frozen=True)
class Step:
    """A step whose tokens are being drawn."""

    rows: StepRows
    drafted_token_ids: NDArray[np.int32]
    draft_probs: Tensor | None
    captures: dict[int, RowCapture]
    """By the request's place in the step."""


class Steps:
    """`before` and `after` are called around a runner's drawing of tokens, on its thread."""

    def __init__(self, put: Callable[[StepMessage], None], wants: Wants) -> None:
        self.draft_version = FLOOR_VERSION
        self._put, self._wants = put, wants
        self._told: dict[str, _Told] = {}
        self._last_s = 0.0
        self._has_failed = False

    def before(self, read: Callable[[], StepRows | None], alive: Callable[[], Any]) -> Step | None:
        """`alive`: the ids that the runner knows; others are forgotten. None where nothing can be said."""
        return self._guarded(self._before, read, alive)

    def after(self, step: Step | None, emitted: Callable[[], Sequence[Sequence[int]]]) -> None:
        """`emitted`: each request's tokens."""
        if step is not None:
            self._guarded(self._after, step, emitted)

    def _guarded(self, act: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return act(*arguments)
        except Exception:
            if not self._has_failed:
                _log.exception("a step could not be reported; answers are unaffected, records are")
            self._has_failed = True
            return None

    def _before(self, read: Callable[[], StepRows | None], alive: Callable[[], Any]) -> Step | None:
        rows = read()
        if rows is None:
            return None
        wanted = [
            index
            for index, name in enumerate(rows.request_ids)
            if self._told_of(name, rows.params[index], alive).is_wanted and not rows.discarded[index]
        ]
        if not wanted:
            return Step(rows, np.zeros(sum(rows.num_drafted), np.int32), None, {})
        sampling = [_sampling_row(rows.params[index]) for index in wanted]
        starts = np.cumsum([0, *(count + 1 for count in rows.num_drafted)])
        positions = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in wanted])
        captures = read_rows(
            rows.logits_RV[torch.from_numpy(positions).to(rows.logits_RV.device)],
            [rows.num_drafted[index] + 1 for index in wanted],
            sampling,
        )
        drafted, probs = np.zeros(0, np.int32), None
        if any(rows.num_drafted):
            drafted = rows.drafted_token_ids()
            if any(temperature > 0.0 for temperature, *_ in sampling):
                probs = rows.draft_probs()
        return Step(rows, drafted, probs, dict(zip(wanted, captures, strict=True)))

    def _after(self, step: Step, emitted: Callable[[], Sequence[Sequence[int]]]) -> None:
        now_s = time.perf_counter()
        step_s = now_s - self._last_s if now_s - self._last_s < _PAUSE_S else 0.0
        self._last_s = now_s
        at, names = 0, step.rows.request_ids
        for index, (name, tokens) in enumerate(zip(names, emitted(), strict=True)):
            told, count = self._told[name], step.rows.num_drafted[index]
            if not step.rows.discarded[index]:
                self._put(
                    StepMessage(
                        name,
                        told.number,
                        told.proposed_by if count else self.draft_version,
                        count,
                        list(tokens),
                        step_s,
                        len(names),
                        _arrays(step, index, slice(at, at + count), tokens),
                    )
                )
                told.number += 1
                step_s = 0.0
            told.proposed_by = self.draft_version
            at += count

    def _told_of(self, name: str, params: Any, alive: Callable[[], Any]) -> _Told:
        found = self._told.get(name)
        if found is None:
            names = alive()
            self._told = {other: each for other, each in self._told.items() if other in names}
            found = self._told[name] = _Told(self._wants(name, params))
        return found


def _arrays(step: Step, index: int, span: slice, emitted: Sequence[int]) -> CapturedArrays | None:
    """`span`: the request's own among all draft tokens."""
    capture = step.captures.get(index)
    if capture is None:
        return None
    drafted = step.drafted_token_ids[span]
    positions = np.arange(len(drafted))
    draft_logprobs = np.zeros(len(drafted), np.float32)
    if step.draft_probs is not None and capture.final_logprobs_EV is not None:
        probs = step.draft_probs[span].float().cpu().numpy()
        with np.errstate(divide="ignore"):
            draft_logprobs = np.log(probs[positions, drafted.astype(np.int64)]).astype(np.float32)
    return CapturedArrays(
        drafted,
        capture.target_logprobs(positions, drafted),
        draft_logprobs,
        capture.target_logprobs(np.arange(len(emitted)), emitted),
        capture.topk_token_ids_EK,
        capture.topk_logprobs_EK,
        capture.retemper_E,
    )


def _sampling_row(params: Any) -> SamplingRow:
    return (float(params.temperature), max(int(params.top_k), 0), float(params.top_p), float(params.min_p))
