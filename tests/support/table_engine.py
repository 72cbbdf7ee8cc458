"""An engine over table models, and drafters that are wrong on purpose."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from serving.drafters.model_drafter import ModelDrafter
from serving.engine.draft_length import DraftLengthController
from serving.engine.engine import Engine
from serving.engine.prefix_cache import PrefixCache
from serving.engine.proposal import Proposal
from serving.engine.runner import Runner
from serving.engine.sequence import Batch
from serving.engine.slot_cache import SlotCache
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
) -> Engine:
    """Small chunks and slots, so that every path is walked."""
    runner = Runner(target, num_slots=num_slots, max_seq_len=MAX_LEN)
    drafter = None
    if draft is not None:
        drafter = drafter_class(
            Runner(draft, num_slots=num_slots, max_seq_len=MAX_LEN), chunk_tokens=prefill_chunk_tokens
        )
    return Engine(
        runner,
        drafter,
        controller=DraftLengthController(None, fixed=num_draft_tokens),
        prefill_chunk_tokens=prefill_chunk_tokens,
        prefix_cache=prefix_cache(runner.cache) if prefix_cache is not None else None,
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
    """Draws from one law and claims another: the bug of taking draft_probs from new weights."""

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
    """Drops a drawn token when it was unlikely: biased, since the draw is part of the law."""

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
