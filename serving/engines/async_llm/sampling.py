"""Our sampling parameters as vLLM's, and what vLLM cannot promise, refused by name.

Knows vLLM's class only through its constructor's arguments.
"""

from typing import Any

from serving.engine.request import GenerationRequest, SamplingParams

MAX_LOGPROBS = 20


def vllm_arguments(
    request: GenerationRequest, eos_token_ids: tuple[int, ...], capture_key: str
) -> dict[str, Any]:
    """Keyword arguments of `vllm.SamplingParams`."""
    sampling = request.sampling
    own = {} if sampling.ignore_eos else dict.fromkeys(eos_token_ids)
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "seed": None if sampling.seed is None else sampling.seed % 2**63,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "stop_token_ids": list(dict.fromkeys((*own, *sampling.stop_token_ids))),
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.logprobs,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": dict(sampling.bias_pairs) or None,
        "allowed_token_ids": None if sampling.allowed_token_ids is None else list(sampling.allowed_token_ids),
        "extra_args": {capture_key: True} if request.capture else None,
        "detokenize": False,
    }


def check(request: GenerationRequest, *, max_seq_len: int, vocab_size: int, has_draft: bool) -> None:
    """Raises ValueError; the message names the field."""
    prompt, sampling = request.prompt_token_ids, request.sampling
    if not prompt:
        raise ValueError("prompt has 0 tokens; there is nothing to continue")
    outside = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ValueError(f"prompt holds token id {outside}, outside the vocabulary 0..{vocab_size - 1}")
    if len(prompt) + sampling.max_tokens > max_seq_len:
        raise ValueError(
            f"prompt of {len(prompt)} tokens and max_tokens={sampling.max_tokens} exceed the context of "
            f"{max_seq_len} tokens (max_seq_len); shorten one of them"
        )
    _check_ids("logit_bias", (token for token, _ in sampling.bias_pairs), vocab_size)
    _check_ids("allowed_token_ids", sampling.allowed_token_ids or (), vocab_size)
    if has_draft:
        _check_speculation(sampling)


def _check_ids(field: str, token_ids: Any, vocab_size: int) -> None:
    outside = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ValueError(f"{field} holds token id {outside}, outside the vocabulary 0..{vocab_size - 1}")


def _check_speculation(sampling: SamplingParams) -> None:
    """vLLM's speculative decoding has one draft length for all, and no min-p and no bias of logits."""
    if sampling.num_draft_tokens is not None:
        raise ValueError(
            f"num_draft_tokens={sampling.num_draft_tokens}: vLLM drafts as many tokens for all requests; "
            "leave it out"
        )
    for field, is_used in (
        ("min_p", sampling.min_p > 0.0),
        ("logit_bias", bool(sampling.logit_bias)),
    ):
        if is_used:
            raise ValueError(f"{field} is not supported by vLLM while a draft serves; leave it out")
