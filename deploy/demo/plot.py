"""The demo's picture: acceptance over requests, domains shaded, swaps marked."""

import math
from collections.abc import Sequence
from pathlib import Path

from deploy.demo.traffic import RequestOutcome
from serving.engine.counters import acceptance_rate

WINDOW = 30
"""Requests of the moving average."""
LEAST_ATTEMPTED = 10
"""Draft tokens in the window under which there is no average to speak of."""


def plot_acceptance(
    outcomes: Sequence[RequestOutcome],
    phases: Sequence[tuple[str, int]],
    file: Path,
    self_draft: Sequence[tuple[int, float]] = (),
) -> None:
    """`phases`: (name, number of requests) in the order of `outcomes`; one without any is not shown.
    `self_draft`: (number of the record, acceptance) of the part of the target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 4.5), layout="constrained")
    colours = pyplot.colormaps["Pastel2"].colors  # type: ignore[attr-defined]
    start = 0
    for index, (name, count) in enumerate(phase for phase in phases if phase[1]):
        axes.axvspan(start, start + count, color=colours[index % len(colours)], alpha=0.45, lw=0)
        axes.text(start + count / 2, 1.015, name, ha="center", va="bottom", fontsize=10)
        start += count
    rates = [math.nan if rate is None else rate for rate in moving_acceptance(outcomes)]
    axes.plot(rates, color="#1b4f72", lw=1.8, label=f"the draft model, mean of {WINDOW} requests")
    if self_draft:
        numbers, means = zip(*_mean_of(self_draft, WINDOW // 3), strict=True)
        name = f"a part of the target, from some of the records, mean of {WINDOW // 3}"
        axes.plot(numbers, means, color="#b9770e", lw=1.8, label=name)
    for number, (request, version) in enumerate(swaps(outcomes)):
        label = "a new draft answers" if number == 0 else None
        axes.axvline(request, color="#c0392b", lw=0.9, ls="--", alpha=0.7, label=label)
        axes.text(request, 0.015, f" v{version}", color="#c0392b", fontsize=7, rotation=90, va="bottom")
    axes.set(
        xlabel="requests answered",
        ylabel="accepted / attempted",
        ylim=(0, 1),
        xlim=(0, max(1, len(outcomes))),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=True, fontsize=9)
    figure.savefig(file, dpi=140)
    pyplot.close(figure)


def _mean_of(points: Sequence[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    """At each point the mean of the last `window`."""
    means = []
    for end in range(1, len(points) + 1):
        values = [value for _, value in points[max(0, end - window) : end]]
        means.append((points[end - 1][0], sum(values) / len(values)))
    return means


def moving_acceptance(outcomes: Sequence[RequestOutcome]) -> list[float | None]:
    """Accepted over attempted in the last WINDOW requests, at each request; None where hardly anything was
    drafted, since speculation was off."""
    rates: list[float | None] = []
    for end in range(1, len(outcomes) + 1):
        window = outcomes[max(0, end - WINDOW) : end]
        attempted = sum(outcome.num_attempted for outcome in window)
        accepted = sum(outcome.num_accepted for outcome in window)
        rates.append(acceptance_rate(accepted, attempted) if attempted >= LEAST_ATTEMPTED else None)
    return rates


def swaps(outcomes: Sequence[RequestOutcome]) -> list[tuple[int, int]]:
    """(request, version) where a version answered for the first time."""
    seen = {outcomes[0].draft_version} if outcomes else set()
    found = []
    for index, outcome in enumerate(outcomes):
        if outcome.draft_version not in seen:
            seen.add(outcome.draft_version)
            found.append((index, outcome.draft_version))
    return found
