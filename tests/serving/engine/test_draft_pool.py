"""Routes with a draft each, in one engine: each row drafts with its own, versions are counted apart, and what
happens to one draft is nothing to the others."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch

from buffer.names import MODEL_DRAFTER
from serving.drafters.model_drafter import ModelDrafter
from serving.engine import Generation, GenerationRequest, SamplingParams
from serving.engine.core import EngineCore
from serving.engine.draft_length import DraftLengthController
from serving.engine.draft_pool import BrokenDraftError
from serving.engine.engine import Engine
from serving.engine.passes.runner import Runner
from serving.engine.proposal import DrafterVersion
from tests.support.table_engine import MAX_LEN, StagedTable
from tests.support.table_model import TableModel

VOCAB = 17
NUM_SLOTS = 4
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
SEEDED = SamplingParams(seed=3, max_tokens=24)


@dataclass
class Routed:
    """An engine whose default draft is wrong throughout, and the models of its routes' drafts."""

    engine: Engine
    target: TableModel
    models: dict[str, TableModel]

    def open(self, route: str, *, like_target: bool, has_floor: bool = True) -> None:
        model = self.models[route] = _wrong(self.target)
        shipped = model.table.clone()
        self.engine.open_draft(
            route,
            ModelDrafter(Runner(model, num_slots=NUM_SLOTS, max_seq_len=MAX_LEN), chunk_tokens=3),
            (lambda: StagedTable(0, model, shipped)) if has_floor else None,
        )
        if like_target:
            self.swap(route, 5, self.target.table)

    def swap(self, route: str, version: int, table: torch.Tensor) -> None:
        self.engine.swap(StagedTable(version, self.models[route], table.clone()), route).result(5)

    def run(self, *routes: str | None, sampling: SamplingParams = GREEDY) -> list[Generation]:
        """One request a route, in the same batches."""
        requests = [
            GenerationRequest(f"{index}", (1, 2, 3 + index), sampling, route=route, capture=True)
            for index, route in enumerate(routes)
        ]
        return [handle.result(20) for handle in [self.engine.submit(request) for request in requests]]


def _wrong(target: TableModel) -> TableModel:
    """Never says what the target would."""
    model = deepcopy(target)
    model.table.copy_(-target.table)
    return model


@pytest.fixture
def routed() -> Iterator[Routed]:
    target = TableModel(VOCAB, seed=1, sharpness=2.0)
    models = {"default": _wrong(target)}
    drafter = ModelDrafter(
        Runner(models["default"], num_slots=NUM_SLOTS, max_seq_len=MAX_LEN), chunk_tokens=3
    )
    with Engine(
        EngineCore(
            Runner(target, num_slots=NUM_SLOTS, max_seq_len=MAX_LEN),
            drafter,
            controller=DraftLengthController(None, fixed=3),
            prefill_chunk_tokens=3,
        )
    ) as engine:
        yield Routed(engine, target, models)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_text_does_not_know_whose_draft_drafted_it(routed: Routed, sampling: SamplingParams) -> None:
    routes = ("sql", "code", None, "chat")
    alone = [generation.output_token_ids for generation in routed.run(*routes, sampling=sampling)]
    routed.open("sql", like_target=True)
    routed.open("code", like_target=False)
    generations = routed.run(*routes, sampling=sampling)
    assert [generation.output_token_ids for generation in generations] == alone
    assert generations[0].num_accepted > generations[1].num_accepted


def test_each_row_drafts_with_the_draft_of_its_own_route(routed: Routed) -> None:
    routed.open("sql", like_target=True)
    routed.open("code", like_target=False)
    sql, code, none, chat = routed.run("sql", "code", None, "chat")
    assert sql.num_accepted == sql.num_attempted > 0
    for other in (code, none, chat):
        assert other.num_accepted == 0 < other.num_attempted


def test_counters_are_told_by_the_route_whose_draft_it_was(routed: Routed) -> None:
    routed.open("sql", like_target=True)
    sql, none, chat = routed.run("sql", None, "chat")
    counts = routed.engine.stats().route_counts
    assert counts.keys() == {"sql", "default"}
    own, floor = DrafterVersion(MODEL_DRAFTER, 5), DrafterVersion(MODEL_DRAFTER, 0)
    assert counts["sql"].keys() == {own} and counts["default"].keys() == {floor}
    assert counts["sql"][own].num_accepted == sql.num_accepted
    assert counts["default"][floor].num_attempted == none.num_attempted + chat.num_attempted


def test_a_captured_round_names_the_route_and_version_of_the_draft_that_drafted(routed: Routed) -> None:
    """Versions are counted by route: the same number on another route is another draft."""
    routed.open("sql", like_target=True)

    def captured(*routes: str | None) -> list[set[tuple[str | None, int | None]]]:
        return [
            {(trace.draft_route, trace.draft_version) for trace in each.captured_rounds}
            for each in routed.run(*routes)
        ]

    assert captured("sql", None, "chat") == [{("sql", 5)}, {("default", 0)}, {("default", 0)}]
    routed.swap("default", 5, routed.target.table)
    assert captured("sql", None, "chat") == [{("sql", 5)}, {("default", 5)}, {("default", 5)}]
    assert {span.draft_version for span in routed.run("chat")[0].draft_versions} == {5}


def test_a_swap_on_one_route_leaves_the_others_version_and_weights(routed: Routed) -> None:
    routed.open("sql", like_target=True)
    routed.open("code", like_target=False)
    routed.swap("code", 9, routed.target.table)
    assert routed.engine.draft_versions == {"default": 0, "sql": 5, "code": 9}
    assert routed.engine.draft_version == 0
    sql, code, none = routed.run("sql", "code", None)
    assert (sql.num_accepted, code.num_accepted) == (sql.num_attempted, code.num_attempted)
    assert none.num_accepted == 0


@pytest.mark.parametrize("has_floor", [True, False])
def test_a_draft_that_gives_nan_is_switched_off_on_its_own_route_only(
    routed: Routed, has_floor: bool
) -> None:
    routed.open("sql", like_target=True)
    routed.open("code", like_target=False, has_floor=has_floor)
    healthy = [generation.output_token_ids for generation in routed.run("sql", "code", None)]
    routed.swap("code", 2, torch.full_like(routed.target.table, torch.nan))
    generations = routed.run("sql", "code", None)
    assert [generation.output_token_ids for generation in generations] == healthy
    assert generations[0].num_accepted == generations[0].num_attempted > 0
    assert routed.engine.draft_versions == {"default": 0, "sql": 5, "code": 0 if has_floor else 2}
    reason = routed.engine.stats().draft_disabled_reason
    assert reason == "" if has_floor else "route code: draft_version=2" in reason
    assert routed.run("code", None)[0].num_drafted > 0 if has_floor else not routed.run("code")[0].num_drafted
    with pytest.raises(BrokenDraftError, match="draft_version=2"):
        routed.swap("code", 2, routed.target.table)
    routed.swap("default", 2, routed.target.table)
    assert routed.run(None)[0].num_accepted > 0


def test_a_route_that_closes_is_served_by_the_default_routes_draft(routed: Routed) -> None:
    routed.open("sql", like_target=True)
    routed.run("sql")
    routed.engine.close_draft("sql").result(5)
    [sql] = routed.run("sql")
    assert sql.num_accepted == 0 < sql.num_attempted
    assert routed.engine.draft_versions == {"default": 0}
    assert routed.engine.stats().route_counts.keys() == {"default"}
    with pytest.raises(BrokenDraftError, match="no draft is loaded"):
        routed.swap("sql", 6, routed.target.table)


def test_the_default_routes_draft_cannot_be_closed(routed: Routed) -> None:
    routed.engine.close_draft("default").result(5)
    assert routed.run(None)[0].num_drafted > 0


def test_a_draft_that_opens_in_the_middle_of_a_text_catches_up(routed: Routed) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=40)
    left = [True]

    def open_once(event: object) -> None:
        while left:
            routed.models["sql"] = model = deepcopy(routed.target)
            runner = Runner(model, num_slots=NUM_SLOTS, max_seq_len=MAX_LEN)
            routed.engine.open_draft("sql", ModelDrafter(runner, chunk_tokens=3), None)
            left.pop()

    request = GenerationRequest("late", (1, 2, 3), long, route="sql")
    late = routed.engine.submit(request, open_once).result(20)
    assert late.num_accepted > 0
    assert late.output_token_ids == routed.run("sql", sampling=long)[0].output_token_ids
