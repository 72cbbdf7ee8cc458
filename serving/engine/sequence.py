"""The state of one running generation, and a batch of them as a round sees it."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from buffer.names import DEFAULT_ROUTE
from serving.engine.acceptance_estimate import SequenceEstimate
from serving.engine.logits_processing import LogitsProcessing, RowContext
from serving.engine.noise import noise_key
from serving.engine.passes.transfer import to_device
from serving.engine.request import (
    CapturedRound,
    EventCallback,
    FinishReason,
    Generation,
    GenerationRequest,
    PromptLogprobs,
    TopLogprobs,
    VersionSpan,
)
from serving.engine.sampling import SamplingMetadata


@dataclass(frozen=True)
class Advance:
    """What one round did to one sequence."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    num_drafted: int = 0
    num_attempted: int = 0
    num_accepted: int = 0
    num_matched: int = 0
    """As in `Proposal.num_matched_B`."""


NO_ADVANCE = Advance()


@dataclass(eq=False)
class Sequence:
    """Tokens, lengths and counters of one generation.

    Invariant between rounds: the target has cached all tokens but the last (`num_cached = n - 1`).
    """

    request: GenerationRequest
    stop_ids: frozenset[int]
    on_event: EventCallback
    token_ids: list[int] = field(init=False)
    """Prompt and output."""
    route: str = field(init=False)
    """The request's own route, or the one that the router chose once prefill has ended."""
    prompt_embedding_H: NDArray[np.float16] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    submitted_at_s: float = field(default_factory=time.perf_counter)
    queued_s: float = 0.0
    num_cached: int = 0
    """Columns of the target's slot that hold this sequence's tokens."""
    num_reused: int = 0
    """Prompt columns among them that were copied instead of computed."""
    estimate: SequenceEstimate = field(default_factory=SequenceEstimate)
    drafts_next: bool = True
    """False in the round after one whose drafts may have made the target's logits not finite."""
    last_advance: Advance = NO_ADVANCE
    """What the last round added, until it is delivered."""
    has_delivered: bool = False
    """Whether its caller got an event yet."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str = ""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    num_rounds: int = 0
    num_drafted: int = 0
    num_attempted: int = 0
    num_accepted: int = 0
    draft_versions: list[VersionSpan] = field(default_factory=list)
    accepted_histogram: list[int] = field(default_factory=list)
    captured_rounds: list[CapturedRound] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.prompt_len = len(self.token_ids)
        self.route = self.request.route or DEFAULT_ROUTE
        sampling = self.request.sampling
        self.noise_key = (
            noise_key(sampling.seed, self.request.choice_index) if sampling.seed is not None else 0
        )
        self.constraint = None if sampling.constraint is None else sampling.constraint.start()

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_remaining(self) -> int:
        """Tokens the request may still emit."""
        return self.request.sampling.max_tokens - self.num_output

    def max_draft_tokens(self, limit: int) -> int:
        """Largest draft length of the next round: never past what a round could still emit."""
        cap = self.request.sampling.num_draft_tokens if self.drafts_next else 0
        return max(0, min(limit, self.num_remaining - 1, limit if cap is None else cap))

    def count(self, advance: Advance, draft_version: int) -> None:
        """Add a round's counters and log-probabilities, after its tokens were appended."""
        self.num_rounds += 1
        self.num_drafted += advance.num_drafted
        self.num_attempted += advance.num_attempted
        self.num_accepted += advance.num_accepted
        self.accepted_histogram.extend([0] * (advance.num_accepted + 1 - len(self.accepted_histogram)))
        self.accepted_histogram[advance.num_accepted] += 1
        self.logprobs.extend(advance.logprobs)
        self.top_logprobs.extend(advance.top_logprobs)
        start = self.num_output - len(advance.token_ids)
        if self.draft_versions and self.draft_versions[-1].draft_version == draft_version:
            start = self.draft_versions.pop().start
        self.draft_versions.append(VersionSpan(draft_version, start, self.num_output))

    def generation(self) -> Generation:
        """The generation for the caller; call once, at the end."""
        assert self.finish_reason is not None
        return Generation(
            request_id=self.request.request_id,
            choice_index=self.request.choice_index,
            route=self.route,
            sampling=self.request.sampling,
            prompt_token_ids=self.request.prompt_token_ids,
            output_token_ids=self.token_ids[self.prompt_len :],
            finish_reason=self.finish_reason,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            num_rounds=self.num_rounds,
            num_drafted=self.num_drafted,
            num_attempted=self.num_attempted,
            num_accepted=self.num_accepted,
            draft_versions=self.draft_versions,
            accepted_histogram=self.accepted_histogram,
            queued_s=self.queued_s,
            num_prompt_tokens_reused=self.num_reused,
            stop_token_id=self.stop_token_id,
            error=self.error,
            captured_rounds=self.captured_rounds,
            prompt_embedding_H=self.prompt_embedding_H,
            prompt_logprobs=self.prompt_logprobs,
        )


class Batch:
    """The sequences of a round, row = slot, and the tensors that last as long as they do."""

    def __init__(
        self, sequences: list[Sequence], device: torch.device | str = "cpu", *, vocab_size: int
    ) -> None:
        params = [sequence.request.sampling for sequence in sequences]
        modes = [param.mode for param in params]
        self.sequences = sequences
        self.device = device
        self.sampling = SamplingMetadata.stack(
            [(param.temperature, param.top_k, param.top_p, param.min_p) for param in params], device
        )
        self.any_standard = "standard" in modes
        self.any_coupled = "coupled" in modes
        self.standard_B = torch.tensor([mode == "standard" for mode in modes], device=device)
        self.coupled_B = torch.tensor([mode == "coupled" for mode in modes], device=device)
        self.noise_keys_B = torch.tensor(
            [sequence.noise_key for sequence in sequences], dtype=torch.int64, device=device
        )
        self.any_capture = any(sequence.request.capture for sequence in sequences)
        self.any_logprobs = any(param.logprobs is not None for param in params)
        self.max_top_logprobs = max(param.logprobs or 0 for param in params)
        contexts = [
            RowContext(
                sequence.request.sampling,
                sequence.token_ids,
                sequence.prompt_len,
                sequence.stop_ids,
                sequence.constraint,
            )
            for sequence in sequences
        ]
        self.processing = LogitsProcessing.stack(contexts, vocab_size, device)

    def __len__(self) -> int:
        return len(self.sequences)

    def lengths(self) -> list[int]:
        return [len(sequence.token_ids) for sequence in self.sequences]

    def output_positions_BX(self, num_positions: int) -> Tensor:
        """Output index of the next `num_positions` tokens of each row."""
        starts_B1 = to_device([[sequence.num_output] for sequence in self.sequences], self.device)
        return starts_B1 + torch.arange(num_positions, device=self.device)
