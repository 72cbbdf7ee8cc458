"""What every test runs under: one thread a process, no telemetry, no network beyond loopback.

Set before any library is imported, and inherited by every process that a test starts. Property tests draw the
same examples every time; `--hypothesis-profile=fuzz` draws new ones, and many more.
"""

import os
import secrets

from hypothesis import settings

FUZZ_FACTOR = 15
"""How many times the examples of `make test` does `make fuzz` run."""

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

settings.register_profile("test", derandomize=True, database=None, deadline=None)
settings.register_profile("fuzz", max_examples=100 * FUZZ_FACTOR, deadline=None, print_blob=True)
settings.load_profile("test")
