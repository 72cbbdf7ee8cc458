"""What every test runs under: one thread a process, no telemetry, no network beyond loopback.

Set before any library is imported, and inherited by every process that a test starts. Property tests draw the
same examples every time, `make test-all` more of them than `make test`; `--hypothesis-profile=fuzz` draws new
ones, and many more. Files stay whole when they are spread over processes.
"""

import os
import secrets
from functools import cache
from pathlib import Path
from typing import Any

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
    # Serve would kill a proxy that a busy machine keeps from being ready within five seconds.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "true",
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


@cache
def starts_ray(file: str) -> bool:
    return "pytest.mark.ray" in Path(file).read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray is the longest chain, so it goes first."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Spread over processes, a file's fixtures are made once, and all that starts Ray shares a process."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if starts_ray(str(config.rootpath / file)) else file

    return ByFile(config, log)
