"""Compiled passes say what the model says, see swapped weights, and cost nothing where they cannot be had."""

import copy
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serving.compiling import Compiling
from serving.drafters.model_drafter import ModelDrafter
from serving.engine import GenerationRequest, SamplingParams
from serving.engine.core import EngineCore
from serving.engine.draft_length import DraftLengthController
from serving.engine.engine import Engine
from serving.engine.passes.compiled_pass import CompiledPass, agrees
from serving.engine.passes.pass_compiler import CompileError, compile_spec, load_compiled, package_path
from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_pass import SlotPass
from serving.engine.proposal import Proposal
from serving.local import LocalEngine, load_engine
from serving.models.loading import load_model
from serving.options import EngineOptions
from serving.runner_check import prepare_runner

PROMPTS = [[5, 9, 14], [40, 3, 7, 7, 7, 21, 30], [11]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, num_draft_tokens=3)
SHAPE = {"num_slots": 4, "max_seq_len": 96}

pytestmark = pytest.mark.timeout(900)


def runner_of(path: str) -> Runner:
    runner = Runner(load_model(path), **SHAPE)
    prepare_runner(runner, path)
    return runner


def texts(engine: LocalEngine) -> list[list[int]]:
    return [generation.output_token_ids for generation in engine.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tiny_pair: tuple[str, str]) -> str:
    """One layer; as target and draft at once it needs a single package."""
    return tiny_pair[1]


@pytest.fixture(scope="module")
def package(model: str) -> Path:
    """Waits for the compiler, some twenty seconds."""
    with load_engine(model, model, EngineOptions(**SHAPE, compile="on")) as engine:
        assert engine.compiling.state == "compiled"
    path = package_path(compile_spec(runner_of(model)))
    assert path.exists()
    return path


@pytest.mark.slow
def test_compiled_passes_give_the_same_greedy_text(model: str, package: Path) -> None:
    with (
        load_engine(model, model, EngineOptions(**SHAPE, compile="auto")) as compiled,
        load_engine(model, options=EngineOptions(**SHAPE)) as eager,
    ):
        assert compiled.compiling.state == "compiled", "the package of an earlier start serves at once"
        assert texts(compiled) == texts(eager)


@pytest.mark.slow
def test_compiled_passes_embed_prompts_and_serve_drafts_of_further_routes(model: str, package: Path) -> None:
    """One more package, for hidden states; a route's draft takes the first draft's."""
    router = {"max_route_drafts": 1, "num_draft_tokens": 3}
    request = GenerationRequest("r", tuple(range(5, 40)), GREEDY, route="sql", capture=True)
    embeddings = []
    for compile in ("off", "on"):
        with load_engine(model, model, EngineOptions(**SHAPE, **router, compile=compile)) as engine:
            assert engine.drafts is not None
            engine.drafts.follow(["sql"])
            runners = [
                drafter.runner for drafter in engine.core.drafts.drafters if hasattr(drafter, "runner")
            ]
            assert [runner.compiled is not None for runner in runners] == [compile == "on"] * 2
            generation = engine.submit(request).result(60)
            assert engine.stats().route_counts.keys() == {"sql"}
        assert generation.num_accepted == generation.num_attempted > 0
        embeddings.append(generation.prompt_embedding_H)
    eager_H, compiled_H = embeddings
    assert eager_H is not None and compiled_H is not None
    assert np.abs(eager_H - compiled_H).max() <= 2e-3 * np.abs(eager_H).max()


@pytest.mark.slow
def test_a_part_of_the_target_is_compiled_in_its_own_shape(model: str, package: Path) -> None:
    """Without feed-forward, with the map and a head over some tokens; over the target's slot cache, which the
    target reads after it."""
    options = EngineOptions(**SHAPE, num_draft_tokens=3, speculation="model")
    with (
        load_engine(model, "self:0:attention:40", replace(options, compile="on")) as compiled,
        load_engine(model, options=EngineOptions(**SHAPE)) as alone,
        load_engine(model, "self:0:attention:40", options) as eager,
    ):
        drafter = compiled.core.drafts.drafter
        assert isinstance(drafter, ModelDrafter) and drafter.runner.compiled is not None
        assert texts(compiled) == texts(alone) == texts(eager)
        accepted = [
            sum(generation.num_accepted for generation in engine.generate(PROMPTS, GREEDY))
            for engine in (compiled, eager)
        ]
        assert accepted[0] == pytest.approx(accepted[1], rel=0.1)  # draft ties may round either way


@pytest.mark.slow
def test_weights_changed_in_place_are_seen_by_compiled_passes(model: str, package: Path) -> None:
    runner = runner_of(model)
    slot_pass = SlotPass(runner.model, runner.max_seq_len)
    compiled = CompiledPass(package, slot_pass)
    before = copy.deepcopy(slot_pass)
    with torch.inference_mode():
        for weight in runner.model.parameters():
            weight.mul_(1.5)
    assert agrees(compiled, slot_pass, runner)
    assert not agrees(compiled, before, runner), "the comparison notices other weights"


@pytest.mark.slow
def test_a_package_that_disagrees_or_is_damaged_is_not_used(
    model: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(model)
    damaged = tmp_path / "damaged.pt2"
    damaged.write_bytes(package.read_bytes()[:1000])
    with pytest.raises(CompileError, match=r"damaged\.pt2 cannot be used"):
        load_compiled(runner, damaged)
    monkeypatch.setattr("serving.engine.passes.pass_compiler.agrees", lambda *_: False)
    with pytest.raises(CompileError, match="disagree with the model"):
        load_compiled(runner, package)


@pytest.mark.slow
def test_a_package_is_for_one_shape_of_model_and_cache(model: str, package: Path) -> None:
    longer = Runner(load_model(model), num_slots=4, max_seq_len=97)
    assert package_path(compile_spec(longer)) != package
    more_slots = Runner(load_model(model), num_slots=7, max_seq_len=96)
    prepare_runner(more_slots, model)
    assert package_path(compile_spec(more_slots)) == package, "the number of slots is not baked in"


@pytest.mark.slow
def test_serving_starts_eagerly_and_takes_the_package_when_it_is_ready(model: str, package: Path) -> None:
    with torch.inference_mode():
        aside = package.rename(package.with_suffix(".aside"))
        with load_engine(model, model, EngineOptions(**SHAPE, compile="auto")) as engine:
            assert engine.compiling.state == "eager (compiling)"
            first = texts(engine)
            aside.rename(package)  # another process finished it: the child finds it and leaves
            deadline_s = time.monotonic() + 300
            while "compiling" in engine.compiling.state and time.monotonic() < deadline_s:
                time.sleep(0.05)
            assert engine.compiling.state in ("compiled", "eager (compiled passes were not faster)")
            assert texts(engine) == first


class HeldDrafter(ModelDrafter):
    """Stays in the first round's proposal until it is let go."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        self.entered, self.let_go = threading.Event(), threading.Event()

    def propose(self, *args: Any) -> Proposal:
        self.entered.set()
        assert self.let_go.wait(300)
        return super().propose(*args)


def made_slow(runner: Runner) -> Runner:
    """The model's own code does work that no package has, so that compiled passes are faster for certain."""
    burden = torch.ones(500, 500)
    runner.model.register_forward_pre_hook(lambda *_: [burden @ burden for _ in range(8)] and None)
    return runner


def test_a_pass_that_becomes_ready_during_a_round_is_not_used_before_the_round_ends(
    model: str, package: Path
) -> None:
    aside = package.rename(package.with_suffix(".aside"))
    target, joined = made_slow(runner_of(model)), runner_of(model)
    compiling = Compiling(target, None, "auto")
    assert compiling.state == "eager (compiling)"
    compiling.join(joined)
    drafter = HeldDrafter(joined)
    aside.rename(package)
    with Engine(EngineCore(target, drafter, controller=DraftLengthController(None, fixed=3))) as engine:
        handle = engine.submit(GenerationRequest("r", tuple(PROMPTS[0]), GREEDY))
        assert drafter.entered.wait(60)
        compiling.start(engine)
        for thread in threading.enumerate():
            if thread.name == "everdraft-compile":
                thread.join(300)
        during = (compiling.state, target.compiled, joined.compiled)
        drafter.let_go.set()
        generation = handle.result(60)
        assert during == ("eager (compiling)", None, None)
        assert compiling.state == "compiled"
        assert target.compiled is not None and joined.compiled is not None
        assert generation.num_accepted == generation.num_attempted > 0


def test_without_a_compiler_auto_serves_eagerly_and_on_refuses(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    runner = runner_of(model)
    assert Compiling(runner, None, "auto").state == "eager (no C++ compiler is installed)"
    with pytest.raises(CompileError, match=r"compile='on' cannot be had: no C\+\+ compiler"):
        Compiling(runner, None, "on")
