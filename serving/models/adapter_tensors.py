"""Reads weights from outside: a safetensors file of finite floating-point tensors and token ids, or an error.

Knows no draft. Invariant: all returned values are finite.
"""

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

IDS_END = ".token_ids"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class AdapterRejectedError(ValueError):
    """The adapter was refused; nothing changed. The message says why."""


def read_tensors(weights: bytes) -> dict[str, Tensor]:
    """Tensors by key; token ids are int64, all else floating-point. Raises AdapterRejectedError."""
    try:
        tensors = load(weights)
    except (SafetensorError, ValueError) as error:
        raise AdapterRejectedError(f"adapter bytes are no safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES and not (tensor.dtype == torch.int64 and key.endswith(IDS_END)):
            raise AdapterRejectedError(f"adapter tensor {key!r} holds {tensor.dtype}, not {_DTYPES}")
        if not torch.isfinite(tensor).all():
            raise AdapterRejectedError(f"adapter tensor {key!r} has values that are not finite")
    return tensors
