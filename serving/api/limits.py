"""Bounds on a single request, which hold however idle the replica is.

`admission` bounds all waiting requests together. Without the bounds here, one body of a few kilobytes could
queue thousands of generations, and everybody else would be refused. Knows sizes only; they are checked before
anything is tokenised at length, planned or queued.
"""

from dataclasses import dataclass

from serving.api.errors import ApiError, bad_request

_BODY_BYTES_PER_TOKEN = 16
"""A token id takes at most 12 characters of JSON, a token of text about as many where all is escaped."""
_SPARE_BODY_BYTES = 64 * 2**10
"""Bytes for everything but the prompt."""


@dataclass(frozen=True)
class RequestLimits:
    """Bounds of one request; over any of them the answer is 400, and 413 for the body."""

    max_generations: int
    max_prompt_tokens: int
    """A prompt counts once for each of its generations."""

    @property
    def max_body_bytes(self) -> int:
        return _SPARE_BODY_BYTES + _BODY_BYTES_PER_TOKEN * self.max_prompt_tokens

    def check_generations(self, num_prompts: int, n: int, max_concurrent: int | None = None) -> None:
        """Raises ApiError naming `prompt` where that many prompts alone are too many, else `n`.
        `max_concurrent`: of the request's tenant."""
        most, bound = self.max_generations, "max_generations_per_request"
        if max_concurrent is not None and max_concurrent < most:
            most, bound = max_concurrent, "max_concurrent"
        if num_prompts * n <= most:
            return
        param = "prompt" if num_prompts > most else "n"
        raise bad_request(
            f"{param}: {num_prompts} prompts times n={n} are {num_prompts * n} generations; one request may "
            f"ask for at most {most} ({bound}). Nothing was started.",
            param,
        )

    def check_prompt_tokens(self, num_tokens: int, n: int, param: str) -> None:
        """`num_tokens` is the sum over all prompts. Raises ApiError naming `param`."""
        if num_tokens * n > self.max_prompt_tokens:
            raise bad_request(
                f"{param}: {num_tokens} tokens of prompts times n={n} are {num_tokens * n}; one request may "
                f"bring at most {self.max_prompt_tokens} (a quarter of max_queued_prompt_tokens, or one "
                "context). Nothing was started.",
                param,
            )

    def check_tokens(self, num_tokens: int) -> None:
        """Bound of `/detokenize`. Raises ApiError."""
        if num_tokens > self.max_prompt_tokens:
            raise bad_request(
                f"tokens has {num_tokens} ids; at most {self.max_prompt_tokens} are decoded at once", "tokens"
            )

    def body_too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The body is larger than {self.max_body_bytes} bytes, which hold the {self.max_prompt_tokens} "
            "prompt tokens that one request may bring (a quarter of max_queued_prompt_tokens, or one "
            "context). It was not read.",
        )
