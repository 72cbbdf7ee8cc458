"""The held-out window scores every draft on every record once."""

from collections.abc import Sequence

from buffer.records import GenerationRecord
from learner.judging.evaluation import RecordScore
from learner.judging.held_out import HeldOutWindow
from tests.support.record_factory import RecordFactory
from tests.support.tiny_learner import tiny_pair


def test_a_promoted_candidate_is_not_scored_again_on_what_it_was_judged_on() -> None:
    target, draft = tiny_pair()
    records = RecordFactory(target, draft).records(6)
    scored: list[str] = []

    def score(asked: Sequence[GenerationRecord]) -> list[RecordScore | None]:
        scored.extend(record.record_id for record in asked)
        return [None for _ in asked]

    window = HeldOutWindow(5)
    window.add(records[:4])
    window.fresh_scores(score)
    window.keep_fresh_as(("default", 1))
    window.add(records[4:])
    window.scores(("default", 1), score)
    assert scored == [record.record_id for record in records]
    window.scores(("default", 2), score)
    assert scored[6:] == [record.record_id for record in records[1:]], "another draft is"
