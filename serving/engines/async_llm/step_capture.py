"""What vLLM's target said at every verified position of one step, as the numbers of a record's rounds.

Knows no vLLM: rows of logits and sampling parameters in, arrays out. Rows are read before a token is drawn,
because a sampler may work in place on the logits.

R rows of captured requests, one a verified position; E a request's; K kept entries; G drafted tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from serving.engine.capture import TOP_K
from serving.engine.sampling import SamplingMetadata, SamplingRow, processed_logprobs


@dataclass(frozen=True)
class RowCapture:
    """One request's rows of a step, on the CPU, before a token was drawn."""

    topk_token_ids_EK: NDArray[np.int32]
    topk_logprobs_EK: NDArray[np.float16]
    retemper_E: NDArray[np.float32]
    final_logprobs_EV: Tensor | None
    """Under the final distribution; None where the request is greedy."""

    def target_logprobs(self, positions: NDArray[np.int64], token_ids: ArrayLike) -> NDArray[np.float32]:
        """Final log-probability of each token at its position."""
        ids = np.asarray(token_ids, np.int64)
        if self.final_logprobs_EV is None:
            hits = self.topk_token_ids_EK[positions, 0] == ids
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
            metadata = SamplingMetadata.stack([row], logits_EV.device)
            final_EV = processed_logprobs(logits_EV[None], metadata)[0].cpu()
        found.append(RowCapture(ids_RK[span], logprobs_RK[span], retemper_E, final_EV))
    return found
