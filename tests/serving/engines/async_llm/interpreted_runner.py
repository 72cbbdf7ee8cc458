"""vLLM's second model runner as far as a processor runs it: its own samplers, request states and batch, with
Triton's kernels interpreted. Run as a program in vLLM's environment; prints what was reported and what is
true as one line of JSON.

Two requests verify drafts of three and two tokens (one greedy, one sampled, recorded), a third is sampled and
not recorded, and a fourth has read half of its prompt.
"""
# ruff: noqa: E402 - what is imported reads what was set before it

import json
import os
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import triton.backends

# vLLM for processors runs the second runner with a Triton that compiles for them; interpreted, none has to.
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.worker.gpu import buffer_utils

buffer_utils.is_uva_available = lambda: False

from vllm.triton_utils import tl
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

# Two things that cannot be interpreted: a kernel that vLLM has in torch as well, and a device's own log1p.
topk_topp_sampler.apply_top_k_top_p_triton = topk_topp_sampler.apply_top_k_top_p_pytorch
rejection_sampler_utils.tldevice = SimpleNamespace(log1p=lambda x: tl.log(1.0 + x))

from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as FirstRunner

from serving.engines.async_llm.step_messages import StepMessage
from serving.engines.async_llm.worker import CAPTURE, EverdraftWorker

VOCAB, DRAFTS = 40, 3
PROMPT = [1, 2, 3, 4, 5, 6]
RECORDED = {"extra_args": {CAPTURE: True}}
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, **RECORDED),
    "sampled": SamplingParams(temperature=0.7, top_p=0.8, seed=3, **RECORDED),
    "apart": SamplingParams(temperature=1.0, seed=4),
    "reading": SamplingParams(temperature=0.0, **RECORDED),
}


class Runner:
    """What of the second runner surrounds its samplers."""

    def __init__(self) -> None:
        cpu = torch.device("cpu")
        self.req_states = RequestState(8, 64, 64, DRAFTS, VOCAB, cpu)
        config: Any = SimpleNamespace(reasoning_config=None)
        self.sampler = Sampler(config, 8, VOCAB, cpu, self.req_states, num_speculative_tokens=DRAFTS + 1)
        speculative: Any = SimpleNamespace(
            num_speculative_tokens=DRAFTS,
            enable_adaptive_verification=False,
            rejection_sample_method="standard",
        )
        self.rejection_sampler = RejectionSampler(self.sampler, speculative, cpu)
        self.draft_logits = torch.randn(8, DRAFTS, VOCAB)

    def add_requests(self, scheduled: Any) -> None:
        for each in scheduled.scheduled_new_reqs:
            self.req_states.add_request(each.req_id, len(PROMPT), PROMPT, 0, 16)
            self.sampler.add_request(self.req_states.req_id_to_index[each.req_id], each.sampling_params)
        self.req_states.apply_staged_writes()
        self.sampler.apply_staged_writes()

    def sample(self, logits: Tensor, batch: InputBatch) -> Any:
        if batch.num_draft_tokens == 0:
            return self.sampler(logits, batch)
        return self.rejection_sampler(logits, batch, self.draft_logits, None)


def batch_of(
    runner: Runner, drafted: dict[str, list[int]], read: dict[str, int], is_prefill: bool
) -> InputBatch:
    """`read`: prompt and answer tokens that the target has seen after this step, by request."""
    names = list(read)
    places = np.array([runner.req_states.req_id_to_index[name] for name in names])
    counts = np.array([1 + len(drafted.get(name, [])) for name in names])
    scheduled = np.array([read[name] for name in names]) if is_prefill else counts
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    queries = np.concatenate([[0], np.cumsum(scheduled)]).astype(np.int32)
    tokens: list[int] = []
    for name, count in zip(names, scheduled, strict=True):
        tokens += PROMPT[:count] if is_prefill else [7, *drafted.get(name, [])]
    rows = [queries[i + 1] - counts[i] + j for i in range(len(names)) for j in range(counts[i])]
    lengths = np.array([read[name] for name in names], np.int32)
    positions = [lengths[i] - scheduled[i] + j for i in range(len(names)) for j in range(scheduled[i])]
    computed = np.zeros(len(names), np.int32) if is_prefill else lengths - scheduled
    prefilled = np.minimum(computed, len(PROMPT))
    return InputBatch(
        req_ids=names,
        num_reqs=len(names),
        num_reqs_after_padding=len(names),
        idx_mapping=torch.from_numpy(places),
        idx_mapping_np=places,
        expanded_idx_mapping=torch.from_numpy(places.repeat(counts)),
        expanded_local_pos=torch.cat([torch.arange(count, dtype=torch.int32) for count in counts]),
        num_scheduled_tokens=scheduled,
        num_tokens=len(tokens),
        num_tokens_after_padding=len(tokens),
        num_draft_tokens=int(counts.sum() - len(names)),
        num_draft_tokens_per_req=counts - 1,
        query_start_loc=torch.from_numpy(queries),
        query_start_loc_np=queries,
        seq_lens=torch.from_numpy(lengths),
        seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
        dcp_local_seq_lens=None,
        num_computed_tokens_np=computed,
        prefill_len_np=np.full(len(names), len(PROMPT), np.int32),
        num_computed_prefill_tokens_np=prefilled,
        is_prefilling_np=prefilled < len(PROMPT),
        has_prefill=is_prefill,
        decode_graph_eligible=not is_prefill,
        input_ids=torch.tensor(tokens, dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int64),
        is_padding=torch.zeros(len(tokens), dtype=torch.bool),
        logits_indices=torch.tensor(rows, dtype=torch.int64),
        cu_num_logits=torch.from_numpy(starts),
        cu_num_logits_np=starts,
        has_structured_output_reqs=False,
        prompt_lens=None,
    )


def message_of(message: StepMessage) -> dict[str, Any]:
    captured = message.captured
    arrays = None if captured is None else {name: value.tolist() for name, value in vars(captured).items()}
    return {
        "request": message.request_id,
        "version": message.draft_version,
        "num_drafted": message.num_drafted,
        "emitted": message.emitted,
        "captured": arrays,
    }


class Worker(EverdraftWorker):
    def __init__(self, runner: Runner) -> None:
        self.model_runner, self.vllm_config, self.rank = runner, None, 0


def main() -> None:
    torch.manual_seed(0)
    runner, messages = Runner(), list[StepMessage]()
    worker = Worker(runner)
    worker.everdraft_begin(messages.append, lambda _, params: bool(params.extra_args), "")
    new = [SimpleNamespace(req_id=name, sampling_params=params) for name, params in PARAMS.items()]
    runner.add_requests(SimpleNamespace(scheduled_new_reqs=new))
    length = len(PROMPT)
    first = torch.randn(4, VOCAB)
    prompts = {"greedy": length, "sampled": length, "apart": length, "reading": length // 2}
    outputs = [runner.sample(first.clone(), batch_of(runner, {}, prompts, True))]
    worker._everdraft.draft_version = 5
    second = 2.0 * torch.randn(8, VOCAB)
    drafted = {"greedy": [int(second[0].argmax()), 11, 12], "sampled": [21, 22], "apart": []}
    read = {name: length + 1 + len(tokens) for name, tokens in drafted.items()}
    outputs.append(runner.sample(second.clone(), batch_of(runner, drafted, read, False)))
    place = runner.req_states.req_id_to_index["sampled"]
    print(
        json.dumps(
            {
                "draws_in__sample": [hasattr(kind, "_sample") for kind in (FirstRunner, SecondRunner)],
                "has_add_requests": hasattr(SecondRunner, "add_requests"),
                "messages": [message_of(each) for each in messages],
                "sampled": [output.sampled_token_ids.tolist() for output in outputs],
                "num_sampled": [output.num_sampled.tolist() for output in outputs],
                "drafted": drafted,
                "logits": second.tolist(),
                "draft_logits": runner.draft_logits[place].tolist(),
            }
        )
    )


if __name__ == "__main__":
    main()
