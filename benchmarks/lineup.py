"""The modes that take part, each made when it is first called; one that fails never stops the others."""

from collections.abc import Callable, Mapping

from benchmarks.modes import Mode, ModeOutcome


class Lineup:
    """Owns the modes that it made."""

    def __init__(self, makers: Mapping[str, Callable[[], Mode]]) -> None:
        self._makers = makers
        self._modes: dict[str, Mode] = {}

    def run(
        self, name: str, prompts: list[list[int]], *, concurrency: int, num_tokens: int, temperature: float
    ) -> ModeOutcome | str:
        """One turn of a mode; or why it could not, and the mode is made anew next time."""
        try:
            return self._mode(name).generate(
                prompts, concurrency=concurrency, num_tokens=num_tokens, temperature=temperature
            )
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
