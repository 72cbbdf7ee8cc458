"""Runs the two live tests of a swap on arriving records; says when to roll back and why.

Knows no feed. Invariants: only records that arrived after the swap and have no penalties or logit bias are
used, and at most the wanted number a cycle; while a new draft is on trial no other may replace it, because it
would be compared with a parent that itself was not tested.
"""

from collections.abc import Callable, Sequence

from buffer.names import FLOOR_VERSION
from buffer.records import AdapterManifest, GenerationRecord
from learner.draft import AdapterState
from learner.judging.evaluation import RecordScore
from learner.judging.live import LiveComparison, SwapCheck, drafted_by
from learner.settings import LearnerSettings

ScoreState = Callable[[AdapterState | None, Sequence[GenerationRecord]], list[RecordScore | None]]


class LiveWatch:
    """Watches the latest promotion; idle before the first and after a rollback."""

    def __init__(self, settings: LearnerSettings, score: ScoreState) -> None:
        self._settings = settings
        self._score = score
        self._since_s = 0.0
        self._state: AdapterState | None = None
        self._parent_state: AdapterState | None = None
        self.last_version = FLOOR_VERSION
        """The greatest version that was ever watched."""
        self.comparison: LiveComparison | None = None
        self.swap_check: SwapCheck | None = None
        self.is_on_canary = False
        """Whether only one replica serves the draft, until its trial ends."""
        self._num_own_records = 0
        """Of those looked at, the ones that the watched draft drafted."""

    def begin(
        self,
        manifest: AdapterManifest,
        state: AdapterState,
        parent_state: AdapterState | None,
        is_on_canary: bool = False,
    ) -> None:
        """Start watching a new draft."""
        self.is_on_canary, self._num_own_records = is_on_canary, 0
        settings, version = self._settings, manifest.draft_version
        self._since_s, self._state, self._parent_state = manifest.created_at_s, state, parent_state
        self.last_version = max(self.last_version, version)
        self.comparison = LiveComparison(version, settings.live_false_alarm, settings.live_max_records)
        self.swap_check = SwapCheck(version, settings.swap_false_alarm, settings.swap_check_margin)

    def end(self) -> None:
        """Stop watching: another draft serves."""
        self.comparison = self.swap_check = None
        self.is_on_canary = False

    @property
    def trial(self) -> str:
        """Why no other draft may be promoted yet; empty if one may."""
        if self.comparison is None or self._settings.live_records_per_cycle == 0:
            return ""
        seen, wanted = self.comparison.evidence.num_values, self._settings.live_trial_records
        if self.is_on_canary:
            seen = min(seen, self._num_own_records)
        if seen >= wanted:
            return ""
        where = "on trial on one replica" if self.is_on_canary else "on trial"
        version = self.comparison.draft_version
        return f"version {version} is {where}: {seen} of {wanted} records since its swap were looked at"

    def observe(self, arrived: Sequence[GenerationRecord]) -> str:
        """Add arrived records. Returns the reason to roll back, or an empty string."""
        if self.comparison is None or self.swap_check is None:
            return ""
        records = [
            record
            for record in arrived
            if record.created_at_s >= self._since_s and not record.sampling.context_dependent
        ][: self._num_wanted]
        if not records:
            return ""
        scored = [
            (record, score)
            for record, score in zip(records, self._score(self._state, records), strict=True)
            if score is not None
        ]
        self._compare(scored)
        own = [score for record, score in scored if drafted_by(record, self.swap_check.draft_version)]
        self.swap_check = self.swap_check.observe(own)
        self._num_own_records += len(own)
        return self._objection()

    @property
    def _num_wanted(self) -> int:
        """Records to score: all that is allowed while the comparison is open, then fewer, for the swap check
        alone."""
        allowed = self._settings.live_records_per_cycle
        watching = self.comparison is not None and self.comparison.verdict == "watching"
        return allowed if watching else -(-allowed // 8)

    def _compare(self, scored: Sequence[tuple[GenerationRecord, RecordScore]]) -> None:
        if self.comparison is None or self.comparison.verdict != "watching":
            return
        before = self._score(self._parent_state, [record for record, _ in scored])
        pairs = [(new, old) for (_, new), old in zip(scored, before, strict=True) if old is not None]
        self.comparison = self.comparison.observe([new for new, _ in pairs], [old for _, old in pairs])

    def _objection(self) -> str:
        comparison, check = self.comparison, self.swap_check
        if check is not None and check.is_broken:
            return (
                f"broken swap: version {check.draft_version} was observed to accept "
                f"{check.observed_acceptance:.3f}, {check.expected_acceptance:.3f} was expected"
            )
        if comparison is not None and comparison.verdict == "rollback":
            return (
                f"worse on live traffic: version {comparison.draft_version} gained "
                f"{comparison.mean_gain:+.3f} of acceptance over its parent"
            )
        return ""
