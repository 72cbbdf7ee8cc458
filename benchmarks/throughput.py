"""Tokens a second of every mode on the same work: one setting after the other.

Same target, draft, prompts, lengths, dtype and threads; modes run in turn (A B C A B C ...) after a warm-up,
so that a machine whose speed drifts treats them alike; figures are medians over the turns, speed-ups medians
of the turns' ratios. No prompt comes twice, so nobody gains from having seen it.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.adapted import Adapter, Cycle, Recipe, adapter_for
from benchmarks.engine_modes import make_engines
from benchmarks.forwards import PassRunners, measure_forwards, pass_runners
from benchmarks.lineup import Lineup
from benchmarks.modes import MODES, ModeOutcome
from benchmarks.peers import make_peers
from benchmarks.prompts import demo_prompts, folder_prompts
from benchmarks.rows import MeasuredSetting, Row, Setting
from learner.settings import LearnerSettings
from serving.compiling import CompileChoice
from serving.models.loading import ModelPair, load_pair

WARM_UP_TOKENS = 16
ROOMS = (512, 1152)
"""Columns of a slot: few lengths, since passes are compiled for each."""
NOTES = (
    "output tokens over the wall time from the first submission to the last token, prefill included; every "
    "mode emits exactly num_output_tokens a prompt, end of text or not",
    "`concurrency` prompts are under way at any time: when one is answered the next is asked; only "
    "transformers_generate takes them in batches, the next when all of one are answered",
    "transformers' assisted generation and prompt lookup take one sequence at a time: prompts asked at once "
    "run one after another there",
    "assisted generation has the adapted draft; its default schedule, and a fixed length equal to ours",
    "transformers_continuous: its manager is started before the clock is",
    "predicted_speedup: measured block efficiency over what the forwards alone cost at the mean draft length",
)

Report = Callable[[str], None]


@dataclass(frozen=True)
class ThroughputPlan:
    """What to measure."""

    target: str
    draft: str
    settings: tuple[Setting, ...]
    turns: int = 3
    num_output_tokens: int = 48
    """About as long as the demo's answers: what follows the end of one is noise that no draft can learn."""
    data: Path | None = None
    """A folder of prompts; None: the demo's."""
    adapter: Path | None = None
    """A PEFT folder; None: learnt here, and kept in `cache`."""
    cache: Path = Path()
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    """How the adapter is learnt here."""
    recipe: Recipe = field(default_factory=Recipe)
    compile: CompileChoice = "auto"
    """auto waits for compiled passes where they can be had."""
    modes: tuple[str, ...] = MODES
    prompts_per_turn: int = 20
    """At least, in a multiple of the concurrency; twenty: four of each of the demo's domains."""

    @property
    def num_steps(self) -> int:
        """How often `report` is called while modes run."""
        return len(self.settings) * (self.turns + 1) * len(self.modes)


def quick_settings() -> tuple[Setting, ...]:
    return tuple(Setting(concurrency, "float32", 0.0, 64) for concurrency in (1, 8))


def full_settings() -> tuple[Setting, ...]:
    grid = product(("float32", "bfloat16"), (64, 1000), (0.0, 1.0), (1, 4, 8, 16))
    return tuple(
        Setting(concurrency, dtype, temperature, prompt_tokens)
        for dtype, prompt_tokens, temperature, concurrency in grid
    )


def measure(
    plan: ThroughputPlan, *, on_cycle: Callable[[Cycle], None], report: Report
) -> Iterator[MeasuredSetting]:
    """One setting after the other. `report` hears of each mode's turn, `on_cycle` of the draft's learning."""
    pair = load_pair(plan.target, plan.draft)
    adapter = adapter_for(pair, plan.adapter, plan.cache, plan.learner, on_cycle, plan.recipe)
    models: tuple[str, int] | None = None
    lineup = Lineup({})
    try:
        for setting in plan.settings:
            if models != (setting.dtype, setting.prompt_tokens):
                models = (setting.dtype, setting.prompt_tokens)
                lineup.close()
                pair = load_pair(plan.target, plan.draft, dtype=setting.dtype)
                runners, lineup = _lineup(plan, pair, adapter, setting.prompt_tokens)
                prompts = _prompts(plan, pair, setting.prompt_tokens)
            yield _measure_setting(plan, setting, runners, lineup, prompts, report)
    finally:
        lineup.close()


def figures(
    plan: ThroughputPlan, measured: list[MeasuredSetting]
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The report's metrics and series."""
    rows: list[Row] = [row for one in measured for row in one.rows()]
    metrics = {
        "rows": rows,
        "num_turns": plan.turns,
        "num_output_tokens": plan.num_output_tokens,
        "num_threads": torch.get_num_threads(),
        "prompts": str(plan.data or "demo"),
        "passes": sorted({one.passes for one in measured}),
        "greedy_float32_identical_fraction": _identical_fractions(measured),
        "notes": list(NOTES),
    }
    series: dict[str, list[Any]] = {"turns": [], "forwards": []}
    for one in measured:
        label = vars(one.setting)
        series["turns"] += [label | {"mode": mode, "tokens_per_s": one.rates(mode)} for mode in plan.modes]
        series["forwards"].append(label | vars(one.forwards))
    return metrics, series


def _lineup(
    plan: ThroughputPlan, pair: ModelPair, adapter: Adapter | None, prompt_tokens: int
) -> tuple[PassRunners, Lineup]:
    """All modes, on this pair's weights, and the bare passes of the engines among them."""
    assert pair.draft is not None
    adapted: nn.Module | None = adapter.merged(pair.draft) if adapter is not None else None
    concurrency = max(setting.concurrency for setting in plan.settings)
    needed = prompt_tokens + plan.num_output_tokens
    room = next((room for room in ROOMS if room >= needed), needed)
    peers = make_peers(
        copy.deepcopy(pair.target),  # engines exchange the attention of the one that they share
        adapted,
        concurrency=concurrency,
        prompt_tokens=prompt_tokens,
        num_tokens=plan.num_output_tokens,
    )
    runners = pass_runners(pair, num_slots=concurrency, max_seq_len=room, compile=plan.compile)
    engines = make_engines(pair, adapted, num_slots=concurrency, max_seq_len=room, compile=plan.compile)
    return runners, Lineup(peers | engines)


def _prompts(plan: ThroughputPlan, pair: ModelPair, num_tokens: int) -> Iterator[list[int]]:
    assert pair.tokenizer is not None, "prompts are text"
    if plan.data is not None:
        return folder_prompts(pair.tokenizer, plan.data, num_tokens)
    return demo_prompts(pair.tokenizer, num_tokens)


def _measure_setting(
    plan: ThroughputPlan,
    setting: Setting,
    runners: PassRunners,
    lineup: Lineup,
    prompts: Iterator[list[int]],
    report: Report,
) -> MeasuredSetting:
    outcomes: dict[str, list[ModeOutcome]] = {mode: [] for mode in plan.modes}
    notes: dict[str, str] = {}
    forwards = measure_forwards(
        runners,
        batch_size=setting.concurrency,
        context_tokens=setting.prompt_tokens + plan.num_output_tokens // 2,
    )
    for turn in range(plan.turns + 1):
        num_rounds = math.ceil(plan.prompts_per_turn / setting.concurrency) if turn else 1
        num_prompts = setting.concurrency * num_rounds
        num_tokens = plan.num_output_tokens if turn else min(WARM_UP_TOKENS, plan.num_output_tokens)
        asked = list(islice(prompts, num_prompts))
        for mode in plan.modes:
            report(f"{setting.kind}, {setting.concurrency} at once, turn {turn}/{plan.turns}: {mode}")
            if mode in notes:
                continue
            outcome = lineup.run(
                mode,
                asked,
                concurrency=setting.concurrency,
                num_tokens=num_tokens,
                temperature=setting.temperature,
            )
            if isinstance(outcome, str):
                notes[mode] = outcome
            elif turn:
                outcomes[mode].append(outcome)
    return MeasuredSetting(setting, outcomes, notes, forwards, runners.passes)


def _identical_fractions(measured: list[MeasuredSetting]) -> dict[str, float]:
    """By mode: how many outputs equal those of the reference; the same target must say the same."""
    fractions = {}
    for mode in measured[0].outcomes:
        counts = [
            one.num_identical(mode)
            for one in measured
            if one.setting.temperature == 0.0 and one.setting.dtype == "float32"
        ]
        if compared := sum(count for _, count in counts):
            fractions[mode] = sum(count for count, _ in counts) / compared
    return fractions
