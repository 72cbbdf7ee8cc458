"""The drafts that serve: opened while there is room, closed when unwanted; nothing live is touched before a
swap."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch

from buffer.names import DEFAULT_ROUTE
from buffer.records import AdapterManifest
from serving.drafters.model_drafter import ModelDrafter
from serving.engine import GenerationRequest, SamplingParams
from serving.engine.proposal import Drafter
from serving.local import LocalEngine, load_engine
from serving.models.adapter import AdapterRejectedError
from serving.models.draft_weights import DraftWeights
from serving.options import EngineOptions
from serving.served_drafts import ServedDrafts
from tests.support.tiny_adapters import tiny_adapter


@pytest.fixture(scope="module")
def engine(tiny_pair: tuple[str, str]) -> Iterator[LocalEngine]:
    options = EngineOptions(num_slots=2, max_seq_len=64, num_draft_tokens=3, max_route_drafts=2)
    with load_engine(*tiny_pair, options) as running:
        yield running


@pytest.fixture
def drafts(engine: LocalEngine) -> Iterator[ServedDrafts]:
    """On the floor, before and after."""
    assert engine.drafts is not None
    yield engine.drafts
    engine.drafts.follow([])
    engine.drafts.swap(DEFAULT_ROUTE, engine.drafts.stage(DEFAULT_ROUTE, None))


@cache
def _adapter(draft: str, target_revision: str, version: int) -> tuple[AdapterManifest, bytes]:
    return tiny_adapter(draft, draft_version=version, target_revision=target_revision)


def adapter(engine: LocalEngine, version: int, route: str = "default") -> tuple[AdapterManifest, bytes]:
    manifest, weights = _adapter(engine.pair.draft_id, engine.pair.target_revision, version)
    return replace(manifest, route=route), weights


def snapshot(weights: DraftWeights) -> dict[str, torch.Tensor]:
    """Of what serves."""
    return {name: weight.detach().clone() for name, weight in weights.module.named_parameters()}


def differing(weights: DraftWeights, before: dict[str, torch.Tensor]) -> set[str]:
    found = {name for name, weight in snapshot(weights).items() if not torch.equal(weight, before[name])}
    return {name.split(".")[-2] for name in found}


def versions_that_drafted(engine: LocalEngine, route: str) -> set[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    generation = engine.submit(GenerationRequest("r", (5, 6, 7), sampling, route=route)).result(30)
    return {span.draft_version for span in generation.draft_versions}


def test_where_too_little_memory_is_free_a_route_is_served_by_the_default_draft(
    engine: LocalEngine, drafts: ServedDrafts
) -> None:
    free = [False]
    served = ServedDrafts(engine, drafts.default, drafts._new_draft, 2, lambda: free[0])
    served.follow(["sql"])
    assert served.routes == ["default"]
    free[0] = True
    served.follow([])
    served.follow(["sql"])
    assert served.routes == ["default", "sql"], "asked again once the route was let go and wanted again"
    served.follow([])


def test_at_first_the_default_route_alone_has_a_draft(drafts: ServedDrafts) -> None:
    assert drafts.routes == ["default"]
    assert (dict(drafts.versions), drafts.max_route_drafts) == ({"default": 0}, 2)


def test_what_is_staged_is_live_after_the_swap_and_not_before(
    engine: LocalEngine, drafts: ServedDrafts
) -> None:
    before = snapshot(drafts.default)
    staged = drafts.stage("default", *adapter(engine, 3))
    assert staged.draft_version == 3
    assert differing(drafts.default, before) == set() and dict(drafts.versions) == {"default": 0}
    report = drafts.swap("default", staged)
    assert (report.draft_version, report.under_load) == (3, False)
    assert differing(drafts.default, before) == {"q_proj", "v_proj", "down_proj"}
    assert dict(drafts.versions) == {"default": 3} and versions_that_drafted(engine, "default") == {3}
    drafts.swap(DEFAULT_ROUTE, drafts.stage(DEFAULT_ROUTE, None))
    assert differing(drafts.default, before) == set()
    assert dict(drafts.versions) == {"default": 0} and versions_that_drafted(engine, "default") == {0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": "0" * 64}, "corrupted on the way"),
        ({"alpha": 1.0}, "its manifest says 4, 1.0"),
        ({"rank": 2}, "its manifest says 2, 8.0"),
        ({"draft_revision": "another"}, "draft_revision=another"),
        ({"target_revision": "another"}, "target_revision=another"),
    ],
)
def test_what_does_not_fit_is_rejected_and_what_serves_goes_on(
    engine: LocalEngine, drafts: ServedDrafts, changes: dict[str, object], words: str
) -> None:
    drafts.swap("default", drafts.stage("default", *adapter(engine, 1)))
    before = snapshot(drafts.default)
    manifest, weights = adapter(engine, 2)
    with pytest.raises(AdapterRejectedError, match=words):
        drafts.stage("default", replace(manifest, **changes), weights)  # type: ignore[arg-type]
    assert differing(drafts.default, before) == set() and dict(drafts.versions) == {"default": 1}


def test_a_route_that_opens_serves_its_floor_from_weights_of_its_own(
    engine: LocalEngine, drafts: ServedDrafts
) -> None:
    drafts.swap("default", drafts.stage("default", *adapter(engine, 5)))
    drafts.follow(["default", "sql"])
    assert drafts.routes == ["default", "sql"]
    assert dict(drafts.versions) == {"default": 5, "sql": 0}
    before = snapshot(drafts.default)
    drafts.swap("sql", drafts.stage("sql", *adapter(engine, 1, "sql")))
    assert dict(drafts.versions) == {"default": 5, "sql": 1}
    assert differing(drafts.default, before) == set()
    found = {route: versions_that_drafted(engine, route) for route in ("default", "sql", "code")}
    assert found == {"default": {5}, "sql": {1}, "code": {5}}
    drafts.swap("sql", drafts.stage("sql", None))
    assert dict(drafts.versions) == {"default": 5, "sql": 0}


def test_routes_open_in_their_order_while_there_is_room_and_close_when_nobody_wants_them(
    engine: LocalEngine, drafts: ServedDrafts
) -> None:
    drafts.follow(["sql", "code", "chat"])
    assert drafts.routes == ["default", "sql", "code"]
    drafts.swap("code", drafts.stage("code", *adapter(engine, 4, "code")))
    drafts.follow(["chat", "code"])
    assert drafts.routes == ["default", "code", "chat"], "the room that sql left is chat's"
    assert dict(drafts.versions) == {"default": 0, "code": 4, "chat": 0}, "what stays open is left as it is"
    assert versions_that_drafted(engine, "sql") == {0}
    drafts.follow([])
    assert drafts.routes == ["default"] and dict(drafts.versions) == {"default": 0}
    assert versions_that_drafted(engine, "code") == {0}
    with pytest.raises(KeyError):
        drafts.stage("code", *adapter(engine, 5, "code"))


def test_a_draft_that_cannot_be_made_is_tried_again_only_after_its_route_was_unwanted(
    engine: LocalEngine, drafts: ServedDrafts, caplog: pytest.LogCaptureFixture
) -> None:
    """The default route's serves it meanwhile, and other routes open all the same."""
    made: list[str] = []

    def new_draft() -> tuple[Drafter, DraftWeights]:
        made.append("")
        if len(made) == 1:
            raise MemoryError("no room on the device")
        pair, target = engine.pair, engine.core.target
        assert pair.draft is not None
        weights = DraftWeights(
            pair.draft, draft_revision=pair.draft_revision, target_revision=pair.target_revision
        )
        return ModelDrafter(target.twin(), draft_version=0), weights

    served = ServedDrafts(engine, drafts.default, new_draft, max_route_drafts=2)
    served.follow(["sql", "code"])
    assert served.routes == ["default", "code"]
    assert "route sql gets no draft of its own" in caplog.text and "no room on the device" in caplog.text
    assert versions_that_drafted(engine, "sql") == {0}
    served.follow(["sql", "code"])
    assert (served.routes, len(made)) == (["default", "code"], 2)
    served.follow(["code"])
    served.follow(["sql", "code"])
    assert (served.routes, len(made)) == (["default", "code", "sql"], 3)
    served.follow([])


def test_without_room_for_routes_none_opens(engine: LocalEngine, drafts: ServedDrafts) -> None:
    made: list[str] = []

    def new_draft() -> tuple[Drafter, DraftWeights]:
        made.append("")
        raise MemoryError("memory was planned for none")

    served = ServedDrafts(engine, drafts.default, new_draft)
    served.follow(["sql"])
    assert (served.routes, made) == (["default"], [])
