"""What `benchmarks.gpu` measures: passes, rounds and generations of one pair, transformers beside the engine.

Transformers runs first: the engine changes how the models attend.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks import gpu_models
from benchmarks.gpu_models import SyntheticAcceptance, in_turn_s, pass_bytes, synchronize
from buffer.names import DEFAULT_ROUTE
from serving.drafters.model_drafter import ModelDrafter
from serving.engine import GenerationRequest, SamplingParams
from serving.engine.core import EngineCore
from serving.engine.draft_length import DraftLengthController
from serving.engine.engine import Engine
from serving.engine.passes.grouped_attention import use_grouped_attention, use_sdpa
from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_pass import SlotPass
from serving.engine.passes.static_check import static_error, static_pass_of
from serving.engine.proposal import DraftAssignment, DraftPlan, ServingDraft
from serving.engine.round import RoundReport, run_round
from serving.engine.sequence import Batch
from serving.engine.sequence import Sequence as RunningSequence

NUM_DRAFTS = 5
TARGET_TOKENS = (1, NUM_DRAFTS + 1)
_MOST_SHAPES = 256
_ROOM_TOKENS = 1024
"""Past the context: what the measured rounds may add to it."""


@dataclass(frozen=True)
class GpuPlan:
    """What is measured."""

    device: torch.device
    dtype: torch.dtype
    batches: tuple[int, ...]
    acceptance: float
    context_tokens: int
    prompt_tokens: int
    max_tokens: int
    copied_bytes: int
    calls: int
    repeats: int
    compiled: bool

    @property
    def max_seq_len(self) -> int:
        return self.context_tokens + _ROOM_TOKENS


class Bench:
    """A pair, its runners, and what was measured so far."""

    def __init__(self, plan: GpuPlan, target: gpu_models.Shape, draft: gpu_models.Shape) -> None:
        self.plan = plan
        self.models = {
            name: gpu_models.build(
                shape, max_positions=plan.max_seq_len, device=plan.device, dtype=plan.dtype, seed=seed
            )
            for seed, (name, shape) in enumerate((("target", target), ("draft", draft)))
        }
        self.copy_bytes_per_s = gpu_models.copy_bytes_per_s(plan.device, plan.copied_bytes, plan.repeats)
        self.metrics: dict[str, Any] = {
            "device": str(plan.device),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "copy_bytes_per_s": self.copy_bytes_per_s,
            "context_tokens": plan.context_tokens,
            "synthetic_acceptance": plan.acceptance,
            "passes": [],
            "rounds": [],
            "generation": [],
        }

    def run(self, profile: Path | None) -> dict[str, Any]:
        """Everything, in this order."""
        for batch in self.plan.batches:
            self._transformers_passes(batch)
            self._transformers_generate(batch)
        for model in self.models.values():
            use_grouped_attention(model)
        target, draft = self._runners()
        for batch in self.plan.batches:
            self._engine_passes(batch, target, draft)
            self._rounds(batch, target, draft)
        self.metrics["host_waits_a_round"] = self._host_waits(target, draft)
        if profile is not None:
            self._profile(profile, target, draft)
        for batch in self.plan.batches:
            self._engine_generates(batch, target, draft)
        for model in self.models.values():
            use_sdpa(model)
        return self.metrics

    def _runners(self) -> tuple[Runner, Runner]:
        plan = self.plan
        target = SyntheticAcceptance(
            self.models["target"],
            num_slots=max(plan.batches),
            max_seq_len=plan.max_seq_len,
            acceptance=plan.acceptance,
        )
        draft = Runner(self.models["draft"], num_slots=max(plan.batches), max_seq_len=plan.max_seq_len)
        for name, runner in (("target", target), ("draft", draft)):
            began_s = time.perf_counter()
            static = static_pass_of(runner, max_graphs=_MOST_SHAPES)
            self.metrics[f"static_error_{name}"] = static_error(runner, static)
            self.metrics[f"capture_s_{name}"] = time.perf_counter() - began_s
            self.metrics[f"num_captured_{name}"] = static.num_captured
            runner.static = static
        target.overrules = True
        return target, draft

    # -- passes -----------------------------------------------------------------------------------

    def _transformers_passes(self, batch: int) -> None:
        plan = self.plan
        for name, tokens in _measured_passes():
            model = self.models[name]
            cache = self._filled_cache(model, batch)
            token_ids = torch.zeros((batch, tokens), dtype=torch.int64, device=plan.device)

            def run(model: Any = model, cache: Any = cache, token_ids: torch.Tensor = token_ids) -> None:
                with torch.inference_mode():
                    model(input_ids=token_ids, past_key_values=cache, use_cache=True)
                cache.crop(-token_ids.shape[1])

            self._add_passes(name, batch, tokens, {"transformers eager": run})

    def _filled_cache(self, model: Any, batch: int) -> DynamicCache:
        config, plan = model.config, self.plan
        shape = batch, config.num_key_value_heads, plan.context_tokens, config.head_dim
        cache = DynamicCache()
        for layer in range(config.num_hidden_layers):
            keys, values = (0.5 * torch.randn(shape, device=plan.device).to(plan.dtype) for _ in range(2))
            cache.update(keys, values, layer)
        return cache

    def _engine_passes(self, batch: int, target: Runner, draft: Runner) -> None:
        for name, tokens in _measured_passes():
            runner = target if name == "target" else draft
            runner.cache.kv_L2SHTD.normal_(std=0.5)
            arms = {"engine eager": self._pass(runner, batch, tokens, None)}
            arms["engine static"] = self._pass(runner, batch, tokens, runner.static)
            self._add_passes(name, batch, tokens, arms)
            if self.plan.compiled:
                arms = {"engine static, compiled": self._pass(runner, batch, tokens, _compiled(runner))}
                try:
                    self._add_passes(name, batch, tokens, arms)
                except Exception as error:  # whatever the compiler raises, the other figures count
                    print(f"not compiled: {name} {batch} x {tokens}: {type(error).__name__}: {error}")

    def _pass(self, runner: Runner, batch: int, tokens: int, static: Any) -> Callable[[], None]:
        start = self.plan.context_tokens
        positions_BT = torch.arange(start, start + tokens, device=runner.device).expand(batch, -1)
        token_ids_BT = torch.zeros((batch, tokens), dtype=torch.int64, device=runner.device)

        def run() -> None:
            kept, runner.static = runner.static, static
            Runner.forward(runner, token_ids_BT, positions_BT, kv_len=start + tokens)
            runner.static = kept

        return run

    def _add_passes(self, model: str, batch: int, tokens: int, arms: dict[str, Callable[[], None]]) -> None:
        plan = self.plan
        floor_s = self._floor_s(model, batch, tokens)
        seconds = in_turn_s(arms, plan.device, calls=plan.calls, warm_ups=3, repeats=plan.repeats)
        for arm, each_s in seconds.items():
            row = {"model": model, "batch": batch, "tokens": tokens, "arm": arm}
            self.metrics["passes"].append(
                row | {"seconds": each_s, "floor_s": floor_s, "over_floor": each_s / floor_s}
            )

    def _floor_s(self, model: str, batch: int, tokens: int) -> float:
        kv_len = self.plan.context_tokens + tokens
        return pass_bytes(self.models[model], num_rows=batch, kv_len=kv_len) / self.copy_bytes_per_s

    # -- rounds -----------------------------------------------------------------------------------

    def _rounds(self, batch: int, target: Runner, draft: Runner) -> None:
        """At the set acceptance, the context growing as it goes; the drafter has caught up before."""
        plan, device = self.plan, self.plan.device
        run = self._round_of(batch, target, draft)
        while run().num_chunks:
            pass
        run()
        reports: list[RoundReport] = []
        seconds = in_turn_s(
            {"round": lambda: reports.append(run())}, device, calls=1, warm_ups=3, repeats=4 * plan.repeats
        )["round"]
        floor_s = self._floor_s("target", batch, NUM_DRAFTS + 1) + sum(
            self._floor_s("draft", batch, fed) for fed in range(1, NUM_DRAFTS + 1)
        )
        num_emitted = sum(len(advance.token_ids) for report in reports for advance in report.advances)
        self.metrics["rounds"].append(
            {
                "batch": batch,
                "num_draft_tokens": NUM_DRAFTS,
                "seconds": seconds,
                "propose_s": _median([report.propose_s for report in reports]),
                "target_pass_s": _median([report.target_pass_s for report in reports]),
                "floor_s": floor_s,
                "over_floor": seconds / floor_s,
                "block_efficiency": num_emitted / (batch * len(reports)),
            }
        )

    def _round_of(self, batch: int, target: Runner, draft: Runner) -> Callable[[], RoundReport]:
        """Rounds of `batch` sequences over made-up context, one a call."""
        plan = self.plan
        for runner in (target, draft):
            runner.cache.kv_L2SHTD.normal_(std=0.5)
        drafter = ModelDrafter(draft, chunk_tokens=plan.context_tokens)
        params = SamplingParams(temperature=0.0, max_tokens=_ROOM_TOKENS)
        prompt = tuple(index % 200 for index in range(plan.context_tokens))
        sequences = [
            RunningSequence(GenerationRequest(str(row), prompt, params), frozenset(), lambda event: None)
            for row in range(batch)
        ]
        state = Batch(sequences, plan.device, vocab_size=target.vocab_size)
        serving = ServingDraft(DEFAULT_ROUTE, drafter.draft_version)
        drafts = DraftPlan((serving,) * batch, (DraftAssignment(drafter, [NUM_DRAFTS] * batch),))
        return lambda: run_round(state, drafts, target)

    def _host_waits(self, target: Runner, draft: Runner) -> int | None:
        """Synchronisations of one round, as torch counts them; None where there is no device to wait for."""
        if self.plan.device.type != "cuda":
            return None
        run = self._round_of(1, target, draft)
        while run().num_chunks:
            pass
        run()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for warning in seen:
            print(f"wait: {warning.filename}:{warning.lineno} {str(warning.message)[:80]}")
        return sum("synchroniz" in str(warning.message) for warning in seen)

    def _profile(self, file: Path, target: Runner, draft: Runner) -> None:
        """Kernels and host calls of one target pass and of one round."""
        run_target = self._pass(target, 1, 1, target.static)
        run = self._round_of(1, target, draft)
        while run().num_chunks:
            pass
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.plan.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        tables = []
        for name, each in (("one target pass", run_target), ("one round", run)):
            each()
            synchronize(self.plan.device)
            with torch.profiler.profile(activities=activities) as profiler:
                each()
                synchronize(self.plan.device)
            averages = profiler.key_averages()
            key = "self_device_time_total" if len(activities) > 1 else "self_cpu_time_total"
            tables.append(f"{name}\n{averages.table(sort_by=key, row_limit=40, max_name_column_width=80)}\n")
        file.write_text("\n".join(tables), encoding="utf-8")

    # -- whole generations ------------------------------------------------------------------------

    def _transformers_generate(self, batch: int) -> None:
        plan = self.plan
        token_ids = torch.tensor(self._prompts(batch), device=plan.device)

        def run() -> None:
            self.models["target"].generate(
                token_ids,
                attention_mask=torch.ones_like(token_ids),
                max_new_tokens=plan.max_tokens,
                min_new_tokens=plan.max_tokens,
                do_sample=False,
            )

        self._add_generation("transformers generate", batch, run, None)

    def _engine_generates(self, batch: int, target: Runner, draft: Runner) -> None:
        """Without drafts and at the set acceptance."""
        prompts = self._prompts(batch)
        params = SamplingParams(temperature=0.0, max_tokens=self.plan.max_tokens)
        for arm, num_drafts in (("engine off", 0), ("engine, synthetic acceptance", NUM_DRAFTS)):
            for runner in (target, draft):
                runner.cache.clear_all()
            controller = DraftLengthController(None, fixed=num_drafts)
            with Engine(EngineCore(target, ModelDrafter(draft), controller=controller)) as engine:
                self._add_generation(arm, batch, partial(engine.generate, prompts, params), engine)

    def _prompts(self, batch: int) -> list[list[int]]:
        return [[(7 * row + index) % 200 for index in range(self.plan.prompt_tokens)] for row in range(batch)]

    def _add_generation(self, arm: str, batch: int, run: Callable[[], Any], engine: Engine | None) -> None:
        plan = self.plan
        seconds = in_turn_s({arm: run}, plan.device, calls=1, warm_ups=1, repeats=3)[arm]
        row: dict[str, Any] = {"arm": arm, "batch": batch, "seconds": seconds}
        row["tokens_per_s"] = batch * plan.max_tokens / seconds
        generate = next(
            (
                each["tokens_per_s"]
                for each in self.metrics["generation"]
                if each["arm"] == "transformers generate" and each["batch"] == batch
            ),
            row["tokens_per_s"],
        )
        row["over_transformers"] = row["tokens_per_s"] / generate
        if engine is not None:
            counts = engine.stats().counts.values()
            num_rounds = sum(count.num_rounds for count in counts)
            num_accepted = sum(count.num_accepted for count in counts)
            row["block_efficiency"] = 1.0 + num_accepted / max(1, num_rounds)
        self.metrics["generation"].append(row)


def _measured_passes() -> list[tuple[str, int]]:
    return [*(("target", tokens) for tokens in TARGET_TOKENS), ("draft", 1)]


def _compiled(runner: Runner) -> Any:
    """Static passes of compiled code: the same graphs, kernels fused."""
    torch._dynamo.config.recompile_limit = _MOST_SHAPES
    own = SlotPass(runner.model, runner.max_seq_len)
    compiled: Any = torch.compile(own, fullgraph=True, dynamic=False)
    return static_pass_of(runner, compiled, max_graphs=_MOST_SHAPES)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
