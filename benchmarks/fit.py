"""What a part of a target guesses before any learning: as its layers are, and after the fit of its start.

The target answers prompts by itself, greedily; a part is right at a position of an answer where its likeliest
token is the target's, which is the acceptance of a greedy draft there.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from benchmarks.prompts import demo_prompts, folder_prompts
from deploy.demo.question_rows import check_folder
from serving.engine import SamplingParams
from serving.local import build_engine
from serving.models.loading import ModelPair
from serving.models.part_fit import fitted
from serving.models.target_part import TargetPart
from serving.options import EngineOptions

PROMPT_TOKENS = 192
"""Longer prompts are cut from the left."""


def measure(
    pair: ModelPair,
    prompts: Iterator[list[int]],
    *,
    exit_layers: list[int],
    num_prompts: int,
    max_tokens: int,
) -> dict[str, Any]:
    """By part: the share of the target's tokens that it guesses, before and after the fit. `pair`: a target
    without a draft."""
    asked = [prompt[-PROMPT_TOKENS:] for prompt in islice(prompts, num_prompts)]
    answers = _answers(pair, asked, max_tokens)
    num_tokens = sum(map(len, answers))
    rows: dict[str, Any] = {}
    for exit_layer in exit_layers:
        part = TargetPart(exit_layer)
        module = part.build(pair.target)
        before = _hits(module, asked, answers)
        fitted(module, pair.target, pair.tokenizer, part.revision(pair.target_revision))
        after = _hits(module, asked, answers)
        rows[str(part)] = {
            "layers": exit_layer + 1,
            "acceptance_before": before / num_tokens,
            "acceptance_after": after / num_tokens,
        }
    return {"num_prompts": len(asked), "num_tokens": num_tokens, "parts": rows}


def prompts_for(pair: ModelPair, data: Any) -> Iterator[list[int]]:
    """Real prompts of a folder, by the chat template if there is one; None: the demo's."""
    if data is None:
        return demo_prompts(pair.tokenizer, 0)
    check_folder(data)
    return folder_prompts(pair.tokenizer, data, 0)


def _answers(pair: ModelPair, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    options = EngineOptions(
        num_slots=8, max_seq_len=PROMPT_TOKENS + max_tokens, speculation="off", prefix_cache_mib=0
    )
    with build_engine(pair, options) as engine:
        found = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens))
    return [generation.output_token_ids for generation in found]


@torch.inference_mode()
def _hits(part: nn.Module, prompts: list[list[int]], answers: list[list[int]]) -> int:
    hits = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        logits_1TV = part(
            input_ids=torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False, logits_to_keep=len(answer)
        ).logits
        hits += int((logits_1TV[0].argmax(-1) == torch.tensor(answer)).sum())
    return hits
