"""What every test runs under: one thread a process, no telemetry, no network beyond loopback.

Set before any library is imported, and inherited by every process that a test starts.
"""

import os
import secrets

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
