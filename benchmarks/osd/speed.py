"""What the drafts that learnt are worth in time: the real engine, one or several requests at once, arms in
turn.

Speed-ups are medians of ratios within a turn, over the same engine without speculation. The prediction is the
cost model's: tokens a round, and how long the passes themselves take.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.adapted import Adapter
from benchmarks.engine_modes import EngineMode
from benchmarks.forwards import ForwardTimes, measure_forwards, pass_runners
from benchmarks.lineup import Lineup
from benchmarks.modes import Mode, ModeOutcome, Rounds
from benchmarks.osd.experiment_cache import Report
from benchmarks.osd.recorded_answers import Asking, RecordedAnswer
from serving.compiling import CompileChoice
from serving.engine.counters import acceptance_rate, block_efficiency
from serving.local import build_engine
from serving.models.loading import ModelPair
from serving.models.target_part import own_copy
from serving.options import EngineOptions

OFF = "off"
NUM_TOKENS = 64
"""The most of an answer; it ends where the target ends it."""


def measure_speed(
    pairs: Mapping[str, ModelPair],
    adapters: Mapping[str, str],
    asked: Sequence[RecordedAnswer],
    *,
    turns: int,
    compile: CompileChoice,
    report: Report,
    num_clients: int = 1,
    temperature: float = 0.0,
) -> dict[str, dict[str, Any]]:
    """By arm. `pairs`: each arm's, of the same target. `adapters`: the folder of each arm's adapter, empty
    for the floor."""
    prompts = [one.prompt_token_ids.tolist() for one in asked]
    longest = max(Asking().prompt_tokens, *map(len, prompts))  # one room, so that domains share packages
    room = longest + NUM_TOKENS + 16
    how = room, num_clients, compile
    makers = {arm: _maker(pairs[arm], folder, *how, None) for arm, folder in adapters.items()}
    makers = {OFF: _maker(next(iter(pairs.values())), "", *how, 0), **makers}

    def on_turn(arm: str, turn: int) -> None:
        report(f"{arm}, turn {turn} of {turns}")

    outcomes = _outcomes(makers, prompts, turns, num_clients, temperature, on_turn)
    forwards, found = dict[str, ForwardTimes](), dict[str, dict[str, Any]]()
    for pair in dict.fromkeys(pairs.values()):
        runners = pass_runners(pair, num_slots=num_clients, max_seq_len=room, compile=compile)
        times = measure_forwards(runners, batch_size=num_clients, context_tokens=room // 2)
        forwards |= {arm: times for arm in adapters if pairs[arm] is pair}
        found.setdefault("passes", {})[pair.draft_id] = {"by": runners.passes, **asdict(times)}
    for arm, own in outcomes.items():
        found[arm] = _figures(own, outcomes[OFF], forwards.get(arm))
        if temperature == 0.0:
            found[arm]["identical"] = all(
                one.output_token_ids == other.output_token_ids
                for one, other in zip(own, outcomes[OFF], strict=True)
            )
    return found


def _outcomes(
    makers: Mapping[str, Callable[[], Mode]],
    prompts: list[list[int]],
    turns: int,
    num_clients: int,
    temperature: float,
    on_turn: Callable[[str, int], None],
) -> dict[str, list[ModeOutcome]]:
    """By arm, in turn; the first turn warms up."""
    lineup = Lineup(makers)
    outcomes: dict[str, list[ModeOutcome]] = {arm: [] for arm in makers}
    try:
        for turn in range(turns + 1):
            for arm, kept in outcomes.items():
                on_turn(arm, turn)
                outcome = lineup.run(
                    arm, prompts, concurrency=num_clients, num_tokens=NUM_TOKENS, temperature=temperature
                )
                if isinstance(outcome, str):
                    raise RuntimeError(f"{arm} could not run: {outcome}")
                if turn:
                    kept.append(outcome)
    finally:
        lineup.close()
    return outcomes


def _figures(
    own: Sequence[ModeOutcome], off: Sequence[ModeOutcome], forwards: ForwardTimes | None
) -> dict[str, Any]:
    """`forwards` None: nothing is drafted."""
    ratios = [one.tokens_per_s / other.tokens_per_s for one, other in zip(own, off, strict=True)]
    rounds = sum((outcome.rounds or Rounds() for outcome in own), Rounds())
    efficiency = block_efficiency(sum(outcome.num_tokens for outcome in own), rounds.num_rounds)
    drafted = rounds.num_drafted / max(1, rounds.num_rounds)
    predicted = 1.0 if forwards is None else forwards.predicted_speedup(efficiency, drafted, drafted)
    return {
        "tokens_per_s": statistics.median(outcome.tokens_per_s for outcome in own),
        "speedup": statistics.median(ratios),
        "predicted": predicted,
        "measured_over_predicted": statistics.median(ratios) / predicted,
        "acceptance_rate": acceptance_rate(rounds.num_accepted, rounds.num_attempted),
        "block_efficiency": efficiency,
        "num_draft_tokens": drafted,
    }


def _maker(
    pair: ModelPair, folder: str, room: int, num_slots: int, compile: CompileChoice, cap: int | None
) -> Any:
    def make() -> Mode:
        engine = build_engine(
            replace(pair, draft=adapted(pair, folder)),
            options=EngineOptions(
                num_slots=num_slots,
                max_seq_len=room,
                speculation="model",
                compile=compile,
                prefix_cache_mib=0,
            ),
        )
        return EngineMode(engine, cap=cap, ignore_eos=False)

    return make


def adapted(pair: ModelPair, folder: str) -> nn.Module:
    """The draft with the adapter of a folder in it; the floor for none."""
    assert pair.draft is not None
    if not folder:
        return own_copy(pair.draft)
    return Adapter.load(Path(folder)).merged(pair.draft)
