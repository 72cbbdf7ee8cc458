"""Which tokens a route's draft can propose, where its head keeps but some: those that its traffic uses most.

Counts the outputs of records that the draft trains on; old counts fade, so the choice follows the traffic.
Knows no store.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from buffer.records import GenerationRecord
from learner.draft import TrainableDraft
from serving.models.kept_head import count_tokens

_HALF_LIFE_TOKENS = 200_000
"""After so many newer tokens a count has halved."""
_KEY = "token_counts"


class KeptTokens:
    """Counts tokens for a draft whose head keeps but some; does nothing for any other."""

    def __init__(self, draft: TrainableDraft) -> None:
        self._draft = draft
        self._counts_V: Tensor | None = None
        if draft.num_kept_tokens is not None:
            self._counts_V = torch.zeros(draft.vocab_size, dtype=torch.float64)

    def count(self, records: Sequence[GenerationRecord]) -> None:
        """Count their outputs, and let the draft's head keep the most used tokens."""
        if self._counts_V is None:
            return
        outputs = [record.output_token_ids.tolist() for record in records]
        self._counts_V *= 0.5 ** (sum(map(len, outputs)) / _HALF_LIFE_TOKENS)
        self._counts_V += count_tokens(outputs, len(self._counts_V))
        self._draft.keep_tokens(self._counts_V)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {} if self._counts_V is None else {_KEY: self._counts_V.clone()}

    def restored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the counts out of what a checkpoint kept; returns the rest."""
        rest = dict(state)
        counts_V = rest.pop(_KEY, None)
        if self._counts_V is not None and counts_V is not None and counts_V.shape == self._counts_V.shape:
            self._counts_V = counts_V.clone()
        return rest
