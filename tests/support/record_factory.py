"""Real records from real models, offline: speculative decoding by full recomputation, one sequence at a time.

Written apart from the engine, so that it checks the learner's reading of a record and not its own.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from buffer.records import MODEL_DRAFTER, GenerationRecord, RecordSampling, RoundTrace
from serving.engine.sampling import SamplingLaw, law_logprobs

GREEDY = RecordSampling(temperature=0.0, mode="greedy")


@dataclass
class RecordFactory:
    """Decodes with `target` and `draft` and writes down what a replica would."""

    target: nn.Module
    draft: nn.Module
    target_revision: str = "target-1"
    route: str = "default"
    num_draft_tokens: int = 3
    num_kept: int = 8
    seed: int = 0
    clock_s: float = 1_000.0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def records(
        self,
        num_records: int,
        sampling: RecordSampling = GREEDY,
        *,
        max_tokens: int = 16,
        prompts: Sequence[Sequence[int]] | None = None,
        draft_version: int = 0,
    ) -> list[GenerationRecord]:
        """Prompts are 4 random tokens unless given."""
        size = self.target.config.vocab_size
        drawn = torch.randint(size, (num_records, 4), generator=self.generator).tolist()
        return [
            self.record(prompt, sampling, max_tokens, draft_version)
            for prompt in (prompts or drawn)[:num_records]
        ]

    @torch.no_grad()
    def record(
        self, prompt: Sequence[int], sampling: RecordSampling, max_tokens: int, draft_version: int = 0
    ) -> GenerationRecord:
        sequence, rounds = list(prompt), []
        while len(sequence) < len(prompt) + max_tokens:
            room = len(prompt) + max_tokens - len(sequence)
            trace, emitted = self._round(sequence, sampling, room, draft_version)
            rounds.append(trace)
            sequence += emitted
        request_id = uuid.UUID(int=int(torch.randint(2**62, (), generator=self.generator))).hex
        return GenerationRecord(
            record_id=request_id,
            request_id=request_id,
            route=self.route,
            target_revision=self.target_revision,
            sampling=sampling,
            prompt_token_ids=np.array(prompt, np.int32),
            output_token_ids=np.array(sequence[len(prompt) :], np.int32),
            rounds=tuple(rounds),
            created_at_s=self.clock_s,
            expires_at_s=self.clock_s + 1e9,
        )

    def _round(
        self, sequence: list[int], sampling: RecordSampling, room: int, draft_version: int
    ) -> tuple[RoundTrace, list[int]]:
        drafted, draft_laws = list[int](), list[Tensor]()
        for _ in range(self.num_draft_tokens):
            law_V = self._law(self._logits(self.draft, sequence + drafted)[-1:], sampling)[0]
            draft_laws.append(law_V)
            drafted.append(self._draw(law_V))
        logits_EV = self._logits(self.target, sequence + drafted)[len(sequence) - 1 :]
        target_EV = self._law(logits_EV, sampling)
        emitted, num_accepted, num_attempted = list[int](), 0, 0
        for index, token in enumerate(drafted):
            num_attempted += 1
            gap = target_EV[index, token] - draft_laws[index][token]
            if torch.rand((), generator=self.generator).log() >= gap:
                residual_V = (target_EV[index].exp() - draft_laws[index].exp()).clamp(min=0)
                emitted.append(self._draw(residual_V.log()))
                break
            emitted.append(token)
            num_accepted += 1
            if len(emitted) == room:
                break
        else:
            emitted.append(self._draw(target_EV[-1]))
        raw = torch.log_softmax(logits_EV, -1).topk(min(self.num_kept, logits_EV.shape[-1]), -1)
        rows = torch.arange(len(drafted))
        temperature = sampling.temperature or 1.0
        retemper_E = logits_EV.logsumexp(-1) / temperature - (logits_EV / temperature).logsumexp(-1)
        trace = RoundTrace(
            start=len(sequence),
            drafter_id=MODEL_DRAFTER,
            draft_route=self.route,
            draft_version=draft_version,
            num_accepted=num_accepted,
            num_attempted=num_attempted,
            drafted_token_ids_G=np.array(drafted, np.int32),
            drafted_target_logprobs_G=target_EV[rows, drafted].numpy(),
            drafted_draft_logprobs_G=torch.stack(draft_laws)[rows, drafted].numpy(),
            emitted_target_logprobs_C=target_EV[torch.arange(len(emitted)), emitted].numpy(),
            topk_token_ids_EK=raw.indices.numpy().astype(np.int32),
            topk_logprobs_EK=raw.values.numpy().astype(np.float16),
            retemper_E=retemper_E.numpy().astype(np.float32),
        )
        return trace, emitted

    def _logits(self, model: nn.Module, token_ids: list[int]) -> Tensor:
        logits: Tensor = model(input_ids=torch.tensor([token_ids])).logits[0]
        return logits.float()

    def _law(self, logits_XV: Tensor, sampling: RecordSampling) -> Tensor:
        row = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        return law_logprobs(logits_XV[None], SamplingLaw.stack([row]))[0]

    def _draw(self, logprobs_V: Tensor) -> int:
        return int(torch.multinomial(logprobs_V.exp(), 1, generator=self.generator))
