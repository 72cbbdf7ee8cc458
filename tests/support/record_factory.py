"""Real records from real models, offline: speculative decoding by full recomputation.

Written apart from the engine, so that it checks the learner's reading of a record and not its own.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from buffer.names import MODEL_DRAFTER
from buffer.records import GenerationRecord, RecordSampling, RoundTrace
from serving.engine.sampling import SamplingMetadata, processed_logprobs

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
        """Prompts are 4 random tokens unless given. Decoded side by side: it is quicker."""
        size = self.target.config.vocab_size
        drawn = torch.randint(size, (num_records, 4), generator=self.generator).tolist()
        return self._decoded((prompts or drawn)[:num_records], sampling, max_tokens, draft_version)

    def record(
        self, prompt: Sequence[int], sampling: RecordSampling, max_tokens: int, draft_version: int = 0
    ) -> GenerationRecord:
        return self._decoded([prompt], sampling, max_tokens, draft_version)[0]

    @torch.no_grad()
    def _decoded(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: RecordSampling,
        max_tokens: int,
        draft_version: int,
    ) -> list[GenerationRecord]:
        sequences = [list(prompt) for prompt in prompts]
        ends = [len(prompt) + max_tokens for prompt in prompts]
        rounds: list[list[RoundTrace]] = [[] for _ in prompts]
        while active := [n for n, end in enumerate(ends) if len(sequences[n]) < end]:
            rooms = [ends[n] - len(sequences[n]) for n in active]
            found = self._round([sequences[n] for n in active], sampling, rooms, draft_version)
            for number, (trace, emitted) in zip(active, found, strict=True):
                rounds[number].append(trace)
                sequences[number] += emitted
        return [
            self._written(prompt, sequence, traces, sampling)
            for prompt, sequence, traces in zip(prompts, sequences, rounds, strict=True)
        ]

    def _written(
        self,
        prompt: Sequence[int],
        sequence: list[int],
        rounds: Sequence[RoundTrace],
        sampling: RecordSampling,
    ) -> GenerationRecord:
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
        self, sequences: list[list[int]], sampling: RecordSampling, rooms: list[int], draft_version: int
    ) -> list[tuple[RoundTrace, list[int]]]:
        """One round of every sequence."""
        drafted = [list[int]() for _ in sequences]
        draft_distributions = [list[Tensor]() for _ in sequences]
        for _ in range(self.num_draft_tokens):
            texts = [one + more for one, more in zip(sequences, drafted, strict=True)]
            probs_NV = self._distribution(self._logits(self.draft, texts, 1), sampling)[:, 0]
            for number, token in enumerate(self._draw(probs_NV)):
                draft_distributions[number].append(probs_NV[number])
                drafted[number].append(token)
        texts = [one + more for one, more in zip(sequences, drafted, strict=True)]
        logits_NEV = self._logits(self.target, texts, self.num_draft_tokens + 1)
        target_NEV = self._distribution(logits_NEV, sampling)
        return [
            self._verified(
                len(sequences[number]),
                drafted[number],
                torch.stack(draft_distributions[number]),
                logits_NEV[number],
                target_NEV[number],
                sampling,
                rooms[number],
                draft_version,
            )
            for number in range(len(sequences))
        ]

    def _verified(
        self,
        start: int,
        drafted: list[int],
        draft_GV: Tensor,
        logits_EV: Tensor,
        target_EV: Tensor,
        sampling: RecordSampling,
        room: int,
        draft_version: int,
    ) -> tuple[RoundTrace, list[int]]:
        emitted, num_accepted, num_attempted = list[int](), 0, 0
        for index, token in enumerate(drafted):
            num_attempted += 1
            gap = target_EV[index, token] - draft_GV[index, token]
            if torch.rand((), generator=self.generator).log() >= gap:
                residual_V = (target_EV[index].exp() - draft_GV[index].exp()).clamp(min=0)
                emitted += self._draw(residual_V.log()[None])
                break
            emitted.append(token)
            num_accepted += 1
            if len(emitted) == room:
                break
        else:
            emitted += self._draw(target_EV[-1:])
        raw = torch.log_softmax(logits_EV, -1).topk(min(self.num_kept, logits_EV.shape[-1]), -1)
        rows = torch.arange(len(drafted))
        temperature = sampling.temperature or 1.0
        retemper_E = logits_EV.logsumexp(-1) / temperature - (logits_EV / temperature).logsumexp(-1)
        trace = RoundTrace(
            start=start,
            drafter_id=MODEL_DRAFTER,
            draft_route=self.route,
            draft_version=draft_version,
            num_accepted=num_accepted,
            num_attempted=num_attempted,
            drafted_token_ids_G=np.array(drafted, np.int32),
            drafted_target_logprobs_G=target_EV[rows, drafted].numpy(),
            drafted_draft_logprobs_G=draft_GV[rows, drafted].numpy(),
            emitted_target_logprobs_C=target_EV[torch.arange(len(emitted)), emitted].numpy(),
            topk_token_ids_EK=raw.indices.numpy().astype(np.int32),
            topk_logprobs_EK=raw.values.numpy().astype(np.float16),
            retemper_E=retemper_E.numpy().astype(np.float32),
        )
        return trace, emitted

    def _logits(self, model: nn.Module, texts: list[list[int]], num_last: int) -> Tensor:
        """[N, num_last, V], at the last positions of each text; what pads a text lies after them."""
        longest = max(map(len, texts))
        padded_NT = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        logits_NTV: Tensor = model(input_ids=padded_NT).logits.float()
        last_N1 = torch.tensor([[len(text) - num_last] for text in texts])
        rows_N1 = torch.arange(len(texts))[:, None]
        return logits_NTV[rows_N1, last_N1 + torch.arange(num_last)]

    def _distribution(self, logits_NXV: Tensor, sampling: RecordSampling) -> Tensor:
        row = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        return processed_logprobs(logits_NXV, SamplingMetadata.stack([row] * len(logits_NXV)))

    def _draw(self, logprobs_NV: Tensor) -> list[int]:
        drawn_N: list[int] = torch.multinomial(logprobs_NV.exp(), 1, generator=self.generator)[:, 0].tolist()
        return drawn_N
