"""The target's log-probabilities at every verified position of a round, captured for the recorder.

Raw top-K at temperature 1, one scalar that re-tempers it exactly, and the final distribution at drafted and
emitted tokens. Positions after a first rejection are kept too; they are conditioned on rejected draft tokens.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from buffer.names import MODEL_DRAFTER
from serving.engine.passes.transfer import HostArrays
from serving.engine.proposal import Proposal, ServingDraft
from serving.engine.request import CapturedRound
from serving.engine.sequence import Advance, Batch

TOP_K = 32
"""Kept entries a position (fewer in a smaller vocabulary)."""


@dataclass(frozen=True)
class RoundCapture:
    """One round of a whole batch, on the CPU; `of` gives one row of it."""

    drafts_B: tuple[ServingDraft, ...]
    topk_token_ids_BEK: NDArray[np.int32]
    topk_logprobs_BEK: NDArray[np.float16]
    retemper_BE: NDArray[np.float32]
    drafted_token_ids_BG: NDArray[np.int32]
    drafted_target_logprobs_BG: NDArray[np.float32]
    drafted_draft_logprobs_BG: NDArray[np.float32]
    emitted_target_logprobs_BE: NDArray[np.float32]

    @classmethod
    def read(cls, drafts_B: tuple[ServingDraft, ...], arrays: HostArrays) -> "RoundCapture":
        """From the host copies of `capture_tensors`; `arrays` may hold others too."""
        names = [each.name for each in fields(cls) if each.name != "drafts_B"]
        return cls(drafts_B, **{name: arrays[name] for name in names})

    def of(self, row: int, start: int, advance: Advance) -> CapturedRound:
        """Row `row`, cut to its own draft length and the tokens it emitted. Copies, because views would keep
        the whole batch in memory as long as this sequence runs, which the memory plan does not count."""
        num_drafted, verified = advance.num_drafted, advance.num_drafted + 1
        drafter_id, draft_version = self.drafts_B[row].drafted(advance.num_matched)
        return CapturedRound(
            start=start,
            drafter_id=drafter_id,
            draft_route=self.drafts_B[row].route if drafter_id == MODEL_DRAFTER else None,
            draft_version=draft_version,
            num_accepted=advance.num_accepted,
            num_attempted=advance.num_attempted,
            drafted_token_ids_G=self.drafted_token_ids_BG[row, :num_drafted].copy(),
            drafted_target_logprobs_G=self.drafted_target_logprobs_BG[row, :num_drafted].copy(),
            drafted_draft_logprobs_G=self.drafted_draft_logprobs_BG[row, :num_drafted].copy(),
            emitted_target_logprobs_C=self.emitted_target_logprobs_BE[row, : len(advance.token_ids)].copy(),
            topk_token_ids_EK=self.topk_token_ids_BEK[row, :verified].copy(),
            topk_logprobs_EK=self.topk_logprobs_BEK[row, :verified].copy(),
            retemper_E=self.retemper_BE[row, :verified].copy(),
        )


def capture_tensors(
    batch: Batch,
    proposal: Proposal,
    raw_logits_BEV: Tensor,
    logsumexp_BE: Tensor,
    logprobs_BEV: Tensor | None,
    choice_BE: Tensor | None,
    num_accepted_B: Tensor,
    next_token_B: Tensor,
) -> dict[str, Tensor]:
    """The tensors of a RoundCapture by name, still on the device. `logprobs_BEV` are log-probabilities of the
    final distribution; None when every row is greedy (then it is one-hot at `choice_BE`)."""
    num_kept = min(TOP_K, raw_logits_BEV.shape[-1])
    topk_BEK = raw_logits_BEV.topk(num_kept, dim=-1)
    drafted_BG = proposal.token_ids_BG
    num_drafts = drafted_BG.shape[1]
    if logprobs_BEV is None:
        assert choice_BE is not None
        drafted_target_BG = torch.zeros(drafted_BG.shape, device=drafted_BG.device).masked_fill_(
            choice_BE[:, :num_drafts] != drafted_BG, -torch.inf
        )
        next_target_B = torch.zeros(len(batch), device=drafted_BG.device)
    else:
        drafted_target_BG = logprobs_BEV[:, :num_drafts].gather(-1, drafted_BG[..., None])[..., 0]
        rows_B = torch.arange(len(batch), device=drafted_BG.device)
        next_target_B = logprobs_BEV[rows_B, num_accepted_B, next_token_B]
    return {
        "topk_token_ids_BEK": topk_BEK.indices.to(torch.int32),
        "topk_logprobs_BEK": (topk_BEK.values - logsumexp_BE[..., None]).half(),
        "retemper_BE": _retemper(batch, raw_logits_BEV, logsumexp_BE),
        "drafted_token_ids_BG": drafted_BG.to(torch.int32),
        "drafted_target_logprobs_BG": drafted_target_BG.float(),
        "drafted_draft_logprobs_BG": proposal.token_logprobs_BG.float(),
        "emitted_target_logprobs_BE": nn.functional.pad(drafted_target_BG.float(), (0, 1)).scatter_(
            1, num_accepted_B[:, None], next_target_B.float()[:, None]
        ),
    }


def _retemper(batch: Batch, raw_logits_BEV: Tensor, logsumexp_BE: Tensor) -> Tensor:
    """logsumexp(logits) / T - logsumexp(logits / T); 0 on greedy rows and at temperature 1."""
    if batch.sampling.all_greedy:
        return torch.zeros_like(logsumexp_BE)
    temperature_B1 = batch.sampling.temperature_N[:, None]
    warm_BE = torch.logsumexp(raw_logits_BEV / temperature_B1[..., None], dim=-1)
    return logsumexp_BE / temperature_B1 - warm_BE
