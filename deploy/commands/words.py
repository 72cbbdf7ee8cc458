"""Numbers and orders as people read them. Pure functions."""

from collections.abc import Iterator

from buffer.controls import Controls


def ago(at_s: float, now_s: float) -> str:
    """`12 s ago`, `5 min ago`, `3 h ago`, `2 d ago`."""
    passed_s = max(0.0, now_s - at_s)
    for unit, length_s in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if passed_s >= length_s:
            return f"{passed_s / length_s:.0f} {unit} ago"
    return f"{passed_s:.0f} s ago"


def sized(num_bytes: int) -> str:
    """`812 B`, `3.4 kB`, `1.2 MB`."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def decimals(figure: float | None) -> str:
    """`0.613`; nothing for a figure that is not known."""
    return "" if figure is None else f"{figure:.3f}"


def percentage(part: int, whole: int) -> str:
    """`61 %`; a dash where there is nothing to divide by."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


def milliseconds(passed_s: float) -> str:
    """`6.4 ms`."""
    return f"{passed_s * 1000:.1f} ms"


def orders_in_words(controls: Controls) -> Iterator[str]:
    """A sentence for each part: learning, capture, and drains where there are any."""
    if controls.is_learning_paused:
        yield "learning is paused"
    elif controls.paused_routes:
        yield f"learning is paused on {', '.join(controls.paused_routes)}"
    else:
        yield "learning goes on"
    rate = controls.capture_rate
    yield "records: by serving.capture_rate" if rate is None else f"records: {100 * rate:g} % by order"
    if controls.are_all_draining:
        yield "all replicas drain: they take no new requests"
    elif controls.draining_replicas:
        yield f"draining: {', '.join(controls.draining_replicas)}"
