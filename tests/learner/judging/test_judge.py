"""The judge compares drafts on held-out records alone, all on the same ones, and each only once."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from buffer.records import GenerationRecord, PassCosts, RecordSampling, ServingStatus
from learner.draft import AdapterState
from learner.judging.draft_selection import FLOOR, ExistingDraft
from learner.judging.evaluation import RecordScore, score_records
from learner.judging.judge import Judge, Judgement, operation
from learner.judging.rollback_backoff import RollbackBackoff
from learner.judging.speed import Operation
from learner.settings import LearnerSettings
from learner.trainer import Trainer
from tests.buffer.samples import START_S, make_record
from tests.support.record_factory import RecordFactory
from tests.support.tiny_learner import quick_settings, tiny_draft, tiny_pair

FLOOR_LEVEL = 0.3
NUM_POSITIONS = 6


def state(level: float) -> AdapterState:
    """Of a draft with this acceptance."""
    return {"level": torch.tensor(level, dtype=torch.float64)}


def existing(level: float, version: int = 1) -> ExistingDraft:
    return ExistingDraft("default", version, state(level))


class Scorer:
    """Acceptance as the state says, a little different from record to record; knows who was asked what."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, list[str]]] = []
        self.unscorable: set[tuple[float, str]] = set()

    def __call__(
        self, asked: AdapterState | None, records: Sequence[GenerationRecord]
    ) -> list[RecordScore | None]:
        level = FLOOR_LEVEL if asked is None else float(asked["level"])
        self.asked.append((level, [record.record_id for record in records]))
        return [self._score(level, record.record_id) for record in records]

    def taken(self) -> dict[float, list[str]]:
        """Record ids by level since the last call; each level was asked for at most once."""
        found, self.asked = self.asked, []
        named = {level: ids for level, ids in found if ids}
        assert len(named) == sum(bool(ids) for _, ids in found)
        return named

    def _score(self, level: float, record_id: str) -> RecordScore | None:
        if (level, record_id) in self.unscorable:
            return None
        difficulty = (sum(record_id.encode()) % 7 - 3) / 100
        expected_N = np.full(NUM_POSITIONS, level + difficulty, np.float32)
        nothing_N = np.zeros(NUM_POSITIONS, np.bool_)
        return RecordScore(expected_N, expected_N, nothing_N, nothing_N)


@pytest.fixture
def scorer() -> Scorer:
    return Scorer()


def settings(**changes: object) -> LearnerSettings:
    """Half of the records are held out."""
    return quick_settings(**{"held_out_share": 0.5, "held_out_window_records": 100, **changes})


def records(num_records: int, first: int = 0) -> list[GenerationRecord]:
    return [make_record(f"{number:03d}") for number in range(first, first + num_records)]


def filled(scorer: Scorer, num_held_out: int, **changes: object) -> tuple[Judge, list[str]]:
    """A judge with so many held-out records, and their ids, oldest first."""
    judge, held_out, first = Judge(settings(**changes), scorer), list[str](), 0
    while len(held_out) < num_held_out:
        [record] = records(1, first)
        if not judge.split([record]):
            held_out.append(record.record_id)
        first += 1
    return judge, held_out


def judged(
    judge: Judge,
    candidate: float,
    incumbent: ExistingDraft = FLOOR,
    *,
    fault: str = "",
    backoff: RollbackBackoff | None = None,
    now_s: float = START_S,
    new_reference: bool = False,
) -> Judgement:
    return judge.judge(
        state(candidate),
        incumbent,
        fault=fault,
        operation=Operation(num_draft_tokens=3),
        seed=(1, 2),
        now_s=now_s,
        backoff=backoff or RollbackBackoff(),
        new_reference=new_reference,
    )


# -- which records ----------------------------------------------------------------------------------


def test_no_record_that_is_learnt_from_is_ever_scored(scorer: Scorer) -> None:
    judge, arrived = Judge(settings(), scorer), records(60)
    learnt = {record.record_id for record in judge.split(arrived)}
    judged(judge, 0.6, existing(0.5))
    scored = {record_id for ids in scorer.taken().values() for record_id in ids}
    assert learnt.isdisjoint(scored)
    assert learnt | scored == {record.record_id for record in arrived}
    assert min(len(learnt), len(scored)) > 15 and judge.num_records == len(scored)


def test_a_record_that_comes_again_falls_to_the_same_side(scorer: Scorer) -> None:
    judge, arrived = Judge(settings(), scorer), records(40)
    first = judge.split(arrived)
    num_records = judge.num_records
    assert judge.split(arrived) == first
    assert judge.num_records == num_records
    segments = [replace(record, record_id=f"{record.record_id}-2", segment=1) for record in arrived]
    learnt = [record.request_id for record in judge.split(segments)]
    assert learnt == [record.request_id for record in first], "segments of one request are on one side"


def test_records_of_another_distribution_than_their_own_samplings_judge_nothing(scorer: Scorer) -> None:
    judge = Judge(settings(), scorer)
    arrived = [replace(record, sampling=RecordSampling(context_dependent=True)) for record in records(40)]
    learnt = judge.split(arrived)
    assert judge.num_records == 0 and 0 < len(learnt) < 40


def test_expired_records_judge_no_more(scorer: Scorer) -> None:
    judge, held_out = filled(scorer, 8)
    late = held_out[0]
    judge.split([replace(make_record(late), expires_at_s=START_S + 10)])
    judged(judge, 0.6, now_s=START_S + 9)
    assert sorted(scorer.taken()[0.6]) == held_out
    judged(judge, 0.7, now_s=START_S + 10)
    assert scorer.taken()[0.7] == held_out[1:]


def test_after_a_rollback_only_newer_records_judge_and_more_are_needed(scorer: Scorer) -> None:
    judge, held_out = filled(scorer, 7)
    judge.split([replace(make_record(held_out[0]), created_at_s=START_S + 5)])
    since = RollbackBackoff(trusted_since_s=START_S + 1, num_failures=1)
    decision = judged(judge, 0.6, backoff=since).decision
    assert "1 held-out records, 4 are needed" in decision.reason
    judge, _ = filled(scorer, 7)
    twice = RollbackBackoff(num_failures=2)
    assert "7 held-out records, 8 are needed" in judged(judge, 0.6, backoff=twice).decision.reason
    assert judged(judge, 0.6).decision.promote


def test_a_shift_of_traffic_leaves_the_newest_records(scorer: Scorer) -> None:
    judge, held_out = filled(scorer, 30)
    judge.hurry()
    judged(judge, 0.6)
    assert scorer.taken()[0.6] == held_out[-16:], "four times gate_min_records"


# -- the decision -----------------------------------------------------------------------------------


def test_a_better_candidate_is_promoted_with_the_acceptance_of_all_three(scorer: Scorer) -> None:
    judge, _ = filled(scorer, 12)
    found = judged(judge, 0.6, existing(0.5))
    assert found.decision.promote, found.decision.reason
    levels = found.acceptance_candidate, found.acceptance_incumbent, found.acceptance_floor
    assert levels[0] - levels[1] == pytest.approx(0.1, abs=1e-6)
    assert levels[1] - levels[2] == pytest.approx(0.5 - FLOOR_LEVEL, abs=1e-6)
    assert found.decision.evidence["gain_lower_bound"] == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize(
    ("candidate", "incumbent", "words"),
    [
        (0.5, existing(0.5), "not better than the incumbent"),
        (0.25, existing(0.2), "not better than the floor"),
        (FLOOR_LEVEL, FLOOR, "not better than the incumbent"),
    ],
)
def test_a_candidate_that_is_not_better_is_refused(
    scorer: Scorer, candidate: float, incumbent: ExistingDraft, words: str
) -> None:
    found = judged(filled(scorer, 12)[0], candidate, incumbent)
    assert not found.decision.promote and words in found.decision.reason
    assert found.acceptance_candidate < 0.6


def test_the_gates_settings_reach_the_gate(scorer: Scorer) -> None:
    judge, _ = filled(scorer, 12, gate_min_gain=0.2)
    assert "not over 0.2" in judged(judge, 0.6, existing(0.5)).decision.reason
    few, _ = filled(scorer, 3)
    found = judged(few, 0.6)
    assert "3 held-out records, 4 are needed" in found.decision.reason
    assert math.isnan(found.held_out_gain.gain) and not math.isnan(found.acceptance_candidate)


def test_a_faulty_candidate_is_refused_unscored(scorer: Scorer) -> None:
    judge, _ = filled(scorer, 12)
    found = judged(judge, 0.6, fault="weights hold NaN")
    assert (found.decision.promote, found.decision.reason) == (False, "weights hold NaN")
    assert math.isnan(found.acceptance_candidate) and math.isnan(found.held_out_gain.gain)
    assert scorer.taken() == {}


@pytest.mark.parametrize("level", [0.6, 0.5, FLOOR_LEVEL, 0.45])
def test_a_record_that_one_draft_has_no_score_on_counts_for_none(scorer: Scorer, level: float) -> None:
    """0.45 is the reference."""
    judge, held_out = filled(scorer, 12)
    judged(judge, 0.4, existing(0.45, version=3), fault="only to set the reference")
    scorer.unscorable.add((level, held_out[0]))
    found = judged(judge, 0.6, existing(0.5))
    assert found.decision.evidence["num_held_out_records"] == 11
    assert found.acceptance_candidate - found.acceptance_incumbent == pytest.approx(0.1, abs=1e-6)


def test_with_no_records_at_all_nothing_is_promoted(scorer: Scorer) -> None:
    found = judged(Judge(settings(), scorer), 0.9)
    assert not found.decision.promote and "0 held-out records" in found.decision.reason
    assert math.isnan(found.acceptance_candidate)


# -- what is scored ---------------------------------------------------------------------------------


def test_drafts_that_exist_are_scored_once_and_the_candidate_at_each_judgement(scorer: Scorer) -> None:
    judge, held_out = filled(scorer, 8)
    judged(judge, 0.6, existing(0.5))
    assert scorer.taken() == {FLOOR_LEVEL: held_out, 0.5: held_out, 0.6: held_out}
    judged(judge, 0.7, existing(0.5))
    assert scorer.taken() == {0.7: held_out}


def test_a_promoted_candidate_is_not_scored_again(scorer: Scorer) -> None:
    judge, held_out = filled(scorer, 8)
    judged(judge, 0.6)
    judge.promoted(("default", 1))
    scorer.taken()
    assert judge.compare([existing(0.6)])["default", 1].acceptance == pytest.approx(0.6, abs=0.03)
    judged(judge, 0.8, existing(0.6))
    assert scorer.taken() == {0.8: held_out}


def test_drafts_are_compared_on_the_last_records_and_others_are_forgotten(scorer: Scorer) -> None:
    judge, held_out = filled(scorer, 12, route_evidence_records=5)
    found = judge.compare([FLOOR, existing(0.5), existing(0.4, version=2)])
    assert [score.num_records for score in found.values()] == [5, 5, 5]
    assert max(found, key=lambda key: found[key].acceptance) == ("default", 1)
    assert scorer.taken() == dict.fromkeys([FLOOR_LEVEL, 0.5, 0.4], held_out[-5:])
    judge.compare([FLOOR])
    judge.compare([FLOOR, existing(0.5)])
    assert scorer.taken() == {0.5: held_out[-5:]}


# -- the held-out gain ------------------------------------------------------------------------------


def test_the_gain_is_counted_from_the_first_incumbent_until_a_new_reference(scorer: Scorer) -> None:
    judge, held_out = filled(scorer, 12)
    first = judged(judge, 0.4, existing(0.35, version=1)).held_out_gain
    assert (first.gain, first.lower) == (pytest.approx(0.05, abs=1e-6), pytest.approx(0.05, abs=1e-6))
    scorer.taken()
    judge.compare([FLOOR])  # the reference's scores outlive those of the others
    later = judged(judge, 0.6, existing(0.5, version=2)).held_out_gain
    assert later.gain == pytest.approx(0.25, abs=1e-6)
    assert scorer.taken() == {0.5: held_out, 0.6: held_out}
    anew = judged(judge, 0.6, existing(0.5, version=2), new_reference=True).held_out_gain
    assert anew.gain == pytest.approx(0.1, abs=1e-6)


def test_before_any_draft_the_gain_is_counted_from_the_floor(scorer: Scorer) -> None:
    found = judged(filled(scorer, 12)[0], 0.4)
    assert found.held_out_gain.gain == pytest.approx(0.4 - FLOOR_LEVEL, abs=1e-6)


# -- how serving runs -------------------------------------------------------------------------------

COSTS = PassCosts((1,), (1, 5), ((0.010, 0.012),), (0.001,), (0.001,))


def test_the_last_report_says_how_serving_runs() -> None:
    old = ServingStatus("r0", 1.0, {"default": 0}, (), num_draft_tokens=2)
    new = replace(
        old,
        replica_id="r1",
        at_s=2.0,
        num_draft_tokens=5,
        mean_batch_size=3.5,
        costs=COSTS,
        is_draft_length_fixed=True,
    )
    for statuses in ([old, new], [new, old]):
        assert operation(statuses, 4) == Operation(5, 3.5, COSTS, is_draft_length_fixed=True)


def test_where_nothing_is_known_the_nominal_draft_length_stands() -> None:
    assert operation([], 4) == Operation(4)
    idle = ServingStatus("r0", 1.0, {"default": 0}, (), num_draft_tokens=0, mean_batch_size=0.0)
    assert operation([idle], 4) == Operation(4, mean_batch_size=1.0)


# -- real drafts ------------------------------------------------------------------------------------


def test_a_trained_draft_is_promoted_over_its_floor_and_an_untrained_one_is_not() -> None:
    """On traffic that repeats itself."""
    real, draft, factory = settings(), tiny_draft(), RecordFactory(*tiny_pair())
    prompts = [[number, 3, number] for number in range(6)] * 8
    arrived, untrained = factory.records(len(prompts), max_tokens=8, prompts=prompts), draft.state()
    sizes = {"max_row_tokens": 64, "max_tokens_per_pass": 4096, "max_positions_per_pass": 4096}
    judge = Judge(real, partial(score_records, draft, **sizes))
    trainer, learnt = Trainer(draft, real), judge.split(arrived)
    for _ in range(30):
        trainer.step(learnt[:16])
    found = {}
    for name, candidate in (("trained", draft.state()), ("untrained", untrained)):
        found[name] = judge.judge(
            candidate,
            FLOOR,
            fault="",
            operation=Operation(num_draft_tokens=3),
            seed=(1,),
            now_s=0.0,
            backoff=RollbackBackoff(),
            new_reference=False,
        )
    assert found["trained"].decision.promote, found["trained"].decision.reason
    assert not found["untrained"].decision.promote
    assert found["untrained"].acceptance_candidate == pytest.approx(found["untrained"].acceptance_floor)
    assert found["trained"].acceptance_floor == found["untrained"].acceptance_floor
