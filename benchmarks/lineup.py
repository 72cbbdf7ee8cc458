"""The modes that take part, each made when it is first called; one that fails never stops the others."""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.modes import Mode, Outcome, Rounds


class Lineup:
    """Owns the modes that it made."""

    def __init__(self, makers: Mapping[str, Callable[[], Mode]]) -> None:
        self._makers = makers
        self._modes: dict[str, Mode] = {}

    def run(
        self, name: str, waves: Sequence[list[list[int]]], *, num_tokens: int, temperature: float
    ) -> Outcome | str:
        """All waves, one after the other; or why it could not, and the mode is made anew next time."""
        try:
            mode = self._mode(name)
            outcomes = [mode.generate(wave, num_tokens=num_tokens, temperature=temperature) for wave in waves]
            return _together(outcomes)
        except Exception as error:  # whatever a peer raises is a finding, not an end
            self._drop(name)
            return f"{type(error).__name__}: {error}"

    def close(self) -> None:
        for name in list(self._modes):
            self._drop(name)

    def _mode(self, name: str) -> Mode:
        if name not in self._modes:
            self._modes[name] = self._makers[name]()
        return self._modes[name]

    def _drop(self, name: str) -> None:
        mode = self._modes.pop(name, None)
        if mode is not None:
            mode.close()


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    rounds = [outcome.rounds for outcome in outcomes if outcome.rounds is not None]
    return Outcome(
        sum(outcome.wall_s for outcome in outcomes),
        [token_ids for outcome in outcomes for token_ids in outcome.output_token_ids],
        sum(rounds, Rounds()) if len(rounds) == len(outcomes) else None,
    )
