"""Rounds that never ran: which draft tokens the target would have taken, from what it recorded once.

In greedy and in coupled mode the recorded text does not depend on the draft, so what a draft would have
proposed at every recorded position follows from one pass over the recorded text, and with it every round at a
fixed draft length. Positions after a rejection were never recorded; their rows are left NaN, so nothing can
learn from them.

Legend: N recorded tokens, G drafted tokens of a round, V vocabulary.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.osd.recorded_answers import RecordedAnswer
from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION, MODEL_DRAFTER
from buffer.records import GenerationRecord, RecordSampling, RoundTrace
from learner.batch import collate, pack
from learner.draft import TrainableDraft
from learner.rows import trajectory_row
from serving.engine.noise import gumbel_noise, noise_key

Kept = TypeVar("Kept", bound=np.generic)
Served = tuple[str, int]
"""Route and version of a draft."""
RECORD_TTL_S = 24 * 3600.0
_TOKENS_PER_PASS, _POSITIONS_PER_PASS = 8192, 2048


@dataclass(frozen=True, eq=False)
class Replayed:
    """What would have happened to one request."""

    record: GenerationRecord
    num_accepted: int
    num_attempted: int
    num_rounds: int


class Replay:
    """Rounds of `num_draft_tokens` on recorded requests of one target."""

    def __init__(self, target_revision: str, num_draft_tokens: int) -> None:
        self.target_revision = target_revision
        self.num_draft_tokens = num_draft_tokens

    def play(
        self,
        draft: TrainableDraft,
        draft_version: int,
        recorded: Sequence[RecordedAnswer],
        route: str = DEFAULT_ROUTE,
        draft_route: str | None = None,
    ) -> list[Replayed]:
        """What the draft, as it stands, would have done; one a request, in order. `draft_route`: whose draft
        it is; None: the route's own."""
        chosen, served = self.chosen(draft, recorded), (draft_route or route, draft_version)
        return [
            self._replayed(one, choice_N, served, route)
            for one, choice_N in zip(recorded, chosen, strict=True)
        ]

    def chosen(self, draft: TrainableDraft, recorded: Sequence[RecordedAnswer]) -> list[NDArray[np.int64]]:
        """The draft's own token [N] at every recorded position, given all recorded tokens before it."""
        rows = [trajectory_row(self.bare_record(one), 1 << 20) for one in recorded]
        assert all(row is not None for row in rows)
        by_row = {id(row): one for row, one in zip(rows, recorded, strict=True)}
        found: dict[str, NDArray[np.int64]] = {}
        present = [row for row in rows if row is not None]
        for group in pack(present, _TOKENS_PER_PASS, _POSITIONS_PER_PASS):
            with torch.no_grad():
                logits_NV = draft.logits(collate(group, draft.device))
            ends = np.cumsum([len(row.positions) for row in group])[:-1].tolist()
            for row, logits in zip(group, logits_NV.tensor_split(ends), strict=True):
                one = by_row[id(row)]
                found[one.request_id] = _choice(one, logits).numpy()
        return [found[one.request_id] for one in recorded]

    def bare_record(self, recorded: RecordedAnswer, route: str = DEFAULT_ROUTE) -> GenerationRecord:
        """Everything that was recorded as one round without drafts."""
        nothing_G = np.zeros(0, np.int64)
        served = route, FLOOR_VERSION
        return self._record(
            recorded, (_trace(recorded, 0, recorded.num_tokens, 0, nothing_G, served),), route
        )

    def _replayed(
        self, recorded: RecordedAnswer, choice_N: NDArray[np.int64], served: Served, route: str
    ) -> Replayed:
        hits_N = choice_N == recorded.token_ids_N
        rounds, start = [], 0
        while start < recorded.num_tokens:
            room = min(self.num_draft_tokens, recorded.num_tokens - start - (not recorded.stopped))
            hits = hits_N[start : start + room]
            accepted = int(room if hits.all() else hits.argmin())
            drafted_G = choice_N[start : start + min(room, accepted + 1)]
            num_emitted = min(accepted + 1, recorded.num_tokens - start)
            rounds.append(_trace(recorded, start, num_emitted, accepted, drafted_G, served))
            start += num_emitted
        return Replayed(
            self._record(recorded, tuple(rounds), route),
            sum(trace.num_accepted for trace in rounds),
            sum(trace.num_attempted for trace in rounds),
            len(rounds),
        )

    def _record(
        self, recorded: RecordedAnswer, rounds: tuple[RoundTrace, ...], route: str
    ) -> GenerationRecord:
        now_s = time.time()
        mode = "greedy" if recorded.temperature == 0 else "coupled"
        return GenerationRecord(
            record_id=f"{recorded.request_id}-0-{recorded.arrival}",
            request_id=recorded.request_id,
            route=route,
            target_revision=self.target_revision,
            sampling=RecordSampling(temperature=recorded.temperature, mode=mode),
            prompt_token_ids=recorded.prompt_token_ids,
            output_token_ids=recorded.token_ids_N,
            rounds=rounds,
            created_at_s=now_s,
            expires_at_s=now_s + RECORD_TTL_S,
            prompt_embedding_H=recorded.prompt_embedding_H,
        )


def _choice(recorded: RecordedAnswer, logits_NV: Tensor) -> Tensor:
    """Greedy: the likeliest. Coupled: the winner of the race that the target ran with the same noise."""
    if recorded.seed is None:
        return logits_NV.argmax(-1)
    key_1 = torch.tensor([noise_key(recorded.seed, 0)])
    positions_1N = torch.arange(recorded.num_tokens)[None]
    noise_NV = gumbel_noise(key_1, positions_1N, logits_NV.shape[-1])[0]
    return (torch.log_softmax(logits_NV / recorded.temperature, -1) + noise_NV).argmax(-1)


def _trace(
    recorded: RecordedAnswer,
    start: int,
    num_emitted: int,
    num_accepted: int,
    drafted_G: NDArray[np.int64],
    served: Served,
) -> RoundTrace:
    """A round that emitted the recorded tokens from `start` on."""
    span = slice(start, start + num_emitted)
    num_drafted, num_kept = len(drafted_G), recorded.topk_token_ids_NK.shape[1]
    missing = max(0, num_drafted + 1 - num_emitted)
    empty_G = np.zeros(num_drafted, np.float32)
    return RoundTrace(
        start=len(recorded.prompt_token_ids) + start,
        drafter_id=MODEL_DRAFTER,
        draft_route=served[0],
        draft_version=served[1],
        num_accepted=num_accepted,
        num_attempted=num_drafted,
        drafted_token_ids_G=drafted_G.astype(np.int32),
        drafted_target_logprobs_G=empty_G,
        drafted_draft_logprobs_G=empty_G,
        emitted_target_logprobs_C=recorded.emitted_logprob_N[span],
        topk_token_ids_EK=_padded(recorded.topk_token_ids_NK[span], missing, np.arange(num_kept)),
        topk_logprobs_EK=_padded(recorded.topk_logprobs_NK[span], missing, np.full(num_kept, np.nan)),
        retemper_E=np.zeros(num_emitted + missing, np.float32),
    )


def _padded(array_NK: NDArray[Kept], missing: int, row_K: NDArray[Any]) -> NDArray[Kept]:
    if not missing:
        return array_NK
    return np.concatenate([array_NK, np.tile(row_K.astype(array_NK.dtype), (missing, 1))])


def chunks(recorded: Sequence[RecordedAnswer], size: int) -> Iterator[Sequence[RecordedAnswer]]:
    for start in range(0, len(recorded), size):
        yield recorded[start : start + size]
