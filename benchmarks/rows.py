"""From turns to figures: one row a mode and setting, as the report has them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.forwards import ForwardTimes
from benchmarks.modes import REFERENCE, ModeOutcome, Rounds
from serving.engine.counters import acceptance_rate, block_efficiency

KEYS = (
    "mode",
    "concurrency",
    "dtype",
    "temperature",
    "prompt_tokens",
    "tokens_per_s",
    "acceptance_rate",
    "block_efficiency",
    "measured_speedup",
    "predicted_speedup",
)
"""Of every row; where a mode could not run there is a `note` too."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all modes are asked to do."""

    concurrency: int
    dtype: str
    temperature: float
    prompt_tokens: int

    @property
    def kind(self) -> str:
        """All but the concurrency, in words."""
        drawn = f"temperature {self.temperature:g}" if self.temperature else "greedy"
        return f"{self.dtype}, {drawn}, {self.prompt_tokens} prompt tokens"


@dataclass(frozen=True)
class MeasuredSetting:
    """All turns of one setting."""

    setting: Setting
    outcomes: Mapping[str, Sequence[ModeOutcome]]
    """By mode, in turn; fewer than the others' for a mode that failed."""
    notes: Mapping[str, str]
    """Why a mode has no figures."""
    forwards: ForwardTimes
    passes: str = "eager"
    """What ran the passes of the engines."""

    def rows(self) -> list[Row]:
        return [self._row(mode) for mode in self.outcomes]

    def rates(self, mode: str) -> list[float]:
        """Tokens a second, turn by turn; empty for a mode that failed."""
        return [] if mode in self.notes else [outcome.tokens_per_s for outcome in self.outcomes[mode]]

    def num_identical(self, mode: str) -> tuple[int, int]:
        """Of the mode's outputs, those that are the reference's token by token; and all compared."""
        if mode in self.notes or REFERENCE in self.notes:
            return 0, 0
        pairs = [
            (own, reference)
            for one, other in zip(self.outcomes[mode], self.outcomes[REFERENCE], strict=True)
            for own, reference in zip(one.output_token_ids, other.output_token_ids, strict=True)
        ]
        return sum(own == reference for own, reference in pairs), len(pairs)

    def _row(self, mode: str) -> Row:
        setting, rates = self.setting, self.rates(mode)
        row: Row = dict.fromkeys(KEYS)
        row |= {
            "mode": mode,
            "concurrency": setting.concurrency,
            "dtype": setting.dtype,
            "temperature": setting.temperature,
            "prompt_tokens": setting.prompt_tokens,
        }
        if not rates:
            return row | {"note": self.notes[mode]}
        row["tokens_per_s"] = statistics.median(rates)
        if reference := self.rates(REFERENCE):
            ratios = [own / other for own, other in zip(rates, reference, strict=True)]
            row["measured_speedup"] = statistics.median(ratios)
        return row | self._round_figures(mode)

    def _round_figures(self, mode: str) -> Row:
        outcomes = self.outcomes[mode]
        rounds = [outcome.rounds for outcome in outcomes if outcome.rounds is not None]
        if len(rounds) < len(outcomes):
            return {}
        total = sum(rounds, Rounds())
        efficiency = block_efficiency(sum(outcome.num_tokens for outcome in outcomes), total.num_rounds)
        return {
            "acceptance_rate": acceptance_rate(total.num_accepted, total.num_attempted)
            if total.num_attempted
            else None,
            "block_efficiency": efficiency,
            "predicted_speedup": self.forwards.predicted_speedup(
                efficiency,
                total.num_drafted / total.num_rounds,
                (total.num_drafted - total.num_copied) / total.num_rounds,
            ),
        }
