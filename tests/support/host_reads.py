"""Counts how often code waits for its device: on a GPU every one of these calls would be a synchronisation.

What reads a tensor's values, makes a tensor out of Python numbers, or indexes by a mask or a list. Calls from
`serving/engine/passes/transfer.py` are the ones that a round may make; all others are listed with their
place.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_WAITS = set(
    "tolist item numpy cpu cuda nonzero argwhere masked_select unique is_nonzero equal allclose tensor "
    "as_tensor from_numpy __int__ __float__ __bool__ __index__ __array__ __contains__ __iter__".split()
)
_INDEXING = {"__getitem__", "__setitem__"}


class HostReads(TorchFunctionMode):
    """`places`: "file:line function" of each wait outside transfer.py."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self._host_calls: set[FrameType] = set()

    @property
    def num_host_calls(self) -> int:
        """Calls of `to_host`."""
        return len(self._host_calls)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _WAITS or (name in _INDEXING and _reads_index(args[1])):
            frame = sys._getframe(1)
            if frame.f_code.co_filename.endswith("serving/engine/passes/transfer.py"):
                if frame.f_code.co_name == "to_host":
                    self._host_calls.add(frame)
            else:
                self.places.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {name}")
        return func(*args, **(kwargs or {}))


def _reads_index(index: Any) -> bool:
    entries = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(entry, list) or (isinstance(entry, Tensor) and entry.dtype == torch.bool)
        for entry in entries
    )
