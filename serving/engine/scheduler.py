"""Decides which sequences take part in the next round. Touches no tensor.

Running sequences hold the slots 0 .. len(running) - 1, in order; one more may be in prefill, in the slot
right behind them. When a sequence leaves, the last one moves into its slot, so that a pass always runs
contiguous slots.
"""

from collections import deque
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
    """First come, first served."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.waiting: deque[Sequence] = deque()
        self.prefilling: Sequence | None = None
        self.running: list[Sequence] = []

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
        self.prefilling = self.waiting.popleft()
        return len(self.running)

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
        finished_waiting = [sequence for sequence in self.waiting if sequence.finish_reason is not None]
        if finished_waiting:
            self.waiting = deque(sequence for sequence in self.waiting if sequence.finish_reason is None)
        return left + finished_waiting, moves
