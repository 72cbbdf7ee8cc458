"""Our sampling parameters as vLLM's, and what vLLM cannot promise, refused by name.

Knows vLLM's class only through its constructor's arguments.
"""

import json
from collections.abc import Collection
from typing import Any

from serving.engine.request import GenerationRequest, SamplingParams, TokenConstraint
from serving.structured_output import CompiledGrammar

MAX_LOGPROBS = 20


def vllm_arguments(
    request: GenerationRequest, stop_token_ids: Collection[int], capture_key: str
) -> dict[str, Any]:
    """Keyword arguments of `vllm.SamplingParams`. `stop_token_ids`: all that end the text. vLLM draws a token
    in any case; RunningGeneration drops the one of a request for none."""
    sampling = request.sampling
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "seed": None if sampling.seed is None else sampling.seed % 2**63,
        "max_tokens": max(1, sampling.max_tokens),
        "min_tokens": sampling.min_tokens,
        "stop_token_ids": sorted(stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.logprobs,
        "prompt_logprobs": sampling.prompt_logprobs,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": dict(sampling.bias_pairs) or None,
        "allowed_token_ids": None if sampling.allowed_token_ids is None else list(sampling.allowed_token_ids),
        "extra_args": {capture_key: True} if request.capture else None,
        "detokenize": False,
        "structured_outputs": _form(sampling.constraint),
    }


def _form(constraint: TokenConstraint | None) -> dict[str, Any] | None:
    """Keyword arguments of `vllm.StructuredOutputsParams`. Raises ValueError for a constraint that is no
    grammar."""
    if constraint is None:
        return None
    if not isinstance(constraint, CompiledGrammar):
        raise ValueError(f"constraint={constraint!r} is no compiled grammar, which is what vLLM can be told")
    asked = constraint.asked
    if asked.kind == "choice":
        return {"choice": json.loads(asked.text)}
    if asked.kind == "json":
        return {"json": asked.schema_text()}
    return {asked.kind: asked.text}


def from_vllm(params: Any) -> SamplingParams:
    """The other way: a request that somebody else gave vLLM. Raises ValueError for what we cannot say."""
    if getattr(params, "structured_outputs", None) is not None:
        raise ValueError(
            "structured_outputs: vLLM's log-probabilities are then those of allowed tokens alone"
        )
    return SamplingParams(
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        max_tokens=params.max_tokens or 1 << 20,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias or (),
        allowed_token_ids=params.allowed_token_ids,
    )


def check_speculation(sampling: SamplingParams) -> None:
    """Raises ValueError: while a draft serves vLLM has one draft length for all, no min-p and no bias."""
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
