"""Where vLLM's two model runners draw tokens, and what each knows there.

The first (`vllm.v1.worker.gpu_model_runner`, the processor's too) draws in `_sample`; the second
(`vllm.v1.worker.gpu.model_runner`, where Triton runs) by calling its sampler or, with draft tokens, its
rejection sampler. Both are read before they draw, because they may work in place on the logits.
"""

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.engines.async_llm.steps import StepRows, Steps


def observe_runner(runner: Any, steps: Steps) -> None:
    """Have `steps` told of every step of a model runner, from the next one on."""
    if hasattr(runner, "_sample"):
        _observe_first(runner, steps)
    else:
        _observe_second(runner, steps)


def _observe_first(runner: Any, steps: Steps) -> None:
    inner = runner._sample

    @functools.wraps(inner)
    def sample(logits: Tensor | None, metadata: Any) -> Any:
        step = steps.before(lambda: _first_rows(runner, logits, metadata), lambda: runner.requests)
        output = inner(logits, metadata)
        steps.after(step, lambda: _without_padding(output.sampled_token_ids))
        return output

    runner._sample = sample


def _first_rows(runner: Any, logits_RV: Any, metadata: Any) -> StepRows:
    names = list(runner.input_batch.req_ids)
    return StepRows(
        names,
        [runner.requests[name].sampling_params for name in names],
        runner.discard_request_mask.np[: len(names)].astype(bool).tolist(),
        [0] * len(names) if metadata is None else list(map(int, metadata.num_draft_tokens)),
        logits_RV,
        lambda: metadata.draft_token_ids.to(torch.int32).cpu().numpy().copy(),
        lambda: runner._get_spec_decode_draft_probs(metadata),
    )


def _without_padding(sampled: Tensor) -> list[list[int]]:
    return [[int(token) for token in row if token >= 0] for row in sampled.cpu().numpy()]


def _observe_second(runner: Any, steps: Steps) -> None:
    """Its samplers are asked by call, so each becomes an object of a class of its own; its requests keep no
    sampling parameters, so they are noted as they arrive."""
    params: dict[str, Any] = {}
    add_requests = runner.add_requests

    @functools.wraps(add_requests)
    def add(scheduled: Any) -> None:
        add_requests(scheduled)
        alive = runner.req_states.req_id_to_index
        for name in [name for name in params if name not in alive]:
            del params[name]
        params.update({each.req_id: each.sampling_params for each in scheduled.scheduled_new_reqs})

    runner.add_requests = add
    for sampler in (runner.sampler, runner.rejection_sampler):
        if sampler is not None:
            _observe_calls(sampler, runner, params, steps)


def _observe_calls(sampler: Any, runner: Any, params: dict[str, Any], steps: Steps) -> None:
    inner: Any = type(sampler)

    class Observed(inner):  # type: ignore[misc]
        """A sampler whose calls are told of."""

        def __call__(
            self, logits: Tensor, input_batch: Any, draft_logits: Tensor | None = None, *rest: Any
        ) -> Any:
            step = steps.before(
                lambda: _second_rows(input_batch, params, logits, draft_logits),
                lambda: runner.req_states.req_id_to_index,
            )
            drafts = () if draft_logits is None and not rest else (draft_logits, *rest)
            output = inner.__call__(self, logits, input_batch, *drafts)
            steps.after(step, lambda: _first_of_each(output.sampled_token_ids, output.num_sampled))
            return output

    sampler.__class__ = Observed


def _second_rows(
    batch: Any, params: dict[str, Any], logits_RV: Tensor, draft_logits: Tensor | None
) -> StepRows | None:
    """None for a batch of none of our requests: one that only warms kernels up."""
    names = list(batch.req_ids)
    if any(name not in params for name in names):
        return None
    starts = batch.cu_num_logits_np
    if int(starts[-1]) != len(logits_RV):  # verified lengths that were decided on the device
        starts = batch.cu_num_logits.cpu().numpy()
    num_drafted = (np.diff(starts) - 1).astype(np.int64)
    is_partial = batch.num_computed_prefill_tokens_np + batch.num_scheduled_tokens < batch.prefill_len_np
    chosen = [params[name] for name in names]
    return StepRows(
        names,
        chosen,
        is_partial[: len(names)].tolist(),
        num_drafted.tolist(),
        logits_RV,
        lambda: _drafted(batch, starts),
        lambda: _draft_probs(batch, num_drafted, chosen, draft_logits),
    )


def _drafted(batch: Any, starts: NDArray[np.int32]) -> NDArray[np.int32]:
    """A row's token is the one that the target has just read: each but a request's first is a draft token."""
    read = batch.input_ids[batch.logits_indices].to(torch.int32).cpu().numpy()
    is_draft = np.ones(len(read), bool)
    is_draft[starts[:-1]] = False
    return np.asarray(read[is_draft], np.int32)


def _draft_probs(
    batch: Any, num_drafted: NDArray[np.int64], params: list[Any], draft_logits_QGV: Tensor | None
) -> Tensor | None:
    """`draft_logits_QGV`: by the place of a request and its draft token, before the temperature."""
    if draft_logits_QGV is None:
        return None
    rows = []
    for place, count, each in zip(batch.idx_mapping_np, num_drafted, params, strict=False):
        logits_GV = draft_logits_QGV[int(place), : int(count)].float()
        rows.append(torch.softmax(logits_GV / (float(each.temperature) or 1.0), dim=-1))
    return torch.cat(rows)


def _first_of_each(sampled: Tensor, num_sampled: Tensor) -> list[list[int]]:
    rows, counts = sampled.cpu().tolist(), num_sampled.cpu().tolist()
    return [row[:count] for row, count in zip(rows, counts, strict=True)]
