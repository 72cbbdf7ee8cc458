"""Transfers between host and device, and the clock of a round: a round waits for the device only here.

`to_device` sends without waiting, `to_host` waits once for all that a round reads. Nothing else in a round
reads a tensor's values, or creates a tensor on the device from Python numbers, because each would be another
wait.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HostArrays = dict[str, NDArray[Any]]

_NUMPY = {
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bool: np.bool_,
}


def to_device(rows: Sequence[Sequence[int]], device: torch.device | str) -> Tensor:
    """int64 [rows, columns]. From pinned memory on a GPU, whose allocator keeps it until the copy is done."""
    if torch.device(device).type != "cuda":
        return torch.tensor(rows, dtype=torch.int64, device=device)
    return torch.tensor(rows, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def to_host(tensors: Mapping[str, Tensor]) -> HostArrays:
    """The tensors' values on the host; on a GPU this is the round's only wait for the device."""
    if any(tensor.device.type != "cpu" for tensor in tensors.values()):
        return by_one_copy(tensors)
    arrays = HostArrays()
    for name, tensor in tensors.items():
        arrays[name] = tensor.numpy()
    return arrays


def by_one_copy(tensors: Mapping[str, Tensor]) -> HostArrays:
    """Copies tensors packed into one."""
    # The widest first: every array then starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    packed = torch.cat([tensors[name].reshape(-1).view(torch.uint8) for name in names]).cpu().numpy()
    arrays, start = HostArrays(), 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        arrays[name] = packed[start:end].view(_NUMPY[tensor.dtype]).reshape(tensor.shape)
        start = end
    return arrays


class RoundClock:
    """Measures the device's work between marks; does not query the device before the round has waited for
    it."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Set a mark after all work that was queued so far."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Seconds between each mark and the next. Call after `to_host`, when all marks have passed."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type != "cuda":
            return [later - earlier for earlier, later in pairs]
        return [earlier.elapsed_time(later) / 1e3 for earlier, later in pairs]
