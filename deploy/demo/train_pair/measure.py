"""What the written pair is like: cost of a pass, and how often the draft guesses the target's greedy token.

Knows nothing of training. Invariant: measured in float32 on held-out prompts only.

B sequences, T tokens.
"""

import statistics
import time
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from deploy.demo.corpus import DOMAINS, Prompt, prompts
from deploy.demo.train_pair.answers import greedy_answers
from deploy.demo.train_pair.tokens import prompt_ids

CONTEXT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class DomainMeasure:
    """Held-out prompts: greedy agreement of the draft, the first prompt and the target's answer."""

    acceptance_rate: float
    num_tokens: int
    prompt: Prompt
    answer: str


@torch.inference_mode()
def pass_seconds(model: LlamaForCausalLM, *, num_threads: int, num_passes: int = 100) -> float:
    """Median seconds of an eager forward of one token at batch 1 over a KV cache of `CONTEXT_TOKENS`."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    cache = DynamicCache(config=model.config)
    model(torch.ones(1, CONTEXT_TOKENS, dtype=torch.long), past_key_values=cache)
    seconds = []
    for _ in range(num_passes):
        started = time.perf_counter()
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        seconds.append(time.perf_counter() - started)
        cache.crop(-1)
    torch.set_num_threads(before)
    return statistics.median(seconds)


def measure_domains(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_prompts: int = 64,
) -> dict[str, DomainMeasure]:
    """Greedy answers of the target to held-out prompts, and the draft's agreement with them, by domain."""
    measured = {}
    for domain in DOMAINS:
        chosen = list(islice(prompts(domain, "heldout", seed=1), num_prompts))
        asked = [prompt_ids(tokenizer, prompt) for prompt in chosen]
        answers = greedy_answers(target, tokenizer, asked)
        hits = sum(greedy_hits(draft, *pair) for pair in zip(asked, answers, strict=True))
        total = sum(map(len, answers))
        text = str(tokenizer.decode(answers[0], skip_special_tokens=True))
        measured[domain] = DomainMeasure(hits / total, total, chosen[0], text)
    return measured


@torch.inference_mode()
def greedy_hits(draft: LlamaForCausalLM, asked: list[int], answer: list[int]) -> int:
    """How many of the answer's tokens the draft puts first, each given all the true tokens before it."""
    logits_BTV = draft(torch.tensor([asked + answer])).logits
    guessed = logits_BTV[0, len(asked) - 1 : -1].argmax(-1)
    return int((guessed == torch.tensor(answer)).sum())
