"""A constraint that can be written down: a finite automaton over token ids."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Automaton:
    """A TokenConstraint. `next_state[s][v]`: where token v leads from state s; -1: it is not allowed."""

    next_state: tuple[tuple[int, ...], ...]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """On one line: Hypothesis would give every number of a failing example a line of its own."""
        printer.text(repr(self))

    @classmethod
    def drawn(cls, vocab_size: int, seed: int, num_states: int = 3) -> "Automaton":
        """Each state allows about half of the tokens, and at least one."""
        chooser = random.Random(seed)
        rows = [
            [chooser.randrange(num_states) if chooser.random() < 0.5 else -1 for _ in range(vocab_size)]
            for _ in range(num_states)
        ]
        for row in rows:
            row[chooser.randrange(vocab_size)] = chooser.randrange(num_states)
        return cls(tuple(tuple(row) for row in rows))

    def after(self, state: int, token_ids: Sequence[int]) -> int:
        for token in token_ids:
            if state >= 0:
                state = self.next_state[state][token]
        return state

    def allows(self, output: Sequence[int]) -> list[int]:
        """The tokens that may follow an output."""
        return [token for token, state in enumerate(self.next_state[self.after(0, output)]) if state >= 0]

    def start(self) -> "AutomatonState":
        return AutomatonState(self)


class AutomatonState:
    def __init__(self, automaton: Automaton) -> None:
        self._automaton, self._state = automaton, 0

    def allowed(self, drafted: Sequence[int]) -> NDArray[np.uint8] | None:
        state = self._automaton.after(self._state, drafted)
        if state < 0:
            return None
        row = np.array(self._automaton.next_state[state])
        return np.packbits(row >= 0, bitorder="little")

    def advance(self, token_ids: Sequence[int]) -> None:
        self._state = self._automaton.after(self._state, token_ids)
        assert self._state >= 0, "a token was emitted that the constraint does not allow"
