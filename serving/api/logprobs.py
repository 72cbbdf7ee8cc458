"""Log-probabilities in OpenAI's two shapes, and those of a prompt in vLLM's. Raw, at temperature 1."""

import codecs
from collections.abc import Sequence

from serving.api.choices import ChoiceDelta
from serving.api.response_schema import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobsByToken,
    TokenLogprob,
)
from serving.api.token_codec import TokenCodec
from serving.engine.request import PromptLogprobs, TopLogprobs

_LEAST = -9999.0
"""JSON has no infinity; this is the value that clients know for it."""


def completion_logprobs(codec: TokenCodec, delta: ChoiceDelta, echo: str = "") -> CompletionLogprobs:
    """The chosen token is always among its top ones. Of tokens with equal text the likelier is shown. `echo`:
    the text before the output."""
    entries = zip(delta.token_ids, delta.logprobs, delta.top_logprobs, strict=True)
    return CompletionLogprobs(
        tokens=[codec.token_text(token_id) for token_id in delta.token_ids],
        token_logprobs=[_finite(value) for value in delta.logprobs],
        top_logprobs=[_by_text(codec, (*top, (token_id, value))) for token_id, value, top in entries],
        text_offset=[len(echo) + offset for offset in delta.text_offsets],
    )


def echoed_logprobs(
    codec: TokenCodec, prompt: Sequence[int], echo: str, found: PromptLogprobs, num_top: int
) -> CompletionLogprobs:
    """Those of a prompt's tokens, as of an output's; null for the first. `echo`: the prompt's text."""
    logprobs = found.logprobs_T.tolist()
    entries = zip(prompt[1:], logprobs, found.top_logprobs(num_top), strict=True)
    return CompletionLogprobs(
        tokens=[codec.token_text(token_id) for token_id in prompt],
        token_logprobs=[None, *(_finite(value) for value in logprobs)],
        top_logprobs=[
            None,
            *(_by_text(codec, (*top, (token_id, value))) for token_id, value, top in entries),
        ],
        text_offset=_prompt_offsets(codec, prompt, echo),
    )


def joined(first: CompletionLogprobs, then: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=first.tokens + then.tokens,
        token_logprobs=first.token_logprobs + then.token_logprobs,
        top_logprobs=first.top_logprobs + then.top_logprobs,
        text_offset=first.text_offset + then.text_offset,
    )


def prompt_logprobs(
    codec: TokenCodec, prompt: Sequence[int], found: PromptLogprobs, num_top: int
) -> PromptLogprobsByToken:
    """In vLLM's shape: the token of the prompt first, the most likely ones behind it."""
    entries: PromptLogprobsByToken = [None]
    own = zip(prompt[1:], found.logprobs_T.tolist(), found.ranks_T.tolist(), strict=True)
    for (token_id, logprob, rank), top in zip(own, found.top_logprobs(num_top), strict=True):
        entry = {token_id: _ranked(codec, token_id, logprob, rank)}
        for number, (other, value) in enumerate(top, start=1):
            entry.setdefault(other, _ranked(codec, other, value, number))
        entries.append(entry)
    return entries


def chat_logprobs(codec: TokenCodec, delta: ChoiceDelta) -> ChatLogprobs:
    entries = zip(delta.token_ids, delta.logprobs, delta.top_logprobs, strict=True)
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                **_token(codec, token_id, value).model_dump(),
                top_logprobs=[_token(codec, other, logprob) for other, logprob in top],
            )
            for token_id, value, top in entries
        ]
    )


def _token(codec: TokenCodec, token_id: int, logprob: float) -> TokenLogprob:
    return TokenLogprob(
        token=codec.token_text(token_id), logprob=_finite(logprob), bytes=list(codec.raw_bytes(token_id))
    )


def _ranked(codec: TokenCodec, token_id: int, logprob: float, rank: int) -> PromptLogprob:
    return PromptLogprob(logprob=_finite(logprob), rank=rank, decoded_token=codec.token_text(token_id))


def _prompt_offsets(codec: TokenCodec, prompt: Sequence[int], echo: str) -> list[int]:
    """Characters of the echoed prompt before each token. What a tokenizer puts before a text, a special token
    or a space, is no part of it."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    offsets, at = list[int](), 0
    for token_id in prompt:
        offsets.append(at)
        spelled = codec.raw_bytes(token_id).decode(errors="replace")
        if codec.text_bytes(token_id) or echo.startswith(spelled, at):
            text = utf8.decode(codec.raw_bytes(token_id))
            if at == 0 and not echo.startswith(" "):
                text = text.removeprefix(" ")
            at = min(at + len(text), len(echo))
    return offsets


def _by_text(codec: TokenCodec, top: TopLogprobs) -> dict[str, float]:
    named: dict[str, float] = {}
    for token_id, logprob in top:
        named.setdefault(codec.token_text(token_id), _finite(logprob))
    return named


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
