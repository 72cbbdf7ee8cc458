"""Log-probabilities of a delta in the two shapes that OpenAI has for them. Raw, at temperature 1."""

from serving.api.choices import ChoiceDelta
from serving.api.response_schema import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TokenLogprob
from serving.api.token_codec import TokenCodec
from serving.engine.request import TopLogprobs

_LEAST = -9999.0
"""JSON has no infinity; this is the value that clients know for it."""


def completion_logprobs(codec: TokenCodec, delta: ChoiceDelta) -> CompletionLogprobs:
    """The chosen token is always among its top ones. Of tokens with equal text the likelier is shown."""
    entries = zip(delta.token_ids, delta.logprobs, delta.top_logprobs, strict=True)
    return CompletionLogprobs(
        tokens=[codec.token_text(token_id) for token_id in delta.token_ids],
        token_logprobs=[_finite(value) for value in delta.logprobs],
        top_logprobs=[_by_text(codec, (*top, (token_id, value))) for token_id, value, top in entries],
        text_offset=list(delta.text_offsets),
    )


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


def _by_text(codec: TokenCodec, top: TopLogprobs) -> dict[str, float]:
    named: dict[str, float] = {}
    for token_id, logprob in top:
        named.setdefault(codec.token_text(token_id), _finite(logprob))
    return named


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
