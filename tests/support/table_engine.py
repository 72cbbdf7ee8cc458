"""An engine over table models, and drafters that are wrong on purpose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from serving.drafters.model_drafter import ModelDrafter
from serving.drafters.ngram_drafter import NgramDrafter
from serving.drafters.stopping import StoppingRule
from serving.engine.core import EngineCore
from serving.engine.draft_length import DraftLengthController
from serving.engine.engine import Engine
from serving.engine.passes.prefix_cache import PrefixCache
from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_cache import SlotCache
from serving.engine.proposal import LookupDrafter, Proposal, combine
from serving.engine.sequence import Batch
from tests.support.table_model import TableModel

MAX_LEN = 48

PrefixCacheMaker = Callable[[SlotCache], PrefixCache]


def table_engine(
    target: TableModel,
    draft: TableModel | None,
    *,
    num_draft_tokens: int,
    num_slots: int = 4,
    drafter_class: type[ModelDrafter] = ModelDrafter,
    prefill_chunk_tokens: int = 3,
    prefix_cache: PrefixCacheMaker | None = None,
    ngram: LookupDrafter | None = None,
    stopping: StoppingRule | None = None,
) -> Engine:
    """Small chunks and slots, so that every path is walked."""
    runner = Runner(target, num_slots=num_slots, max_seq_len=MAX_LEN)
    drafter = None
    if draft is not None:
        drafter = drafter_class(
            Runner(draft, num_slots=num_slots, max_seq_len=MAX_LEN),
            chunk_tokens=prefill_chunk_tokens,
            stopping=stopping,
        )
    return Engine(
        EngineCore(
            runner,
            drafter,
            controller=DraftLengthController(None, fixed=num_draft_tokens),
            prefill_chunk_tokens=prefill_chunk_tokens,
            prefix_cache=prefix_cache(runner.cache) if prefix_cache is not None else None,
            ngram=ngram,
        )
    )


@dataclass(frozen=True)
class StagedTable:
    """Another table for a draft, as staged weights."""

    draft_version: int
    model: TableModel
    table: Tensor

    def apply(self) -> None:
        self.model.table.copy_(self.table)


class MisreportingDrafter(ModelDrafter):
    """Draws from one distribution and claims another: the bug of taking draft_probs from new weights."""

    def propose(
        self,
        batch: Batch,
        num_draft_tokens_B: list[int],
        noise_BEV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Proposal:
        proposal = super().propose(batch, num_draft_tokens_B, noise_BEV, generator)
        if proposal.logprobs_BGV is None:
            return proposal
        return replace(proposal, logprobs_BGV=(0.3 * proposal.logprobs_BGV).log_softmax(-1))


class UndrawingDrafter(ModelDrafter):
    """Drops a drawn token when it was unlikely: biased, since the draw is part of the distribution."""

    def propose(
        self,
        batch: Batch,
        num_draft_tokens_B: list[int],
        noise_BEV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Proposal:
        proposal = super().propose(batch, num_draft_tokens_B, noise_BEV, generator)
        kept = [
            count if count == 0 or float(logprobs[0].exp()) > 0.35 else 0
            for count, logprobs in zip(proposal.num_drafted_B, proposal.token_logprobs_BG, strict=True)
        ]
        return replace(proposal, num_drafted_B=tuple(kept))


Script = Callable[[Sequence[int], int], list[int]]
"""(context, how many) -> the tokens to propose."""


class ScriptedDrafter(NgramDrafter):
    """Is certain of whatever the script says."""

    def __init__(self, script: Script) -> None:
        super().__init__(num_slots=0)
        self._script = script

    def matches(self, batch: Batch) -> list[int]:
        return [1] * len(batch)

    def propose(
        self,
        batch: Batch,
        num_draft_tokens_B: list[int],
        noise_BEV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Proposal:
        rows = [
            self._script(sequence.token_ids, count)
            for sequence, count in zip(batch.sequences, num_draft_tokens_B, strict=True)
        ]
        width = max(map(len, rows))
        tokens_BG = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64)
        tokens_BG = tokens_BG.view(len(rows), width)
        counts = tuple(map(len, rows))
        matched = tuple(int(count > 0) for count in counts)
        return Proposal(self.draft_version, tokens_BG, counts, None, torch.zeros(tokens_BG.shape), matched)

    def clear(self, slot: int) -> None: ...
    def move(self, source: int, destination: int) -> None: ...


class HalfCopyingDrafter(ModelDrafter):
    """Every other row is copied from a script, the rest drawn by the model."""

    script: Script = staticmethod(lambda context, count: [(context[-1] + 1) % 4] * count)

    def propose(
        self,
        batch: Batch,
        num_draft_tokens_B: list[int],
        noise_BEV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Proposal:
        drawn = [count * (row % 2) for row, count in enumerate(num_draft_tokens_B)]
        copied = [count * (1 - row % 2) for row, count in enumerate(num_draft_tokens_B)]
        by_model = super().propose(batch, drawn, noise_BEV, generator)
        return combine([by_model, ScriptedDrafter(self.script).propose(batch, copied, None, None)])


class CopyingAsIfDrawnDrafter(ModelDrafter):
    """Copies a token and claims that the model drew it: the bug of judging copies by the model's
    distribution."""

    def propose(
        self,
        batch: Batch,
        num_draft_tokens_B: list[int],
        noise_BEV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Proposal:
        proposal = super().propose(batch, num_draft_tokens_B, noise_BEV, generator)
        return replace(proposal, token_ids_BG=torch.zeros_like(proposal.token_ids_BG))
