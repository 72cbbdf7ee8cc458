"""Chooses who drafts how many tokens in a round: the plan with the most expected tokens a second.

Expected tokens come from the acceptance estimate of each row (see acceptance_estimate), are summed over the
batch and divided by the cost table's seconds at its size (arXiv 2310.18813), so that drafts get shorter under
load. Three kinds of plan compete: the model drafts for all rows; the model drafts, except for rows where a
copy has more expected tokens; rows copy, and no model runs. Rows may have different models (drafts of several
routes); each model makes its own passes, and models whose rows gain too little do not draft in this round. A
new length must win by a margin. A way to draft that does not pay is probed now and then in one row: for a
model the row with the fewest tokens to catch up with, for a copy the one with the longest match. The more
probes fail, the rarer they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from buffer.names import DEFAULT_ROUTE
from serving.engine.acceptance_estimate import MODEL, Rates, RouteEstimates, SequenceEstimate
from serving.engine.cost_table import CostTable

MAX_DRAFT_TOKENS = 8
_MARGIN = 1.03
_UNPRICED = 1.05
"""Factor by which drafting must beat plain decoding: the cost table has neither the draft's prompts nor the
engine's own work on drafts. Times the margin it is their cost at eight sequences on one core: 3 % and 5 %."""
_LEAST_INTERVAL = 16
_MOST_INTERVAL = 512
_SECONDS_KEPT_ROUNDS = 32


@dataclass(frozen=True)
class Row:
    """What the choice of draft lengths needs to know of one sequence."""

    route: str
    estimate: SequenceEstimate
    num_tokens: int
    max_draft_tokens: int
    """Limit from the tokens it may still emit and from its request."""
    num_matched: int = 0
    """Context tokens that a copy would continue; 0: it cannot copy."""
    draft: str | None = DEFAULT_ROUTE
    """Route of the model that would draft for it; None: that model broke, or there is none."""


@dataclass(frozen=True)
class Lengths:
    """Draft tokens of a round, by row; no row has both kinds."""

    by_model_B: list[int]
    copied_B: list[int]


@dataclass
class _Probe:
    """When to retry a way to draft that does not pay: the rounds between two tries double while they fail."""

    interval: int = _LEAST_INTERVAL
    num_waited: int = 0
    pending: bool = False

    def is_due(self, in_use: bool) -> bool:
        self.pending = False
        self.num_waited = 0 if in_use else self.num_waited + 1
        self.pending = self.num_waited >= self.interval
        return self.pending

    def judge(self, num_accepted: int) -> None:
        """Called with the outcome of a probe; a probe that drafted nothing stays due."""
        self.pending, self.num_waited = False, 0
        self.interval = _LEAST_INTERVAL if num_accepted else min(_MOST_INTERVAL, 2 * self.interval)


class DraftLengthController:
    """Chooses the draft lengths of a round. A `fixed` length applies to the model, or to copies if there is
    none."""

    def __init__(
        self, costs: CostTable | None, *, fixed: int | None = None, max_draft_tokens: int = MAX_DRAFT_TOKENS
    ) -> None:
        self._costs = costs
        self._fixed = fixed
        self._longest = max_draft_tokens
        self._current = 3 if fixed is None else fixed
        self.num_copied = 0
        """The longest copy of the last round."""
        self._routes = RouteEstimates()
        self._copy_probe = _Probe()
        self._model_probes: dict[str, _Probe] = {}
        """Keys are routes of drafts."""
        self._seconds: dict[int, tuple[list[float], list[float]]] = {}
        self._num_rounds = 0

    @property
    def current(self) -> int:
        """The model's draft length in use, without probes."""
        return self._current

    @property
    def is_fixed(self) -> bool:
        return self._fixed is not None

    @property
    def longest(self) -> int:
        """Upper bound on the draft length of any row."""
        return self._longest if self._fixed is None else self._fixed

    def choose(self, rows: Sequence[Row], *, can_draft: bool = True) -> Lengths:
        """The lengths for the next round of these rows; `can_draft`: a model can draft."""
        can_draft = can_draft and any(row.draft is not None for row in rows)
        if self._fixed is not None or self._costs is None:
            return self._fixed_lengths(rows, can_draft)
        by_model, by_copy = self._expected(rows, can_draft)
        able_rows = rows
        target_s, propose_s = self._round_seconds(len(rows))
        if can_draft:
            drafting = [
                _fastest_drafts(rows, [row[length] for row in by_model], target_s[length], propose_s[length])
                for length in range(self._longest + 1)
            ]
            promised = [_UNPRICED * drafting[0][0], *(speed for speed, _ in drafting[1:])]
            best = max(range(len(promised)), key=promised.__getitem__)
            if promised[best] > _MARGIN * promised[self._current]:
                self._current = best
            current, (base, drafts) = self._current, drafting[self._current]
            rows, by_model = _sit_out(rows, by_model, drafts)
        else:
            base, current = len(rows) / target_s[0], 0
        lengths = self._with_copies(rows, current, base, by_model, by_copy, target_s, propose_s)
        self.num_copied = max(lengths.copied_B)
        return self._with_probes(able_rows, lengths, can_draft)

    def observe(
        self,
        route: str,
        estimate: SequenceEstimate,
        num_matched: int,
        num_attempted: int,
        num_accepted: int,
        draft: str = DEFAULT_ROUTE,
    ) -> None:
        """Add the outcome of one sequence's draft tokens in a round; `draft` is `Row.draft`."""
        if not num_attempted:
            return
        probe = self._model_probe(draft) if num_matched == MODEL else self._copy_probe
        self._routes.observe(
            route, estimate, num_matched, num_attempted, num_accepted, is_probe=probe.pending
        )
        if probe.pending:
            probe.judge(num_accepted)

    def forget_model(self, is_served: Callable[[str], bool] = lambda route: True) -> None:
        """Another draft serves these routes: drop the estimates, and probe it soon."""
        self._routes.forget_model(is_served)
        self._model_probes = {
            draft: probe for draft, probe in self._model_probes.items() if not is_served(draft)
        }

    def _fixed_lengths(self, rows: Sequence[Row], can_draft: bool) -> Lengths:
        copies = [row.num_matched > 0 and not (can_draft and row.draft is not None) for row in rows]
        lengths = _split(rows, self._current if can_draft else 0, copies, self._current)
        self.num_copied = max(lengths.copied_B)
        return lengths

    def _expected(
        self, rows: Sequence[Row], can_draft: bool
    ) -> tuple[list[list[float]], list[list[float] | None]]:
        """[row][length]: expected tokens if the model drafts (1 each without one), and if the row copies."""
        by_model, by_copy = [], []
        for row in rows:
            has_model = can_draft and row.draft is not None
            rates = self._routes.rates(row.route, row.estimate, MODEL) if has_model else (0.0, 0.0)
            by_model.append(_expected_tokens(rates, row.max_draft_tokens, self._longest))
            copied = None
            if row.num_matched:
                rates = self._routes.rates(row.route, row.estimate, row.num_matched)
                copied = _expected_tokens(rates, row.max_draft_tokens, self._longest)
            by_copy.append(copied)
        return by_model, by_copy

    def _with_copies(
        self,
        rows: Sequence[Row],
        current: int,
        base: float,
        by_model: list[list[float]],
        by_copy: list[list[float] | None],
        target_s: list[float],
        propose_s: list[float],
    ) -> Lengths:
        """The plan in which the model drafts `current` tokens at speed `base`, or a faster one that
        copies."""
        best_speed, best_length, alone = _MARGIN * base, 0, False
        if not any(copied is not None for copied in by_copy):
            return _split(rows, current, [False] * len(rows), current)
        for length in range(1, self._longest + 1):
            tokens = sum(1.0 if copied is None else copied[length] for copied in by_copy)
            if tokens / target_s[length] > best_speed:
                best_speed, best_length, alone = tokens / target_s[length], length, True
        wins = [
            copied is not None and copied[current] > model[current]
            for model, copied in zip(by_model, by_copy, strict=True)
        ]
        if current and any(wins):
            tokens = sum(
                max(model[current], 0.0 if copied is None else copied[current])
                for model, copied in zip(by_model, by_copy, strict=True)
            )
            drafting = {row.draft for row, copies in zip(rows, wins, strict=True) if row.draft and not copies}
            speed = tokens / (target_s[current] + len(drafting) * propose_s[current])
            if speed > best_speed:
                return _split(rows, current, wins, current)
        if alone:
            return _split(rows, 0, [copied is not None for copied in by_copy], best_length)
        return _split(rows, current, [False] * len(rows), current)

    def _with_probes(self, rows: Sequence[Row], lengths: Lengths, can_draft: bool) -> Lengths:
        """Let one row probe a way to draft that is due for a retry."""
        able = [index for index, row in enumerate(rows) if row.max_draft_tokens]
        if not able:
            return lengths
        matched = [index for index in able if rows[index].num_matched]
        due = self._rows_of_due_models(rows, lengths) if can_draft else []
        probed = [index for index in able if index in due]
        if probed:
            row = min(probed, key=lambda index: rows[index].num_tokens)
            lengths.by_model_B[row], lengths.copied_B[row] = 1, 0
        elif matched and self._copy_probe.is_due(in_use=any(lengths.copied_B)):
            row = max(matched, key=lambda index: rows[index].num_matched)
            length = max(1, min(lengths.by_model_B[row], rows[row].max_draft_tokens))
            lengths.copied_B[row], lengths.by_model_B[row] = length, 0
        return lengths

    def _rows_of_due_models(self, rows: Sequence[Row], lengths: Lengths) -> list[int]:
        """Rows whose model has not drafted for as long as the interval of its probe."""
        by_draft: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            if row.draft is not None:
                by_draft.setdefault(row.draft, []).append(index)
        return [
            index
            for draft, indexes in by_draft.items()
            if self._model_probe(draft).is_due(in_use=any(lengths.by_model_B[index] for index in indexes))
            for index in indexes
        ]

    def _model_probe(self, draft: str) -> _Probe:
        return self._model_probes.setdefault(draft, _Probe())

    def _round_seconds(self, batch_size: int) -> tuple[list[float], list[float]]:
        """Seconds by draft length of the target's pass and of a model's proposal, refreshed every few
        rounds."""
        assert self._costs is not None
        self._num_rounds += 1
        if self._num_rounds % _SECONDS_KEPT_ROUNDS == 0:
            self._seconds.clear()
        seconds = self._seconds.get(batch_size)
        if seconds is None:
            seconds = self._seconds[batch_size] = self._costs.seconds_by_length(batch_size, self._longest)
        return seconds


def _expected_tokens(rates: Rates, max_draft_tokens: int, longest: int) -> list[float]:
    """[length]: output tokens of a round with that many drafts, the bonus or recovered one included."""
    expected, reached = [1.0], 1.0
    for position in range(longest):
        reached *= 0.0 if position >= max_draft_tokens else rates[min(position, 1)]
        expected.append(expected[-1] + reached)
    return expected


def _fastest_drafts(
    rows: Sequence[Row], tokens_B: Sequence[float], target_s: float, propose_s: float
) -> tuple[float, frozenset[str]]:
    """Tokens a second of a round and the drafts that take part: by descending gain as many as raise the
    speed, at least one."""
    gains: dict[str, float] = {}
    for row, tokens in zip(rows, tokens_B, strict=True):
        if row.draft is not None:
            gains[row.draft] = gains.get(row.draft, 0.0) + tokens - 1.0
    by_gain = sorted(gains, key=lambda draft: -gains[draft])
    speeds, tokens, seconds = [], float(len(rows)), target_s
    for draft in by_gain:
        tokens, seconds = tokens + gains[draft], seconds + propose_s
        speeds.append(tokens / seconds)
    best = max(range(len(speeds)), key=speeds.__getitem__)
    return speeds[best], frozenset(by_gain[: best + 1])


def _sit_out(
    rows: Sequence[Row], by_model: list[list[float]], drafts: frozenset[str]
) -> tuple[Sequence[Row], list[list[float]]]:
    """Treat rows whose model is not in `drafts` as rows without a model."""
    if all(row.draft in drafts for row in rows):
        return rows, by_model
    drafting = [row.draft in drafts for row in rows]
    return (
        [
            row if drafts_now else replace(row, draft=None)
            for row, drafts_now in zip(rows, drafting, strict=True)
        ],
        [
            each if drafts_now else [1.0] * len(each)
            for each, drafts_now in zip(by_model, drafting, strict=True)
        ],
    )


def _split(rows: Sequence[Row], by_model: int, copies: list[bool], by_copy: int) -> Lengths:
    each = list(zip(rows, copies, strict=True))
    return Lengths(
        [0 if copied or row.draft is None else min(by_model, row.max_draft_tokens) for row, copied in each],
        [min(by_copy, row.max_draft_tokens) if copied else 0 for row, copied in each],
    )
