"""The target's log-probabilities of a prompt's own tokens, taken from its logits chunk by chunk in prefill.

Of a chunk's logits a few numbers a token are kept, on the device until the prompt is complete, so that no
chunk waits for the device. Knows no slots and no requests. Legend: T positions of a chunk, K kept entries, V
vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engine.passes.transfer import to_device, to_host
from serving.engine.request import PromptLogprobs


class PromptLogprobsBuilder:
    """Of one prompt; keeps the `num_top` most likely tokens at each position, too."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._chunks: list[dict[str, Tensor]] = []

    @torch.inference_mode()
    def add(self, logits_TV: Tensor, next_token_ids: Sequence[int]) -> None:
        """Raw logits of the next T positions, and the prompt's token behind each."""
        next_T1 = to_device([next_token_ids], logits_TV.device).T
        logits_T1 = logits_TV.gather(-1, next_T1)
        logsumexp_T1 = logits_TV.logsumexp(dim=-1, keepdim=True)
        top_TK = logits_TV.topk(min(self._num_top, logits_TV.shape[-1]), dim=-1)
        self._chunks.append(
            {
                "logprobs_T": (logits_T1 - logsumexp_T1)[:, 0],
                "ranks_T": (logits_TV > logits_T1).sum(dim=-1) + 1,
                "top_token_ids_TK": top_TK.indices,
                "top_logprobs_TK": top_TK.values - logsumexp_T1,
                "finite_T": torch.isfinite(logsumexp_T1)[:, 0],
            }
        )

    def finish(self) -> PromptLogprobs:
        """Waits for the device. Raises ArithmeticError if any logits were not finite."""
        if not self._chunks:
            return PromptLogprobs.empty(self._num_top)
        arrays = to_host({name: torch.cat([each[name] for each in self._chunks]) for name in self._chunks[0]})
        if not arrays.pop("finite_T").all():
            raise ArithmeticError("the target's logits of the prompt are not finite")
        return PromptLogprobs(**arrays)
