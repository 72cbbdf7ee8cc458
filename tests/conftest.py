"""What every test runs under: one thread a process, no telemetry, no network beyond loopback.

Set before any library is imported, and inherited by every process that a test starts. Property tests draw the
same examples every time, `make test-all` more of them than `make test`; `--hypothesis-profile=fuzz` draws new
ones, and many more. Files stay whole when they are spread over processes.
"""

import os
import secrets

import pytest
from hypothesis import settings

FUZZ_FACTOR = 15
"""How many times the examples of `make test-all` does `make fuzz` run."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    # A minute of compiling for each tiny pair would slow every test down; those that want it say so.
    "EVERDRAFT__SERVING__COMPILE": "off",
    # Ray reads its token once a process, whichever test starts it first.
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
os.environ.update(ENVIRONMENT)

settings.register_profile("all", derandomize=True, database=None, deadline=None)
settings.register_profile("test", parent=settings.get_profile("all"), max_examples=40)
settings.register_profile("fuzz", max_examples=100 * FUZZ_FACTOR, deadline=None, print_blob=True)
settings.load_profile("test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's fixtures are made once, in one process. All that starts Ray shares a process, where nothing
    overlaps; it is the longest chain, so it goes first."""
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
