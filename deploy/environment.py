"""Switches off what Ray, MLflow and the hub client would send home or print unasked.

Must run before those libraries are imported; processes started later inherit it. Invariant: a value
that the operator set already is left alone.
"""

from collections.abc import MutableMapping

QUIET_LIBRARIES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def quieten_libraries(environment: MutableMapping[str, str]) -> None:
    for name, value in QUIET_LIBRARIES.items():
        environment.setdefault(name, value)
