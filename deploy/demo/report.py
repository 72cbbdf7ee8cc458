"""The demo's figures as JSON: name, command, environment, metrics, series."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from buffer.redaction import redacted

LIBRARIES = ("torch", "transformers", "peft", "ray", "redis", "mlflow")


def write_report(
    file: Path, name: str, metrics: Mapping[str, Any], series: Mapping[str, Sequence[Any]]
) -> None:
    """Whole or not at all."""
    content = {
        "name": name,
        "command": redacted(" ".join(["everdraft", *sys.argv[1:]])),
        "environment": environment(),
        "metrics": metrics,
        "series": series,
    }
    aside = file.with_suffix(f"{file.suffix}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    aside.replace(file)


def environment() -> dict[str, Any]:
    """Hardware, versions and date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "num_cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "libraries": {library: metadata.version(library) for library in LIBRARIES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
