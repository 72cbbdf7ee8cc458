"""Decides which sequences take part in the next round. Touches no tensor.

Running sequences hold the slots 0 .. len(running) - 1, in order; one more may be in prefill, in the slot
right behind them. When a sequence leaves, the last one moves into its slot, so that a pass always runs
contiguous slots.

Waiting requests of one tenant are served in the order of their arrival; among tenants the next slot goes to
whoever had the fewest tokens computed so far, prompts and outputs alike (arXiv 2401.00588). Whoever comes
back after a pause counts as if it had been served as much as whoever got the last slot: a pause saves up
nothing. With one tenant, or none, that is first come, first served.
"""

from collections import defaultdict, deque
from dataclasses import dataclass

from serving.engine.sequence import Sequence


@dataclass(frozen=True)
class Move:
    """The sequence in `source` now owns slot `destination`."""

    source: int
    destination: int
    length: int
    """Columns of the target's slot that are in use."""


class Scheduler:
    """Tenants are few: what each was served is kept for good."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.waiting: deque[Sequence] = deque()
        """In the order of arrival."""
        self.prefilling: Sequence | None = None
        self.running: list[Sequence] = []
        self._served: defaultdict[str | None, int] = defaultdict(int)
        """Tokens computed for each tenant, without those of the sequences that are active."""
        self._last_served = 0
        """What the tenant that got the last slot had been served by then."""

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.prefilling or self.waiting)

    @property
    def num_active(self) -> int:
        return len(self.running) + (self.prefilling is not None)

    def admit(self) -> int | None:
        """Give the next waiting sequence a slot for its prefill. Returns the slot to clear, if any."""
        if self.prefilling is not None or not self.waiting or len(self.running) >= self.num_slots:
            return None
        self.prefilling = self._take_next()
        return len(self.running)

    def add(self, sequence: Sequence) -> None:
        """It waits from now on."""
        tenant = sequence.request.tenant
        if all(other.request.tenant != tenant for other in self.waiting):
            missing = self._last_served - self._served_to(tenant)
            self._served[tenant] += max(0, missing)
        self.waiting.append(sequence)

    def finish_prefill(self) -> None:
        """The prefilled sequence joins the running ones; its slot is the next in order already."""
        assert self.prefilling is not None
        self.running.append(self.prefilling)
        self.prefilling = None

    def retire(self) -> tuple[list[Sequence], list[Move]]:
        """Take out finished sequences. Returns them and the moves that close the gaps, in order."""
        left = [sequence for sequence in self.running if sequence.finish_reason is not None]
        moves: list[Move] = []
        for sequence in left:
            hole, last = self.running.index(sequence), len(self.running) - 1
            mover = self.running.pop()
            if hole != last:
                self.running[hole] = mover
                moves.append(Move(last, hole, mover.num_cached))
            if self.prefilling is not None:
                moves.append(Move(last + 1, last, self.prefilling.num_cached))
        prefilling = self.prefilling
        if prefilling is not None and prefilling.finish_reason is not None:
            self.prefilling = None
            left.append(prefilling)
        for sequence in left:
            self._served[sequence.request.tenant] += _num_computed(sequence)
        finished_waiting = [sequence for sequence in self.waiting if sequence.finish_reason is not None]
        if finished_waiting:
            self.waiting = deque(sequence for sequence in self.waiting if sequence.finish_reason is None)
        return left + finished_waiting, moves

    def _take_next(self) -> Sequence:
        first: dict[str | None, Sequence] = {}
        for sequence in self.waiting:
            first.setdefault(sequence.request.tenant, sequence)
        tenant = min(first, key=self._served_to)  # of those served alike, whose request is the oldest
        self._last_served = self._served_to(tenant)
        self.waiting.remove(first[tenant])
        return first[tenant]

    def _served_to(self, tenant: str | None) -> int:
        active = (*self.running, *([] if self.prefilling is None else [self.prefilling]))
        now = sum(_num_computed(sequence) for sequence in active if sequence.request.tenant == tenant)
        return self._served[tenant] + now


def _num_computed(sequence: Sequence) -> int:
    """Tokens of its prompt and output; a prompt counts once it has a slot."""
    return len(sequence.token_ids)
