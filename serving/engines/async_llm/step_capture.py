"""What vLLM's target said at every verified position of one step, as the numbers of a record's rounds.

Knows no vLLM: rows of logits and sampling parameters in, arrays out. Two halves, because a sampler may work
in place on the logits: `read_rows` before it runs, `finish_round` once the emitted tokens are known.

R rows of captured requests, one a verified position; E a request's; K kept entries; G drafted tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.engine.sampling import SamplingMetadata, SamplingRow, processed_logprobs

TOP_K = 32
"""Kept entries a position (fewer in a smaller vocabulary)."""


@dataclass(frozen=True)
class RowCapture:
    """One request's rows of a step, on the CPU, before a token was drawn."""

    topk_token_ids_EK: NDArray[np.int32]
    topk_logprobs_EK: NDArray[np.float16]
    retemper_E: NDArray[np.float32]
    argmax_E: NDArray[np.int64]
    final_logprobs_EV: Tensor | None
    """Under the final distribution; None where the request is greedy."""

    def target_logprobs(self, positions: NDArray[np.int64], token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Final log-probability of each token at its position."""
        ids = np.asarray(token_ids, np.int64)
        if self.final_logprobs_EV is None:
            hits = self.argmax_E[positions] == ids
            return np.where(hits, 0.0, -np.inf).astype(np.float32)
        found = self.final_logprobs_EV[torch.from_numpy(positions), torch.from_numpy(ids)]
        return found.float().numpy().astype(np.float32)


@torch.inference_mode()
def read_rows(
    logits_RV: Tensor, num_rows: Sequence[int], sampling: Sequence[SamplingRow]
) -> list[RowCapture]:
    """Captures of requests whose rows follow one another. `num_rows` and `sampling`: one entry a request."""
    logits_RV = logits_RV.float()
    log_z_R = logits_RV.logsumexp(-1)
    top_RK = logits_RV.topk(min(TOP_K, logits_RV.shape[-1]), dim=-1)
    ids_RK = top_RK.indices.to(torch.int32).cpu().numpy()
    logprobs_RK = (top_RK.values - log_z_R[:, None]).half().cpu().numpy()
    found, start = [], 0
    for count, row in zip(num_rows, sampling, strict=True):
        span = slice(start, start + count)
        start += count
        retemper_E, final_EV = np.zeros(count, np.float32), None
        if row[0] > 0.0:
            logits_EV = logits_RV[span]
            warm_E = (logits_EV / row[0]).logsumexp(-1)
            retemper_E = (log_z_R[span] / row[0] - warm_E).float().cpu().numpy()
            final_EV = processed_logprobs(logits_EV[None], SamplingMetadata.stack([row], logits_EV.device))[
                0
            ].cpu()
        found.append(
            RowCapture(
                ids_RK[span], logprobs_RK[span], retemper_E, ids_RK[span, 0].astype(np.int64), final_EV
            )
        )
    return found
