"""Fields of OpenAI's and vLLM's requests that have no effect here: refused, or harmless.

Invariant: a field is in HARMLESS only if no value of it could change the tokens of an answer.
"""

from collections.abc import Mapping
from typing import Any

HARMLESS = frozenset(
    "cache_salt include_obfuscation parallel_tool_calls prediction priority prompt_cache_key "
    "prompt_cache_retention request_id safety_identifier service_tier spaces_between_special_tokens".split()
)
"""Fields for scheduling, billing and bookkeeping; `prediction` is a hint for speed, `parallel_tool_calls`
needs tools."""

MESSAGE_METADATA = frozenset("annotations cache_control id provider_specific_fields".split())
"""What clients keep beside a message or a part of its content, and send back; no chat template knows it."""

NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "length_penalty": (1, 1.0),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "tool_calls": ([],),
    "modalities": (["text"],),
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "include": ([],),
    "truncation": ("disabled",),
    "reasoning": (),
    "max_tool_calls": (),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "logits_processors": ([],),
    "chat_template": (),
    "documents": ([],),
    "continuous_usage_stats": (False,),
    "typical_p": (1, 1.0),
    "extra_args": ({},),
    "vllm_xargs": ({},),
    "kv_transfer_params": (),
}
"""Fields that are refused, except with these values, which ask for nothing."""

RENAMED: Mapping[str, str] = {
    "guided_json": "structured_outputs",
    "guided_regex": "structured_outputs",
    "guided_choice": "structured_outputs",
    "guided_grammar": "structured_outputs",
}
"""Names of vLLM's earlier releases, and what they are called now."""
