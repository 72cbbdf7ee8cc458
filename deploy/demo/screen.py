"""What the person in front of the demo sees meanwhile: a live table, and what becomes of the drafts."""

from collections import deque
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from buffer.records import AdapterEvent
from deploy.demo.traffic import RequestOutcome, acceptance_of
from deploy.terminal import visible

_SHOWN_EVENTS = 6
_EDGE = 25
"""Requests at the beginning and at the end of a phase whose acceptance is shown."""
_STYLES = {"promoted": "green", "refused": "yellow", "rolled_back": "red"}


class DemoScreen:
    """Fed by the session; draws itself a few times a second, or prints lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._outcomes: dict[str, list[RequestOutcome]] = {}
        self._num_planned: dict[str, int] = {}
        self._events: deque[AdapterEvent] = deque(maxlen=_SHOWN_EVENTS)
        self._num_seen_events = 0
        self._live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._render)

    def __enter__(self) -> "DemoScreen":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live.is_started:
            self._live.stop()

    def narrate(self, phase: str) -> None:
        """What happens now."""
        self._phase = phase
        if not self._live.is_started:
            self._console.print(phase)

    def begin(self, name: str, num_planned: int) -> None:
        self._outcomes[name], self._num_planned[name] = [], num_planned
        self.narrate(f"replaying {name}")

    def add(self, name: str, outcome: RequestOutcome) -> None:
        self._outcomes[name].append(outcome)

    def show_events(self, events: Sequence[AdapterEvent]) -> None:
        """The whole history so far; new lines are shown."""
        for event in events[self._num_seen_events :]:
            self._events.append(event)
            if not self._live.is_started:
                self._console.print("  ", _event_line(event))
        self._num_seen_events = len(events)

    def _render(self) -> Group:
        lines = [_event_line(event) for event in self._events]
        return Group(Text(visible(self._phase), style="bold"), self.traffic_table(), *lines)

    def traffic_table(self) -> Table:
        """Requests and acceptance by phase, first and last; a phase may end before all requests were sent."""
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("traffic", "requests", "failed", f"first {_EDGE}", f"last {_EDGE}", "draft version"):
            table.add_column(column, justify="left" if column == "traffic" else "right")
        for name, outcomes in self._outcomes.items():
            failed = sum(bool(outcome.error) for outcome in outcomes)
            table.add_row(
                name,
                f"{len(outcomes)} of {self._num_planned[name]}",
                str(failed),
                _percent(outcomes[:_EDGE]),
                _percent(outcomes[-_EDGE:]),
                str(outcomes[-1].draft_version) if outcomes else "",
            )
        return table


def _percent(outcomes: Sequence[RequestOutcome]) -> str:
    return f"{acceptance_of(outcomes):.2f}" if any(outcome.num_attempted for outcome in outcomes) else "-"


def _event_line(event: AdapterEvent) -> Text:
    kind = event.kind.replace("_", " ")
    return Text(
        visible(f"draft v{event.draft_version} {kind}: {event.reason}"), style=_STYLES.get(event.kind, "dim")
    )
