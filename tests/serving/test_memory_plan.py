"""What is planned is what is taken; too much is refused before anything is taken, with what would fit."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.errors import SettingsError
from deploy.memory import ServicePlan, check_memory
from deploy.settings import Settings
from serving.drafters.model_drafter import ModelDrafter
from serving.engine import GenerationRequest, SamplingParams
from serving.free_memory import FreeMemory, free_memory, host_free_bytes
from serving.local import LocalEngine, build_engine, load_engine
from serving.memory_plan import MemoryPlan, MemoryPlanError, ModelSize
from serving.models.loading import load_pair
from serving.options import EngineOptions

GIB = 2**30
SMALL = ModelSize(weights_bytes=1_000_000, column_bytes=96, vocab_size=1000)
LARGE = ModelSize(weights_bytes=8_000_000, column_bytes=4096, vocab_size=1000)
PLANS = [
    MemoryPlan(EngineOptions(num_slots=8, max_seq_len=1024), LARGE),
    MemoryPlan(EngineOptions(num_slots=3, max_seq_len=333, export_queue_bytes=2**20), LARGE, SMALL),
    MemoryPlan(EngineOptions(num_slots=64, max_seq_len=64, prefix_cache_mib=1.5), SMALL, SMALL),
    MemoryPlan(EngineOptions(num_slots=8, max_seq_len=4096), LARGE, SMALL, weights_loaded=True),
]


@pytest.fixture(scope="module")
def engine(tiny_pair: tuple[str, str]) -> Iterator[LocalEngine]:
    with load_engine(
        *tiny_pair,
        options=EngineOptions(num_slots=3, max_seq_len=100, num_draft_tokens=8, export_queue_bytes=5_000),
    ) as running:
        yield running


def planned(plan: MemoryPlan, name: str) -> int:
    return sum(part.num_bytes for part in plan.parts() if part.name.startswith(name))


def with_options(plan: MemoryPlan, **changes: Any) -> MemoryPlan:
    return replace(plan, options=replace(plan.options, **changes))


def weights_bytes(module: torch.nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_the_plan_is_what_the_engine_took(engine: LocalEngine) -> None:
    plan, drafter = engine.memory_plan, engine.core.drafts.drafter
    assert engine.pair.draft is not None and engine.drafts is not None
    assert isinstance(drafter, ModelDrafter) and engine.core.prefix_cache is not None
    assert planned(plan, "keys and values of the target") == engine.core.target.cache.num_bytes
    assert planned(plan, "keys and values of the draft") == drafter.runner.cache.num_bytes
    assert planned(plan, "prefix cache") == engine.core.prefix_cache.num_bytes > 0
    assert drafter.prefix_cache is not None
    assert planned(plan, "cached prefixes of the draft") == drafter.prefix_cache.num_bytes > 0
    assert planned(plan, "weights of the target") == weights_bytes(engine.pair.target)
    assert planned(plan, "weights of the draft as") == weights_bytes(engine.pair.draft)
    assert planned(plan, "weights of the live") == weights_bytes(engine.drafts.default.module)
    assert planned(plan, "records on their way") == 5_000


def test_the_outline_of_a_pair_plans_what_the_loaded_pair_does(
    tiny_pair: tuple[str, str], engine: LocalEngine
) -> None:
    options = EngineOptions(num_slots=3, max_seq_len=100, num_draft_tokens=8, export_queue_bytes=5_000)
    outlined = MemoryPlan.outlined(*tiny_pair, options, dtype="float32")
    assert replace(outlined, weights_loaded=True) == engine.memory_plan
    large = EngineOptions(num_slots=3, max_seq_len=10**9, prefix_cache_mib=0)
    half = MemoryPlan.outlined(*tiny_pair, large, dtype="bfloat16")
    assert half.target.column_bytes * 2 == outlined.target.column_bytes
    assert (half.options.max_seq_len, half.prefix_cache_bytes) == (512, 0)


def test_drafts_of_routes_are_planned_for_and_may_be_what_does_not_fit(engine: LocalEngine) -> None:
    plan = engine.memory_plan
    assert plan.draft is not None and planned(plan, "drafts of") == 0
    routed = with_options(plan, max_route_drafts=3)
    of_one = sum(
        planned(plan, name)
        for name in ("weights of the live", "keys and values of the draft", "cached prefixes of the draft")
    )
    assert planned(routed, "drafts of 3 more routes") == 3 * of_one
    there = sum(part.num_bytes for part in plan.parts() if not part.is_held)
    with pytest.raises(MemoryPlanError, match="or max_route_drafts=2 at both fits"):
        routed.require_fit(FreeMemory(there + 2 * of_one))
    unasked = with_options(plan, max_route_drafts=3, plans_route_drafts=False)
    assert planned(unasked, "drafts of") == 0 and unasked.fits(FreeMemory(there))
    assert re.search(r"MiB  more for each route with a draft of its own, at most 3,", unasked.lines()[-1])
    assert unasked.route_draft_bytes == of_one


def test_a_captured_generation_holds_no_more_than_was_planned_for_a_slot(engine: LocalEngine) -> None:
    sampling = SamplingParams(seed=1, max_tokens=90, ignore_eos=True)
    generation = engine.submit(GenerationRequest("c", (5, 6), sampling, capture=True)).result(30)
    of_slot = engine.memory_plan.capture_bytes // engine.memory_plan.options.num_slots
    assert 0 < sum(captured.num_bytes for captured in generation.captured_rounds) <= of_slot
    for captured in generation.captured_rounds:
        arrays = [value for value in vars(captured).values() if hasattr(value, "nbytes")]
        assert sum(array.nbytes for array in arrays) + len(arrays) * 100 < captured.num_bytes


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_a_refusal_names_numbers_that_fit_and_no_larger_ones(plan: MemoryPlan, share: float) -> None:
    held = sum(part.num_bytes for part in plan.parts() if part.is_held)
    free = FreeMemory(int(share * (sum(part.num_bytes for part in plan.parts()) - held)))
    with pytest.raises(MemoryPlanError) as refused:
        plan.require_fit(free)
    message = str(refused.value)
    assert f"num_slots={plan.options.num_slots} with max_seq_len={plan.options.max_seq_len}" in message
    offers = re.findall(r"(num_slots|max_seq_len)=(\d+) at this", message)
    least = [with_options(plan, num_slots=1), with_options(plan, max_seq_len=2)]
    assert len(offers) == sum(smaller.fits(free) for smaller in least)
    for name, number in offers:
        fitting = with_options(plan, **{name: int(number)})
        fitting.require_fit(free)
        assert not with_options(plan, **{name: int(number) + 1}).fits(free)


def test_what_fits_is_not_refused_and_host_and_device_are_looked_at_apart() -> None:
    plan = replace(PLANS[1], weights_loaded=True)
    plan.require_fit(FreeMemory(GIB))
    plan.require_fit(FreeMemory(GIB, host_bytes=GIB))
    on_host = sum(part.num_bytes for part in plan.parts() if part.on_host)
    plan.require_fit(FreeMemory(GIB, host_bytes=on_host))
    for free in (FreeMemory(GIB, host_bytes=on_host - 1), FreeMemory(1000, host_bytes=GIB)):
        with pytest.raises(MemoryPlanError, match="of the device's memory and"):
            plan.require_fit(free)


def test_where_nothing_alone_helps_the_refusal_says_so() -> None:
    with pytest.raises(MemoryPlanError, match="a smaller model or dtype=bfloat16"):
        PLANS[0].require_fit(FreeMemory(1000))


def test_an_engine_that_does_not_fit_takes_nothing_and_the_number_it_names_starts(
    tiny_pair: tuple[str, str],
) -> None:
    pair, free = load_pair(*tiny_pair), FreeMemory(2_000_000)
    with pytest.raises(MemoryPlanError) as refused:
        build_engine(pair, EngineOptions(num_slots=1000, max_seq_len=64), free=free)
    found = re.search(r"num_slots=(\d+) at this max_seq_len", str(refused.value))
    assert found is not None
    with build_engine(
        pair, options=EngineOptions(num_slots=int(found[1]), max_seq_len=64), free=free
    ) as engine:
        [generation] = engine.generate([[5]], SamplingParams(temperature=0.0, max_tokens=4))
    assert generation.finish_reason in {"length", "stop"}


def test_serve_refuses_before_it_starts_anything(tiny_pair: tuple[str, str]) -> None:
    def settings(**changes: int) -> Settings:
        return Settings.model_validate(
            {"serving": {"target": tiny_pair[0], "draft": tiny_pair[1], **changes}}
        )

    lines = check_memory(settings()).lines()
    assert sum("in all" in line for line in lines) == 2 and "in all" in lines[-1]
    assert any("for the learner" in line for line in lines)
    refused = r"serving: num_slots=1000000000 .* fits beside the learner's .* MiB; nothing was started"
    with pytest.raises(SettingsError, match=refused):
        check_memory(settings(num_slots=10**9))


def test_the_learner_is_planned_where_there_is_one(tiny_pair: tuple[str, str]) -> None:
    serving = {"target": tiny_pair[0], "draft": tiny_pair[1]}

    def plan(**sections: Any) -> ServicePlan:
        return ServicePlan.of(Settings.model_validate({"serving": serving} | sections))

    assert plan(cluster={"learn": False}).learner is None
    assert plan(serving={**serving, "capture_rate": 0.0}).learner is None
    unasked, asked = plan(), plan(serving={**serving, "max_route_drafts": 3})
    assert unasked.learner is not None and asked.learner is not None
    assert (unasked.learner.num_routes, asked.learner.num_routes) == (0, 3)
    assert unasked.learner_bytes > unasked.libraries_bytes > 50 * 2**20
    with pytest.raises(SettingsError, match="beside the learner's"):
        unasked.require_fit(unasked.learner_bytes + unasked.libraries_bytes)
    unasked.require_fit(unasked.learner_bytes + unasked.replica_bytes)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 5\ninactive_file 200\n"}, 500),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": ""}, None),
        ({"memory.max": "500", "memory.current": "700", "memory.stat": ""}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "900",
                "memory/memory.stat": "total_inactive_file 50",
            },
            150,
        ),
        ({}, None),
    ],
)
def test_a_containers_limit_counts_where_it_is_lower(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = host_free_bytes(tmp_path)
    assert found == expected if expected is not None else found > 1000
    assert free_memory(torch.device("cpu")).host_bytes is None
