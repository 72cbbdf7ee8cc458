"""The latest held-out records, and what each draft scores on them, computed once.

Knows no store. Invariant: no record is kept past its expiry, nor beyond the window.
"""

from collections.abc import Callable, Iterable, Sequence

from buffer.records import GenerationRecord
from learner.judging.evaluation import RecordScore

DraftKey = tuple[str, int]
"""Route and draft_version: of one draft that exists and never changes."""

Scorer = Callable[[Sequence[GenerationRecord]], list[RecordScore | None]]


class HeldOutWindow:
    """A bounded window; the oldest leave first."""

    def __init__(self, max_records: int) -> None:
        self._max_records = max_records
        self._records: dict[str, GenerationRecord] = {}
        self._scores: dict[DraftKey, dict[str, RecordScore | None]] = {}
        self._fresh: dict[str, RecordScore | None] = {}

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: Iterable[GenerationRecord]) -> None:
        """Records with penalties or logit bias stay out: another distribution than their own sampling's."""
        for record in records:
            if not record.sampling.context_dependent:
                self._records.pop(record.record_id, None)
                self._records[record.record_id] = record
        self.shrink(self._max_records)

    def shrink(self, max_records: int) -> None:
        """Keep the newest."""
        for record_id in list(self._records)[: max(0, len(self._records) - max_records)]:
            self._forget(record_id)

    def forget_before(self, at_s: float) -> None:
        """Records older than this judge no more."""
        for record in list(self._records.values()):
            if record.created_at_s < at_s:
                self._forget(record.record_id)

    def expire(self, now_s: float) -> None:
        for record in list(self._records.values()):
            if record.expires_at_s <= now_s:
                self._forget(record.record_id)

    def scores(
        self, draft: DraftKey, score: Scorer, num_records: int | None = None
    ) -> list[RecordScore | None]:
        """Of a draft that never changes under this key, one a record (of the last so many); only new
        records are scored."""
        known = self._scores.setdefault(draft, {})
        wanted = list(self._records)[-num_records if num_records else None :]
        missing = [self._records[record_id] for record_id in wanted if record_id not in known]
        known.update(zip((record.record_id for record in missing), score(missing), strict=True))
        return [known[record_id] for record_id in wanted]

    def fresh_scores(self, score: Scorer) -> list[RecordScore | None]:
        """Of a draft that changes, the candidate."""
        self._fresh = dict(zip(self._records, score(list(self._records.values())), strict=True))
        return list(self._fresh.values())

    def keep_fresh_as(self, draft: DraftKey) -> None:
        """The candidate that was scored last is this draft now: it need not be scored again."""
        self._scores[draft], self._fresh = self._fresh, {}

    def keep_drafts(self, drafts: Iterable[DraftKey]) -> None:
        """Forget the scores of every other draft."""
        kept = set(drafts)
        self._scores = {draft: found for draft, found in self._scores.items() if draft in kept}

    def _forget(self, record_id: str) -> None:
        del self._records[record_id]
        for known in self._scores.values():
            known.pop(record_id, None)
