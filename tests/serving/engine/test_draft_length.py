"""The controller against simulated traffic: known costs, known acceptance, seeded luck, no clock."""

import random
from dataclasses import dataclass, field

import pytest

from serving.engine.acceptance_estimate import MODEL, SequenceEstimate
from serving.engine.cost_table import CostTable
from serving.engine.draft_length import DraftLengthController, Lengths, Row

COSTS = CostTable(
    batch_sizes=(1, 8),
    token_counts=(1, 2, 4, 9),
    target_pass_s=((1.0, 1.05, 1.15, 1.4), (2.0, 3.2, 5.6, 11.0)),
    draft_pass_s=(0.15, 0.3),
    draft_start_s=(0.1, 0.1),
)
STEEP = CostTable((1, 8), (1, 9), ((1.0, 1.4), (2.0, 18.0)), (0.15, 1.2), (0.1, 0.1))


@dataclass
class Traffic:
    """`num_rows` sequences of `num_output` tokens each, replaced as they end; all on one route."""

    controller: DraftLengthController
    acceptance: float
    other_acceptance: float | None = None
    """Of every other sequence."""
    copy_acceptance: float = 0.0
    num_rows: int = 1
    num_output: int = 100
    num_matched: int = 0
    can_draft: bool = True
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    plans: list[Lengths] = field(default_factory=list)
    spent_s: float = 0.0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.estimates = [SequenceEstimate() for _ in range(self.num_rows)]
        self.left = [self.num_output] * self.num_rows

    def run(self, num_rounds: int) -> list[Lengths]:
        """The plans of these rounds."""
        for _ in range(num_rounds):
            self._round()
        return self.plans[-num_rounds:]

    def _round(self) -> None:
        rows = [
            Row("default", estimate, 1 + self.num_output - left, min(8, left - 1), self.num_matched)
            for estimate, left in zip(self.estimates, self.left, strict=True)
        ]
        plan = self.controller.choose(rows, can_draft=self.can_draft)
        self.plans.append(plan)
        width = max(*plan.by_model_B, *plan.copied_B)
        self.spent_s += COSTS.target_s(self.num_rows, width + 1)
        self.spent_s += COSTS.propose_s(self.num_rows, max(plan.by_model_B))
        for row, (drawn, copied) in enumerate(zip(plan.by_model_B, plan.copied_B, strict=True)):
            assert not (drawn and copied) and drawn + copied <= rows[row].max_draft_tokens
            rate = self.copy_acceptance if copied else self.acceptance
            count = drawn + copied
            accepted = next((g for g in range(count) if self.rng.random() >= rate), count)
            matched = self.num_matched if copied else MODEL
            self.controller.observe(
                "default", self.estimates[row], matched, min(count, accepted + 1), accepted
            )
            self.num_tokens += accepted + 1
            self.left[row] -= accepted + 1
            if self.left[row] <= 0:
                self.left[row], self.estimates[row] = self.num_output, SequenceEstimate()
                if self.other_acceptance is not None:
                    self.acceptance, self.other_acceptance = self.other_acceptance, self.acceptance


def _drafting_share(plans: list[Lengths]) -> float:
    return sum(any(plan.by_model_B) or any(plan.copied_B) for plan in plans) / len(plans)


def _mean_length(plans: list[Lengths]) -> float:
    return sum(max(plan.by_model_B) for plan in plans) / len(plans)


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("acceptance", [0.0, 0.02])
def test_a_hopeless_draft_costs_next_to_nothing(num_rows: int, acceptance: float) -> None:
    traffic = Traffic(DraftLengthController(COSTS), acceptance, num_rows=num_rows)
    traffic.run(2000)
    off_s = 2000 * COSTS.target_s(num_rows, 1)
    assert traffic.num_tokens / traffic.spent_s > 0.98 * (2000 * num_rows) / off_s
    assert _drafting_share(traffic.run(6000)) <= 0.025


def test_a_good_draft_drafts_far_and_a_fair_one_less() -> None:
    good = Traffic(DraftLengthController(COSTS), 0.95)
    fair = Traffic(DraftLengthController(COSTS), 0.5)
    assert _mean_length(good.run(500)[100:]) > 6
    assert 0.5 <= _mean_length(fair.run(500)[100:]) <= 4


def test_a_draft_that_turns_good_without_a_word_is_found_out() -> None:
    """The wait is bounded by the longest interval, and by a few short ones after the first success."""
    traffic = Traffic(DraftLengthController(COSTS), 0.0, num_output=5000)
    assert _drafting_share(traffic.run(1500)) < 0.02
    traffic.acceptance = 0.95
    plans = traffic.run(800)
    assert _mean_length(plans[-50:]) > 4


def test_a_swap_is_tried_at_once_and_a_draft_that_turns_bad_is_left_soon() -> None:
    controller = DraftLengthController(COSTS)
    traffic = Traffic(controller, 0.0)
    traffic.run(1000)
    controller.forget_model()
    for estimate in traffic.estimates:
        estimate.forget_model()
    traffic.acceptance = 0.9
    assert _mean_length(traffic.run(40)[20:]) > 3
    traffic.acceptance = 0.0
    traffic.run(60)
    assert _drafting_share(traffic.run(200)) < 0.1


def test_load_shortens_drafts() -> None:
    light = Traffic(DraftLengthController(STEEP), 0.7)
    heavy = Traffic(DraftLengthController(STEEP), 0.7, num_rows=8)
    assert _mean_length(light.run(600)[200:]) > 2
    assert _mean_length(heavy.run(600)[200:]) < 0.5


def test_text_of_one_kind_does_not_stop_drafts_for_another_on_its_route() -> None:
    """Sequences are hopeless and good in turn; the good ones are not judged by the others."""
    traffic = Traffic(DraftLengthController(COSTS), 0.0, other_acceptance=0.95)
    lengths = {0.0: [0], 0.95: [0]}
    for _ in range(4000):
        kind = traffic.acceptance
        lengths[kind].append(max(traffic.run(1)[0].by_model_B))
    assert sum(lengths[0.95]) / len(lengths[0.95]) > 3
    assert sum(length > 0 for length in lengths[0.0]) < 0.1 * len(lengths[0.0])


@pytest.mark.parametrize("can_draft", [True, False])
def test_copies_are_taken_where_they_promise_more(can_draft: bool) -> None:
    traffic = Traffic(
        DraftLengthController(COSTS), 0.05, copy_acceptance=0.9, num_matched=3, can_draft=can_draft
    )
    plans = traffic.run(400)[100:]
    assert sum(max(plan.copied_B) for plan in plans) / len(plans) > 4
    assert _mean_length(plans) < 0.05


def test_bad_copies_are_left_alone_and_a_good_model_drafts_on() -> None:
    traffic = Traffic(DraftLengthController(COSTS), 0.9, copy_acceptance=0.02, num_matched=2)
    plans = traffic.run(1500)[300:]
    assert sum(any(plan.copied_B) for plan in plans) <= 0.01 * len(plans)
    assert _mean_length(plans) > 4
    alone = Traffic(DraftLengthController(COSTS), 0.0, copy_acceptance=0.0, num_matched=2, can_draft=False)
    assert _drafting_share(alone.run(2000)[500:]) <= 0.01


def test_a_fixed_length_is_kept_and_copied_only_where_no_model_can_draft() -> None:
    controller = DraftLengthController(COSTS, fixed=3)
    rows = [Row("default", SequenceEstimate(), 9, 8, num_matched=2), Row("default", SequenceEstimate(), 9, 1)]
    assert controller.choose(rows) == Lengths([3, 1], [0, 0])
    assert controller.choose(rows, can_draft=False) == Lengths([0, 0], [3, 0])
    broken = [Row("a", SequenceEstimate(), 9, 8, num_matched=2, draft=None), rows[1]]
    assert controller.choose(broken) == Lengths([0, 1], [3, 0])


def test_a_row_that_may_not_draft_is_never_asked_even_by_a_probe() -> None:
    controller = DraftLengthController(COSTS)
    rows = [Row("default", SequenceEstimate(), 9, 0, num_matched=4)]
    assert all(controller.choose(rows) == Lengths([0], [0]) for _ in range(600))


def _chosen(
    controller: DraftLengthController,
    drafts: list[str | None],
    num_rounds: int = 400,
    acceptance: float = 0.8,
) -> list[Lengths]:
    """Plans for rows with these drafts, each on the route of that name: the later half."""
    estimates = [SequenceEstimate() for _ in drafts]
    rng, plans = random.Random(2), []
    for _ in range(num_rounds):
        rows = [
            Row(draft or "none", estimate, 9, 8, draft=draft)
            for draft, estimate in zip(drafts, estimates, strict=True)
        ]
        plans.append(controller.choose(rows))
        for row, count in zip(rows, plans[-1].by_model_B, strict=True):
            accepted = next((g for g in range(count) if rng.random() >= acceptance), count)
            attempted = min(count, accepted + 1)
            controller.observe(row.route, row.estimate, MODEL, attempted, accepted, row.draft or "none")
    return plans[num_rounds // 2 :]


ROOMY = CostTable((1, 8), (1, 9), ((1.0, 1.2), (2.0, 2.4)), (0.2, 0.2), (0.2, 0.2))
"""A proposal costs the same for one row as for eight, as each draft's pass does in a batch."""


def test_each_draft_pays_its_own_passes() -> None:
    """Eight rows pay one draft's passes, not eight drafts'."""
    one, eight = (
        _chosen(DraftLengthController(ROOMY), ["a"] * 8),
        _chosen(DraftLengthController(ROOMY), [*"abcdefgh"]),
    )
    assert all(all(plan.by_model_B) for plan in one)
    assert sum(sum(map(bool, plan.by_model_B)) for plan in eight) / len(eight) < 6


def test_a_draft_with_few_rows_sits_out_where_its_passes_do_not_pay() -> None:
    plans = _chosen(DraftLengthController(ROOMY), ["a"] * 7 + ["b"])
    assert all(all(plan.by_model_B[:7]) for plan in plans)
    assert sum(plan.by_model_B[7] > 0 for plan in plans) < 0.1 * len(plans)
    alike = _chosen(DraftLengthController(ROOMY), ["a"] * 4 + ["b"] * 4)
    assert sum(all(plan.by_model_B) for plan in alike) > 0.8 * len(alike)


def test_a_row_whose_draft_broke_is_never_asked_while_others_draft() -> None:
    plans = _chosen(DraftLengthController(ROOMY), ["a"] * 7 + [None])
    assert all(all(plan.by_model_B[:7]) and not plan.by_model_B[7] for plan in plans)
    fixed = DraftLengthController(ROOMY, fixed=2)
    assert fixed.choose(
        [Row("a", SequenceEstimate(), 9, 8, draft=None), Row("b", SequenceEstimate(), 9, 8)]
    ) == Lengths([0, 2], [0, 0])


def test_a_swap_on_one_route_leaves_what_is_believed_of_the_others() -> None:
    controller = DraftLengthController(ROOMY)
    _chosen(controller, ["a"] * 4 + ["b"] * 4)
    before = controller._routes.rates("b", SequenceEstimate(is_trial=False), MODEL)
    controller.forget_model(lambda route: route == "a")
    assert controller._routes.rates("a", SequenceEstimate(is_trial=False), MODEL) == (0.5, 0.5)
    assert controller._routes.rates("b", SequenceEstimate(is_trial=False), MODEL) == before != (0.5, 0.5)


def test_several_proposals_correct_the_table_by_their_sum() -> None:
    table = CostTable((1, 8), (1, 9), ((1.0, 1.2), (2.0, 2.4)), (0.2, 0.2), (0.2, 0.2))
    table.observe_draft(8, (3, 1), table.propose_s(8, 3) + table.propose_s(8, 1))
    assert table.draft_scale == pytest.approx(1.0)
    table.observe_draft(8, (3, 1), 2.0 * table.propose_s(8, 3) + 2.0 * table.propose_s(8, 1))
    assert table.draft_scale > 1.0


def test_a_busy_hour_does_not_leave_drafting_dear() -> None:
    """Rounds without drafts say that the machine is quick again; the price of a draft follows them."""
    table = CostTable((1, 8), (1, 9), ((1.0, 1.2), (2.0, 2.4)), (0.2, 0.2), (0.2, 0.2))
    plain_s, longer_s, propose_s = table.target_s(4, 1), table.target_s(4, 4), table.propose_s(4, 3)
    for _ in range(600):  # everything takes twice as long
        table.observe_target(4, 3, 2.0 * longer_s)
        table.observe_draft(4, (3,), 2.0 * propose_s)
    assert table.propose_s(4, 3) == pytest.approx(2.0 * propose_s, rel=0.01)
    assert table.target_s(4, 4) == pytest.approx(2.0 * longer_s, rel=0.01)
    for _ in range(600):  # a quiet machine, and nothing drafts
        table.observe_target(4, 0, plain_s)
    assert table.propose_s(4, 3) == pytest.approx(propose_s, rel=0.01)


def test_probes_that_go_on_succeeding_are_trusted() -> None:
    """Where a draft pays from .8 on. Each probe used to halve what those before it had shown: no route's
    estimate ever rose above .7."""
    pays_from = 0.8
    drafting_s = (1.0 + pays_from) / 1.08
    table = CostTable((1,), (1, 2, 9), ((1.0, drafting_s - 0.1, 99.0),), (0.1,), (0.0,))

    def drafted(acceptance: float) -> float:
        """Of the rounds of sequences of a hundred rounds each."""
        controller, num_drafted = DraftLengthController(table), 0
        for _ in range(60):
            plans = _chosen(controller, ["a"], num_rounds=100, acceptance=acceptance)
            num_drafted += sum(plan.by_model_B[0] for plan in plans)
        return num_drafted / (60 * 50)

    assert drafted(0.95) > 0.8
    assert drafted(0.5) < 0.15
