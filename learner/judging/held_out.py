"""The latest held-out records and the scores of each draft on them, each computed once.

Knows no store. Invariant: no record is kept past its expiry, nor beyond the window.
"""

from collections.abc import Callable, Iterable, Sequence

from buffer.records import GenerationRecord
from learner.judging.evaluation import RecordScore

DraftKey = tuple[str, int]
"""Route and draft_version of a draft that exists and never changes."""

Scorer = Callable[[Sequence[GenerationRecord]], list[RecordScore | None]]


class HeldOutWindow:
    """A bounded window; the oldest records are dropped first."""

    def __init__(self, max_records: int) -> None:
        self._max_records = max_records
        self._records: dict[str, GenerationRecord] = {}
        self._scores: dict[DraftKey, dict[str, RecordScore | None]] = {}
        self._fresh: dict[str, RecordScore | None] = {}

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: Iterable[GenerationRecord]) -> None:
        """Add records, without those that have penalties or logit bias: their distribution is not the one
        that their sampling parameters describe."""
        for record in records:
            if not record.sampling.context_dependent:
                self._records.pop(record.record_id, None)
                self._records[record.record_id] = record
        self.shrink(self._max_records)

    def shrink(self, max_records: int) -> None:
        """Keep the newest records."""
        for record_id in list(self._records)[: max(0, len(self._records) - max_records)]:
            self._forget(record_id)

    def forget_before(self, at_s: float) -> None:
        """Drop records older than this."""
        for record in list(self._records.values()):
            if record.created_at_s < at_s:
                self._forget(record.record_id)

    def expire(self, now_s: float) -> None:
        for record in list(self._records.values()):
            if record.expires_at_s <= now_s:
                self._forget(record.record_id)

    def clear(self) -> None:
        self._records, self._scores, self._fresh = {}, {}, {}

    def scores(
        self, draft: DraftKey, score: Scorer, num_records: int | None = None
    ) -> list[RecordScore | None]:
        """Scores of a draft that never changes under this key, one for each record (of the last
        `num_records`); only new records are scored."""
        by_record = self._scores.setdefault(draft, {})
        wanted = list(self._records)[-num_records if num_records else None :]
        missing = [self._records[record_id] for record_id in wanted if record_id not in by_record]
        by_record.update(zip((record.record_id for record in missing), score(missing), strict=True))
        return [by_record[record_id] for record_id in wanted]

    def fresh_scores(self, score: Scorer) -> list[RecordScore | None]:
        """Scores of the candidate, which changes, on all records."""
        self._fresh = dict(zip(self._records, score(list(self._records.values())), strict=True))
        return list(self._fresh.values())

    def keep_fresh_as(self, draft: DraftKey) -> None:
        """The candidate that was scored last was published as this draft: keep its scores under that key."""
        self._scores[draft], self._fresh = self._fresh, {}

    def keep_drafts(self, drafts: Iterable[DraftKey]) -> None:
        """Forget the scores of every other draft."""
        kept = set(drafts)
        self._scores = {draft: by_record for draft, by_record in self._scores.items() if draft in kept}

    def _forget(self, record_id: str) -> None:
        del self._records[record_id]
        for by_record in self._scores.values():
            by_record.pop(record_id, None)
