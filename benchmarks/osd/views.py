"""The experiments for people: tables, and pictures of acceptance over records as the paper draws them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.table import Table

COLOURS = {"floor": "#7f8c8d", "paper": "#c0392b", "ours": "#1b4f72", "self": "#b9770e", "offline": "#117a65"}


def domain_table(metrics: Mapping[str, Any]) -> Table:
    """Acceptance by domain and arm, what ours gained, and how fast."""
    table = Table(title="acceptance on held-out prompts, medians over seeds")
    columns = "domain", "floor", "paper", "ours", "self", "offline", "full offline", "of ceiling", "records"
    for column in columns:
        table.add_column(column, justify="left" if column == "domain" else "right")
    for name, rates in metrics["acceptance_rate"].items():
        reached = metrics.get("records_to_reach", {}).get(name, {})
        share = metrics.get("share_of_ceiling", {}).get(name)
        table.add_row(
            name,
            *(_cell(rates.get(arm)) for arm in ("floor", "paper", "ours", "self", "offline", "offline_full")),
            "" if share is None else f"{share:.2f}",
            f"{_count(reached['ours'])} / {_count(reached['paper'])}" if reached else "",
        )
    return table


def nested_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Rows of like figures."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_cell(row.get(column)) for column in columns))
    return table


def plot_domains(metrics: Mapping[str, Any], series: Mapping[str, Sequence[Any]], file: Path) -> None:
    """One panel a domain and temperature: moving averages of every seed, the ceiling as a line."""
    pyplot = _pyplot()
    names = list(metrics["acceptance_rate"])
    columns = max(1, min(4, len({name.partition("@")[0] for name in names})))
    rows = -(-len(names) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False, layout="constrained", sharey=True
    )
    ordered = sorted(names, key=lambda name: ("@" in name, names.index(name)))
    for panel in axes.flat[len(ordered) :]:
        panel.axis("off")
    for panel, name in zip(axes.flat, ordered, strict=False):
        for key, points in series.items():
            head, arm, seed = (*key.split("/"), "", "")[:3]
            if head == name and arm in COLOURS and key.count("/") == 2:
                shown = arm if seed == "0" else None
                panel.plot(*zip(*points, strict=True), color=COLOURS[arm], lw=1.2, alpha=0.8, label=shown)
        ceiling = metrics["acceptance_rate"][name].get("offline")
        if ceiling is not None:
            panel.axhline(ceiling, color=COLOURS["offline"], lw=1.2, ls="--", label="offline, held out")
        panel.set_title(name.replace("@1", ", temperature 1"))
        panel.set(ylim=(0, 1), xlabel="records")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("acceptance, mean of 50")
    axes[0][0].legend(loc="upper left", fontsize=8, frameon=False)
    _save(figure, file)


def plot_phases(
    metrics: Mapping[str, Any], series: Mapping[str, Sequence[Any]], domains: Sequence[str], file: Path
) -> None:
    """The shift: acceptance as served above, held-out acceptance of each domain below."""
    pyplot = _pyplot()
    arms = [arm for arm in ("no_replay", "replay", "routes", "self") if f"{arm}/0" in series]
    figure, axes = pyplot.subplots(
        2,
        len(arms),
        figsize=(5 * len(arms), 6),
        squeeze=False,
        layout="constrained",
        sharex=True,
        sharey=True,
    )
    count = metrics["records_per_domain"]
    for column, arm in enumerate(arms):
        for panel in axes[:, column]:
            for index, domain in enumerate(domains):
                panel.axvspan(
                    index * count, (index + 1) * count, color="black", alpha=0.04 * (index % 2), lw=0
                )
                panel.text((index + 0.5) * count, 1.01, domain, ha="center", va="bottom", fontsize=8)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set(ylim=(0, 1))
        axes[0][column].plot(*zip(*series[f"{arm}/0"], strict=True), color=COLOURS["ours"], lw=1.2)
        for domain in domains:
            axes[1][column].plot(*zip(*series[f"{arm}/0/{domain}"], strict=True), lw=1.4, label=domain)
        axes[0][column].set_title(arm.replace("_", " "), pad=16)
        axes[1][column].set_xlabel("records")
    axes[0][0].set_ylabel("as served, mean of 50 records")
    axes[1][0].set_ylabel("on held-out prompts")
    axes[1][0].legend(fontsize=8, frameon=False)
    _save(figure, file)


_MIXTURE_COLOURS = {
    "one": "#7f8c8d",
    "tags": "#1b4f72",
    "router": "#117a65",
    "self": "#b9770e",
    "self, tags": "#6e2c00",
}


def plot_mixture(series: Mapping[str, Sequence[Any]], file: Path) -> None:
    """One draft, drafts by tag, drafts by the router, on mixed traffic."""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(7, 3.8), layout="constrained")
    for arm, colour in _MIXTURE_COLOURS.items():
        for key, points in series.items():
            if key.startswith(f"{arm}/"):
                shown = arm if key.endswith("/0") else None
                panel.plot(*zip(*points, strict=True), color=colour, lw=1.2, alpha=0.8, label=shown)
    panel.set(ylim=(0, 1), xlabel="records", ylabel="accepted / attempted, mean of 50 records")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    _save(figure, file)


def plot_ablations(metrics: Mapping[str, Any], file: Path) -> None:
    """A panel a setting: held-out acceptance at the end, with its interval, and while learning."""
    pyplot = _pyplot()
    groups = {
        what: rows
        for what, rows in metrics.items()
        if isinstance(rows, dict) and all("acceptance_rate" in row for row in rows.values())
    }
    figure, axes = pyplot.subplots(
        2, -(-len(groups) // 2), figsize=(4 * -(-len(groups) // 2), 6.5), squeeze=False, layout="constrained"
    )
    for panel in axes.flat[len(groups) :]:
        panel.axis("off")
    for panel, (what, rows) in zip(axes.flat, groups.items(), strict=False):
        values = list(rows)
        ends = [rows[value]["acceptance_rate"] for value in values]
        low = [end - rows[value]["interval"][0] for end, value in zip(ends, values, strict=True)]
        high = [rows[value]["interval"][1] - end for end, value in zip(ends, values, strict=True)]
        places = range(len(values))
        panel.errorbar(ends, places, xerr=[low, high], fmt="o", color=COLOURS["ours"], label="at the end")
        panel.plot(
            [rows[value]["mean_while_learning"] for value in values],
            places,
            "x",
            color=COLOURS["paper"],
            label="while learning",
        )
        panel.set_yticks(list(places), [value.replace("_", " ") for value in values])
        panel.set_title(what.replace("_", " "))
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=8, frameon=False)
    _save(figure, file)


def _pyplot() -> Any:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    _pyplot().close(figure)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return " to ".join(_cell(part) for part in value)
    return "" if value is None else str(value)


def _count(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"
