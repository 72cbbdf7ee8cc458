"""What a model answers by itself, greedily, in batches.

Knows nothing of training. Invariant: an answer ends with the end-of-turn token or at the limit, and holds
no padding.
"""

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MAX_ANSWER_TOKENS = 150


@torch.inference_mode()
def greedy_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    asked: list[list[int]],
    *,
    max_tokens: int = MAX_ANSWER_TOKENS,
    batch_size: int = 64,
) -> list[list[int]]:
    """Greedy continuations of prompts, in their order; prompts of like length are answered together."""
    order = sorted(range(len(asked)), key=lambda index: len(asked[index]))
    answers: list[list[int]] = [[] for _ in asked]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for index, answer in zip(
            chosen, _answer(model, tokenizer, [asked[i] for i in chosen], max_tokens), strict=True
        ):
            answers[index] = answer
    return answers


def _answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[list[int]], max_tokens: int
) -> list[list[int]]:
    padded = tokenizer.pad({"input_ids": asked}, padding_side="left", return_tensors="pt")
    output = model.generate(  # type: ignore[misc]
        **padded, do_sample=False, max_new_tokens=max_tokens
    )
    return [_cut(row, tokenizer.eos_token_id) for row in output[:, padded["input_ids"].shape[1] :].tolist()]


def _cut(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids
