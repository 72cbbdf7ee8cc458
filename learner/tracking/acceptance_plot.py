"""Plots a route's held-out acceptance of candidate, incumbent and floor over records, with swaps marked.

Knows no MLflow. Invariant: draws on a canvas of its own, so that it may run in any thread.
"""

import io
from collections.abc import Iterable, Mapping, Sequence

from buffer.records import SERVING_CHANGES
from learner.tracking.report_text import Decision, named

_LINES = {
    "acceptance_candidate": ("candidate", "#7fb3d5", 1.0),
    "acceptance_incumbent": ("incumbent", "#1f4e79", 2.0),
    "acceptance_floor": ("floor", "#999999", 1.0),
}
PLOTTED = tuple(_LINES)
Series = Mapping[str, Sequence[tuple[int, float]]]
"""Points (records seen, value) by metric."""


def acceptance_png(route: str, series: Series, decisions: Iterable[Decision]) -> bytes:
    """A PNG of the values so far. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, (label, color, width) in _LINES.items():
        points = sorted(series.get(name, ()))
        axes.plot([x for x, _ in points], [y for _, y in points], label=label, color=color, lw=width)
    for turn in decisions:
        if turn.kind in SERVING_CHANGES:
            up = turn.kind == "promoted"
            color, words = ("#2e7d32", "") if up else ("#c62828", f"{turn.kind.replace('_', ' ')}: ")
            axes.axvline(turn.num_records_seen, color=color, lw=0.8, ls=":" if up else "-")
            axes.annotate(
                f"{words}{named(turn.draft_version)}",
                (turn.num_records_seen, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(2, -2),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize=7,
                color=color,
            )
    axes.set(xlabel="records seen", ylabel="held-out acceptance", ylim=(0, 1))
    axes.set_title(
        f"Route {route}", parse_math=False
    )  # a client chooses the route's name, which may hold dollar signs
    figure.legend(loc="outside lower center", ncols=len(_LINES), frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()
