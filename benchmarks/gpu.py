"""`python -m benchmarks.gpu`: passes and rounds over their floor, beside transformers, at real shapes.

Needs torch, transformers and peft alone. Random weights in bfloat16: what is measured is time, and how far it
is from what the memory allows; tokens a second are at a set acceptance, by the synthetic rule of
`gpu_models`, which no model follows. `--tiny` runs the same code at a shape for processors.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_models
from benchmarks.gpu_bench import Bench, GpuPlan


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "cuda": torch.version.cuda,
        "libraries": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    }


def show(metrics: dict[str, Any]) -> None:
    """The same figures for people."""
    print(f"copy: {metrics['copy_bytes_per_s'] / 1e12:.3f} TB/s, read plus written")
    for name in ("passes", "rounds", "generation"):
        rows = metrics[name]
        titles = list(dict.fromkeys(title for row in rows for title in row))
        cells = [titles, *([_cell(title, row.get(title)) for title in titles] for row in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
        print(f"\n{name}")
        for row in cells:
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    rest = {name: value for name, value in metrics.items() if not isinstance(value, list)}
    print("\n" + "\n".join(f"{name}: {value}" for name, value in rest.items()))


def _cell(title: str, value: Any) -> str:
    if value is None:
        return ""
    if title == "seconds" or (title.endswith("_s") and not title.endswith("per_s")):
        return f"{1e3 * value:.3f} ms"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write; returns the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--batches", default="1,8,32", help="in this order")
    parser.add_argument("--acceptance", type=float, default=0.8, help="of a drafted token, synthetic")
    parser.add_argument("--compiled", action="store_true", help="passes of compiled code too: minutes each")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a processor")
    parser.add_argument("--report", type=Path, help="where the figures go, JSON")
    parser.add_argument("--profile", type=Path, help="where a profile of one pass and one round goes")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    tiny = options.tiny
    plan = GpuPlan(
        device=torch.device(options.device),
        dtype=getattr(torch, options.dtype),
        batches=tuple(int(batch) for batch in options.batches.split(",")),
        acceptance=options.acceptance,
        context_tokens=48 if tiny else 1000,
        prompt_tokens=12 if tiny else 128,
        max_tokens=12 if tiny else 128,
        copied_bytes=2**22 if tiny else 2**32,
        calls=2 if tiny else 8,
        repeats=3 if tiny else 15,
        compiled=options.compiled,
    )
    shapes = (
        (gpu_models.TINY_TARGET, gpu_models.TINY_DRAFT) if tiny else (gpu_models.TARGET, gpu_models.DRAFT)
    )
    metrics = Bench(plan, *shapes).run(options.profile)
    show(metrics)
    report = {
        "name": "gpu",
        "command": " ".join(["python -m benchmarks.gpu", *given]),
        "environment": environment(plan.device),
        "metrics": metrics,
        "series": {},
    }
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
