"""What vLLM's processes need in their environment before they start; imports nothing of vLLM.

On a processor its wheel wants Intel's OpenMP loaded first, and a cache of keys and values of whole gibibytes.
"""

import contextlib
import math
import os
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

GIB = 2**30


def vllm_environment(num_threads: int | None, cache_bytes: int, given: Mapping[str, str]) -> dict[str, str]:
    """Variables to add to `given`, none of which it has. `cache_bytes`: keys and values of both models for
    all slots; a whole gibibyte is the least that vLLM takes."""
    wanted = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, math.ceil(cache_bytes / GIB))),
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if (openmp := _openmp()) is not None:
        wanted["LD_PRELOAD"] = str(openmp)
    if num_threads is not None:
        wanted |= {"OMP_NUM_THREADS": str(num_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {name: value for name, value in wanted.items() if name not in given}


@contextlib.contextmanager
def environment_of_vllm(num_threads: int | None, cache_bytes: int) -> Iterator[None]:
    """For processes that are started inside the block, and for no others."""
    added = vllm_environment(num_threads, cache_bytes, os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _openmp() -> Path | None:
    found = Path(sysconfig.get_path("data")) / "lib" / "libiomp5.so"
    return found if found.exists() else None
