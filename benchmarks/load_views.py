"""Load and soak as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = {"p50": "#7fb7be", "p95": "#ef9f3f", "p99": "#b5402a"}
_MIB = 2**20


def plot_load(metrics: Mapping[str, Any], series: Mapping[str, Sequence[Any]], file: Path) -> None:
    """By share of capacity: what was answered and refused, latencies; and first tokens over time."""
    pyplot = _pyplot()
    by_load = metrics["by_load"]
    loads = sorted(by_load, key=float)
    figure, axes_RC = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    places = range(len(loads))
    shares = [f"{float(load):.0%}" for load in loads]
    kinds = (("num_answered", "#0b6e4f", "answered"), ("num_refused", "#f6c667", "refused with 429"))
    bottoms = [0.0] * len(loads)
    for name, colour, label in (*kinds, ("num_failed", "#b5402a", "failed")):
        rates = [by_load[load][name] / by_load[load]["seconds"] for load in loads]
        axes_RC[0][0].bar(places, rates, bottom=bottoms, color=colour, label=label, width=0.6)
        bottoms = [below + rate for below, rate in zip(bottoms, rates, strict=True)]
    axes_RC[0][0].axhline(metrics["capacity"]["requests_per_s"], color="#52606d", ls="--", label="capacity")
    axes_RC[0][0].set_title("requests that came, a second, and what became of them", loc="left")
    axes_RC[0][0].legend(frameon=False)
    panels = (
        (axes_RC[0][1], "time_to_first_token_s", "time to the first token (ms)", "log"),
        (axes_RC[0][2], "inter_token_latency_s", "between two tokens (ms)", "linear"),
        (axes_RC[1][0], "chunk_gap_s", "between two chunks (ms)", "linear"),
        (axes_RC[1][1], "refusal_s", "until a refusal (ms)", "linear"),
    )
    for axes, name, title, scale in panels:
        for offset, (percent, colour) in enumerate(_COLOURS.items()):
            at = [place + 0.26 * (offset - 1) for place in places]
            values = [1000 * (by_load[load][name][percent] or 0.0) for load in loads]
            bars = axes.bar(at, values, 0.24, color=colour, label=percent)
            axes.bar_label(bars, [_label(value) for value in values], fontsize=7)
        axes.set_yscale(scale)
        axes.set_title(title, loc="left")
        axes.legend(frameon=False)
    for load in loads:
        rows = [row for row in series[load] if row["first_token_s"] is not None]
        due_s = [row["due_s"] for row in rows]
        axes_RC[1][2].plot(
            due_s,
            [row["first_token_s"] - row["due_s"] for row in rows],
            ".",
            ms=3,
            label=f"{float(load):.0%}",
        )
    axes_RC[1][2].set_title("wait for the first token by when it was due (s)", loc="left")
    axes_RC[1][2].legend(frameon=False)
    for axes in (*axes_RC[0], *axes_RC[1][:2]):
        axes.set_xticks(list(places), shares)
        axes.set_xlabel("share of capacity")
    _save(figure, axes_RC.flat, file)


def plot_soak(metrics: Mapping[str, Any], series: Mapping[str, Sequence[Any]], file: Path) -> None:
    """Over requests: memory of each process, absolute and over its value where growth begins to count;
    descriptors; Redis."""
    pyplot = _pyplot()
    figure, axes_RC = pyplot.subplots(2, 2, figsize=(14, 8), layout="constrained")
    census = series["census"]
    roles = [role for role in metrics["growth"] if role != "clients"]
    ended = [each["num_ended"] for each in census]
    for axes in axes_RC.flat:
        axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    for role in roles:
        held = [each["processes"].get(role, {}) for each in census]
        memory = [each.get("pss_bytes", float("nan")) / _MIB for each in held]
        settled = next(
            (size for size, num in zip(memory, ended, strict=True) if num >= max(ended) / 4), memory[-1]
        )
        axes_RC[0][0].plot(ended, memory, label=role)
        axes_RC[0][1].plot(ended, [size / settled for size in memory], label=role)
        axes_RC[1][0].plot(ended, [each.get("num_descriptors", float("nan")) for each in held], label=role)
    axes_RC[0][0].set_title("memory (PSS, MiB)", loc="left")
    axes_RC[0][1].set_title("memory over that after a quarter of the requests", loc="left")
    axes_RC[0][1].axhline(1.03, color="#52606d", ls="--")
    axes_RC[0][1].set_ylim(0.8, 1.2)
    axes_RC[1][0].set_title("open descriptors", loc="left")
    axes_RC[1][1].plot(ended, [each["redis_bytes"] / _MIB for each in census], label="memory (MiB)")
    axes_RC[1][1].plot(ended, [each["redis_keys"] for each in census], label="keys")
    axes_RC[1][1].set_title("Redis", loc="left")
    for axes in axes_RC.flat:
        axes.set_xlabel("requests ended")
    axes_RC[1][1].legend(frameon=False)
    handles, labels = axes_RC[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    _save(figure, axes_RC.flat, file)


def _label(value: float) -> str:
    """Milliseconds, for people."""
    if not value:
        return ""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, all_axes: Any, file: Path) -> None:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    _pyplot().close(figure)
