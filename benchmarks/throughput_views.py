"""The rows of the throughput benchmark for people: a table, and a picture of bars."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.modes import MODES
from benchmarks.prompts import SHORT_TOKENS
from benchmarks.rows import Row
from deploy.terminal import lines

_COLOURS = {
    "transformers_generate": "#9aa5b1",
    "transformers_assisted": "#b9c2cc",
    "transformers_assisted_fixed": "#7b8794",
    "transformers_prompt_lookup": "#cbd2d9",
    "transformers_continuous": "#52606d",
    "engine_off": "#f6c667",
    "engine_floor": "#ef9f3f",
    "engine_adapted": "#d9652b",
    "engine_ngram": "#7fb7be",
    "engine_adaptive": "#0b6e4f",
    "engine_adaptive_random_draft": "#8fc9a9",
}
"""Greys for the peers, colours for ours."""


def table(rows: Sequence[Row]) -> Table:
    """One setting's rows."""
    first = rows[0]
    drawn = f"temperature {first['temperature']:g}" if first["temperature"] else "greedy"
    shown = Table(
        title=f"{first['concurrency']} at once, {first['dtype']}, {drawn}, "
        f"{first['prompt_tokens']} prompt tokens",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
        caption=lines(f"{row['mode']}: {row['note']}" for row in rows if "note" in row) or None,
        caption_justify="left",
    )
    shown.add_column("mode", no_wrap=True)
    for column in ("tokens/s", "accepted", "a round", "speed-up", "predicted"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row["mode"],
            _number(row["tokens_per_s"], ".0f"),
            _number(row["acceptance_rate"], ".2f"),
            _number(row["block_efficiency"], ".2f"),
            _number(row["measured_speedup"], ".2f", "x"),
            _number(row["predicted_speedup"], ".2f", "x"),
        )
    return shown


def plot_throughput(rows: Sequence[Row], file: Path) -> None:
    """A panel for each dtype, temperature and prompt length; in it a group of bars for each concurrency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    panels: dict[tuple[str, float, int], list[Row]] = {}
    for row in rows:
        panels.setdefault((row["dtype"], row["temperature"], row["prompt_tokens"]), []).append(row)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes_LC = pyplot.subplots(
        lines, columns, figsize=(9.5 * columns, 4.2 * lines + 1.1), layout="constrained", squeeze=False
    )
    for axes, (kind, panel) in zip(axes_LC.flat, panels.items(), strict=False):
        _draw_panel(axes, kind, panel)
    for axes in list(axes_LC.flat)[len(panels) :]:
        axes.set_visible(False)
    handles = [Patch(color=_COLOURS[mode]) for mode in MODES]
    figure.legend(
        handles, MODES, loc="outside lower center", ncols=4 if columns == 1 else 6, fontsize=9, frameon=False
    )
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _draw_panel(axes, kind, panel) -> None:  # type: ignore[no-untyped-def]  # matplotlib's own types
    dtype, temperature, prompt_tokens = kind
    concurrencies = sorted({row["concurrency"] for row in panel})
    width = 0.88 / len(MODES)
    for row in panel:
        rate = row["tokens_per_s"]
        group = concurrencies.index(row["concurrency"])
        x = group + (MODES.index(row["mode"]) - (len(MODES) - 1) / 2) * width
        axes.bar(x, rate or 0.0, width * 0.92, color=_COLOURS[row["mode"]])
        label = "none" if rate is None else f"{rate:.0f}"
        axes.text(x, rate or 0.0, f" {label}", ha="center", va="bottom", fontsize=7, rotation=90)
    drawn = f"temperature {temperature:g}" if temperature else "greedy"
    bound = "at most " if prompt_tokens <= SHORT_TOKENS else ""
    title = f"{dtype}, {drawn}, prompts of {bound}{prompt_tokens} tokens"
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xticks(
        range(len(concurrencies)),
        [f"{count} request{'s'[: count > 1]}" for count in concurrencies],
    )
    axes.set_ylabel("output tokens a second")
    axes.margins(x=0.02, y=0.16)
    axes.spines[["top", "right"]].set_visible(False)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
