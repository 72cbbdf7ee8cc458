"""Who drafts how many tokens in a round, nobody included: the plan with the most expected tokens a second.

Expected tokens, from what is estimated of each row (see acceptance_belief), are summed over the batch and
divided by the cost table's seconds at its size (arXiv 2310.18813), so that load shortens drafts by itself.
Three kinds of plan compete: the model drafts for all rows; rows copy where that promises more, the model
drafts for the rest; rows copy, and no model runs. Where the rows have several models (drafts of several
routes), each makes passes of its own, and those whose rows promise too little sit the round out. A new length
must win by a margin. A way to draft that does not pay is probed now and then in one row, the one with the
least text to catch up with; the more probes fail, the rarer they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from buffer.names import DEFAULT_ROUTE
from serving.engine.acceptance_estimate import MODEL, Rates, RouteEstimates, SequenceEstimate
from serving.engine.cost_table import CostTable

MAX_DRAFT_TOKENS = 8
_MARGIN = 1.03
_UNPRICED = 1.05
"""What drafting must gain over none: the draft's prompts and the engine's own work on drafts are in no table.
Together with the margin it is what they cost at eight sequences on one core (3 % and 5 %)."""
_LEAST_INTERVAL = 16
_MOST_INTERVAL = 512
_SECONDS_KEPT_ROUNDS = 32


@dataclass(frozen=True)
class Row:
    """One sequence, as far as drafting goes."""

    route: str
    estimate: SequenceEstimate
    num_tokens: int
    max_draft_tokens: int
    """By what it may still emit and what its request allows."""
    num_matched: int = 0
    """Of what it could copy; 0: nothing."""
    draft: str | None = DEFAULT_ROUTE
    """The route of the model that would draft for it; None: it broke, or there is none."""


@dataclass(frozen=True)
class Lengths:
    """Draft tokens of a round, by row; no row has both."""

    by_model_B: list[int]
    copied_B: list[int]


@dataclass
class _Probe:
    """When to try again what does not pay: rounds between two tries double while they fail."""

    interval: int = _LEAST_INTERVAL
    num_waited: int = 0
    pending: bool = False

    def is_due(self, in_use: bool) -> bool:
        self.pending = False
        self.num_waited = 0 if in_use else self.num_waited + 1
        self.pending = self.num_waited >= self.interval
        return self.pending

    def judge(self, num_accepted: int) -> None:
        """Called for what was drafted in a probe; one that drafted nothing stays due."""
        self.pending, self.num_waited = False, 0
        self.interval = _LEAST_INTERVAL if num_accepted else min(_MOST_INTERVAL, 2 * self.interval)


class DraftLengthController:
    """Chooses the draft lengths of a round. A `fixed` length goes to the model, where there is one."""

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
        """By the route of the draft."""
        self._seconds: dict[int, tuple[list[float], list[float]]] = {}
        self._num_rounds = 0

    @property
    def current(self) -> int:
        """The model's length in use, probes aside."""
        return self._current

    @property
    def is_fixed(self) -> bool:
        return self._fixed is not None

    @property
    def longest(self) -> int:
        """No row is ever asked for more."""
        return self._longest if self._fixed is None else self._fixed

    def choose(self, rows: Sequence[Row], *, can_draft: bool = True) -> Lengths:
        """The lengths for the next round of these rows; `can_draft`: a model is there to draft."""
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
        """How one sequence's drafts fared in a round; `draft`: as in its row."""
        if not num_attempted:
            return
        probe = self._model_probe(draft) if num_matched == MODEL else self._copy_probe
        self._routes.observe(
            route, estimate, num_matched, num_attempted, num_accepted, is_probe=probe.pending
        )
        if probe.pending:
            probe.judge(num_accepted)

    def forget_model(self, is_served: Callable[[str], bool] = lambda route: True) -> None:
        """Another draft serves these routes; its acceptance is unknown, and worth finding out."""
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
        """[row][length]: expected tokens if the model drafts (nothing without one), and if the row copies."""
        by_model, by_copy = [], []
        for row in rows:
            drawn = can_draft and row.draft is not None
            rates = self._routes.rates(row.route, row.estimate, MODEL) if drawn else (0.0, 0.0)
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
        """The model's plan of length `current` and speed `base`, or a better one that copies."""
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
            drawing = {row.draft for row, copies in zip(rows, wins, strict=True) if row.draft and not copies}
            speed = tokens / (target_s[current] + len(drawing) * propose_s[current])
            if speed > best_speed:
                return _split(rows, current, wins, current)
        if alone:
            return _split(rows, 0, [copied is not None for copied in by_copy], best_length)
        return _split(rows, current, [False] * len(rows), current)

    def _with_probes(self, rows: Sequence[Row], lengths: Lengths, can_draft: bool) -> Lengths:
        """One row may be asked to try what does not seem to pay."""
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
        """Rows whose model has not drafted for as long as its probe waits."""
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
        """By draft length: the target's pass, and the model's proposal. Looked up anew now and then."""
        assert self._costs is not None
        self._num_rounds += 1
        if self._num_rounds % _SECONDS_KEPT_ROUNDS == 0:
            self._seconds.clear()
        known = self._seconds.get(batch_size)
        if known is None:
            known = self._seconds[batch_size] = self._costs.seconds_by_length(batch_size, self._longest)
        return known


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
    """Tokens a second of a round, and whose drafts it takes: as many of those that bring most as pay their
    own passes, one at least."""
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
    """Rows whose model is not among those that draft are as without one."""
    if all(row.draft in drafts for row in rows):
        return rows, by_model
    taken = [row.draft in drafts for row in rows]
    return (
        [row if takes else replace(row, draft=None) for row, takes in zip(rows, taken, strict=True)],
        [each if takes else [1.0] * len(each) for each, takes in zip(by_model, taken, strict=True)],
    )


def _split(rows: Sequence[Row], by_model: int, copies: list[bool], by_copy: int) -> Lengths:
    each = list(zip(rows, copies, strict=True))
    return Lengths(
        [0 if copied or row.draft is None else min(by_model, row.max_draft_tokens) for row, copied in each],
        [min(by_copy, row.max_draft_tokens) if copied else 0 for row, copied in each],
    )
