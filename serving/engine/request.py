"""What goes into the engine and what comes out. Plain data, validated on construction; no tensors.

The engine never sees text: prompts and outputs are token ids. Errors are ValueErrors that name the
field, its value and the consequence.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

SamplingMode = Literal["greedy", "standard", "coupled"]
FinishReason = Literal["stop", "length", "cancelled", "error"]

"""Route of requests that have no tag and match no other route. Its draft serves every route that has none."""

MIN_TEMPERATURE = 1e-5
"""Below it logits / temperature leaves float32's range."""


class ConstraintState(Protocol):
    """Where one generation stands in its constraint. Used by one thread at a time."""

    def allowed(self, drafted: SequenceOf[int]) -> NDArray[np.uint8] | None:
        """Which ids may follow the tokens so far and `drafted`: bit `id % 8` of byte `id // 8`. None where no
        id is excluded because nothing can come of it: `drafted` breaks the constraint, or ends the text. The
        state itself does not change."""
        ...

    def advance(self, token_ids: SequenceOf[int]) -> None:
        """These tokens were emitted."""
        ...


class TokenConstraint(Protocol):
    """Decides by the output so far which ids may come next, such as those that a grammar allows."""

    def start(self) -> ConstraintState:
        """For a new generation. Must be quick: it runs where requests are submitted."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens; applies to target and draft alike.

    temperature 0 is greedy, and so is one under MIN_TEMPERATURE; top_k 0, top_p 1 and min_p 0 are off. With a
    `seed` the text depends on the seed, the prompt and the target alone (coupled sampling).
    `num_draft_tokens` caps the draft length (0: no speculation; None: the request sets no cap). `logprobs`
    asks for that many of the target's most likely tokens beside each output token (raw, temperature 1), and
    `prompt_logprobs` beside each prompt token, all of which are then computed. `max_tokens` 0 ends a request
    when its prompt is complete.

    The penalties, `logit_bias` (-inf bans an id) and `allowed_token_ids` change logits as
    `logits_processing` says, draft and target alike; a mapping given as `logit_bias` is kept as pairs. With a
    `constraint` only what it allows is drawn, after all of these; it decides alone when the text may end, so
    that `min_tokens`, `ignore_eos`, `allowed_token_ids` and a bias of -inf, which could leave nothing to
    draw, exclude it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    num_draft_tokens: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    constraint: TokenConstraint | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check("temperature", self.temperature, 0.0 <= self.temperature <= 100.0, "between 0 and 100")
        _check("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 (off) or positive, under 2**31")
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "between 0 and 1")
        _check("max_tokens", self.max_tokens, self.max_tokens >= 0, "0 (the prompt alone) or positive")
        _check(
            "min_tokens", self.min_tokens, 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"
        )
        for name in ("logprobs", "prompt_logprobs"):
            num_top = getattr(self, name)
            _check(name, num_top, num_top is None or 0 <= num_top <= 20, "0 to 20")
        drafted = self.num_draft_tokens
        _check("num_draft_tokens", drafted, drafted is None or drafted >= 0, "0 (off) or positive")
        if self.seed is not None:
            _check("seed", self.seed, -(2**63) <= self.seed < 2**64, "an integer of at most 64 bits")
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        self._check_processing()

    def _check_processing(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            penalty = getattr(self, name)
            _check(name, penalty, -2.0 <= penalty <= 2.0, "between -2 and 2")
        repetition = self.repetition_penalty
        _check("repetition_penalty", repetition, 0.01 <= repetition <= 100.0, "between 0.01 and 100")
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        allowed = self.allowed_token_ids
        if allowed is not None:
            _check("allowed_token_ids", allowed, bool(allowed), "one id or more, or there is nothing to draw")
            object.__setattr__(self, "allowed_token_ids", tuple(sorted(set(allowed))))
        if self.constraint is not None:
            self._check_constraint()

    def _check_constraint(self) -> None:
        for name, is_used in (
            ("min_tokens", self.min_tokens > 0),
            ("ignore_eos", self.ignore_eos),
            ("allowed_token_ids", self.allowed_token_ids is not None),
            ("logit_bias", any(math.isinf(bias) for _, bias in self.bias_pairs)),
        ):
            if is_used:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} excludes structured output, which decides alone what "
                    "may follow; leave one of them out"
                )

    @property
    def bias_pairs(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias`, ordered by token id."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    @property
    def biases_logits(self) -> bool:
        return bool(self.logit_bias) or self.allowed_token_ids is not None

    @property
    def penalises(self) -> bool:
        neutral = (0.0, 0.0, 1.0)
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != neutral

    @property
    def context_dependent(self) -> bool:
        """Whether the distribution at a position is more than temperature, top-k, top-p and min-p of its
        logits."""
        return self.min_tokens > 0 or self.biases_logits or self.penalises or self.constraint is not None

    @property
    def mode(self) -> SamplingMode:
        if self.temperature == 0.0:
            return "greedy"
        return "standard" if self.seed is None else "coupled"


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name}={value!r} must be {expected}; the request was not started")


def _bias_pairs(
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...],
) -> tuple[tuple[int, float], ...]:
    pairs = logit_bias.items() if isinstance(logit_bias, Mapping) else logit_bias
    biases = {int(token): float(bias) for token, bias in pairs}
    for token, bias in biases.items():
        if not (-100.0 <= bias <= 100.0 or bias == -math.inf):
            raise ValueError(
                f"logit_bias of token id {token} is {bias!r}; it must be -inf or between -100 and 100"
            )
    return tuple(sorted(biases.items()))


@dataclass(frozen=True)
class GenerationRequest:
    """One generation to run: `n` choices of an API request are `n` of these."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    choice_index: int = 0
    route: str | None = None
    """None: the engine's router sets it when prefill ends; `default` without a router."""
    capture: bool = False
    """Keep the target's log-probabilities at every verified position, for the recorder."""
    tenant: str | None = None
    """Who asks. Those who ask share the slots fairly, whatever each has waiting; see `scheduler`."""
    cache_salt: str | None = None
    """Prefixes are shared only among requests of the same salt."""


def check_fit(request: GenerationRequest, *, max_seq_len: int, vocab_size: int) -> None:
    """Raises ValueError for a prompt that cannot run in this context; the message names the field."""
    prompt, max_tokens = request.prompt_token_ids, request.sampling.max_tokens
    if not prompt:
        raise ValueError("prompt has 0 tokens; there is nothing to continue")
    outside = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ValueError(f"prompt holds token id {outside}, outside the vocabulary 0..{vocab_size - 1}")
    if len(prompt) + max_tokens > max_seq_len:
        raise ValueError(
            f"prompt of {len(prompt)} tokens and max_tokens={max_tokens} exceed the context of "
            f"{max_seq_len} tokens (max_seq_len); shorten one of them"
        )


def ending_ids(sampling: SamplingParams, eos_token_ids: Iterable[int], vocab_size: int) -> frozenset[int]:
    """Token ids that end the text; ids that the target cannot emit are left out."""
    ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
    return frozenset(token for token in ends if 0 <= token < vocab_size)


@dataclass(frozen=True)
class VersionSpan:
    """`draft_version` proposed for output positions start (inclusive) to end (exclusive)."""

    draft_version: int
    start: int
    end: int


TopLogprobs = tuple[tuple[int, float], ...]
"""(token id, raw log-probability at temperature 1), most likely first."""


@dataclass(frozen=True, eq=False)
class PromptLogprobs:
    """Raw target log-probabilities at temperature 1 of the T prompt tokens behind the first, each given those
    before it."""

    logprobs_T: NDArray[np.float32]
    ranks_T: NDArray[np.int64]
    """1: no token was more likely."""
    top_token_ids_TK: NDArray[np.int64]
    """The most likely tokens in place of each, likeliest first."""
    top_logprobs_TK: NDArray[np.float32]

    @classmethod
    def empty(cls, num_top: int) -> "PromptLogprobs":
        """Of a prompt of one token."""
        top_TK = np.zeros((0, num_top), np.int64)
        return cls(np.zeros(0, np.float32), np.zeros(0, np.int64), top_TK, top_TK.astype(np.float32))

    def top_logprobs(self, count: int) -> list[TopLogprobs]:
        """One entry a token, of at most `count`."""
        ids, logprobs = self.top_token_ids_TK[:, :count].tolist(), self.top_logprobs_TK[:, :count].tolist()
        return [tuple(zip(*row, strict=True)) for row in zip(ids, logprobs, strict=True)]


@dataclass(frozen=True)
class TokenEvent:
    """What one round added to a generation. The last event carries the whole `generation`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Raw target log-probability at temperature 1 of each token."""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """One entry a token if the request asked for logprobs, else empty."""
    generation: "Generation | None" = None
    """Set on the last event only."""
    prompt_logprobs: PromptLogprobs | None = None
    """Set on the first event only, if the request asked for them."""


def captured_round_bytes(num_positions: int, num_kept: int) -> int:
    """Upper bound on the bytes of a captured round with so many verified positions and kept entries at
    each."""
    objects = 1_400  # seven array objects and the dataclass
    return objects + num_positions * (num_kept * (4 + 2) + 5 * 4)


@dataclass(eq=False)
class CapturedRound:
    """The contents of a buffer RoundTrace; same fields and legend, see there."""

    start: int
    drafter_id: str
    draft_route: str | None
    draft_version: int | None
    num_accepted: int
    num_attempted: int
    drafted_token_ids_G: NDArray[np.int32]
    drafted_target_logprobs_G: NDArray[np.float32]
    drafted_draft_logprobs_G: NDArray[np.float32]
    emitted_target_logprobs_C: NDArray[np.float32]
    topk_token_ids_EK: NDArray[np.int32]
    topk_logprobs_EK: NDArray[np.float16]
    retemper_E: NDArray[np.float32]

    @property
    def num_bytes(self) -> int:
        """Upper bound on its bytes, including its Python objects."""
        return captured_round_bytes(*self.topk_token_ids_EK.shape)


@dataclass(eq=False)
class Generation:
    """A finished (or cancelled) generation. `output_token_ids` includes the stop token that ended it."""

    request_id: str
    choice_index: int
    route: str
    sampling: SamplingParams
    prompt_token_ids: tuple[int, ...]
    output_token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float]
    """Raw target log-probability at temperature 1 of each output token."""
    top_logprobs: list[TopLogprobs]
    num_rounds: int
    num_drafted: int
    num_attempted: int
    num_accepted: int
    draft_versions: list[VersionSpan]
    accepted_histogram: list[int]
    """[i]: rounds that accepted exactly i draft tokens."""
    queued_s: float = 0.0
    """Seconds from submission to a slot."""
    num_prompt_tokens_reused: int = 0
    """Prompt tokens whose keys and values were copied from the prefix cache."""
    stop_token_id: int | None = None
    """The end-of-text or stop id that ended it, if any."""
    error: str = ""
    captured_rounds: list[CapturedRound] = field(default_factory=list)
    """Empty unless the request asked for capture."""
    prompt_embedding_H: NDArray[np.float16] | None = None
    """Mean hidden state of the prompt; None if it was not needed or could not be computed."""
    prompt_logprobs: PromptLogprobs | None = None
    """None unless the request asked for them and its prefill came to an end."""


EventCallback = Callable[[TokenEvent], Any]
"""Called on the engine thread; must not block and must not raise."""
