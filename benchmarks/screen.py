"""Where a long measurement is: a bar on a terminal, a line now and then elsewhere."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.adapted import Cycle
from deploy.terminal import visible

_LINES = 20
"""About so many lines a bar where there is no terminal."""


class ProgressScreen:
    """One bar for the draft's learning, if it has to learn, and one for the measurement."""

    def __init__(self, console: Console, *, num_steps: int, num_requests: int) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._learning = self._bars.add_task("", total=num_requests, visible=False)
        self._measuring = self._bars.add_task("", total=num_steps, visible=False)
        self._said: dict[int, int] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bars.stop()

    def on_cycle(self, cycle: Cycle) -> None:
        """The draft served and learnt once more."""
        self._show(
            self._learning,
            cycle.num_requests,
            f"the draft learns: {cycle.num_requests} requests, draft {cycle.draft_version} accepted "
            f"{cycle.acceptance_rate:.2f}",
        )

    def report(self, doing: str) -> None:
        """A mode begins its turn."""
        self._bars.update(self._learning, visible=False)
        done = self._bars.tasks[1].completed
        self._show(self._measuring, int(done) + 1, doing)

    def _show(self, bar: int, done: int, description: str) -> None:
        task = self._bars.tasks[bar]
        self._bars.update(task.id, completed=done, description=visible(description), visible=True)
        share = _LINES * done // max(1, int(task.total or 1))
        if not self._console.is_terminal and share != self._said.get(bar, 0):
            self._said[bar] = share
            self._console.print(description)
