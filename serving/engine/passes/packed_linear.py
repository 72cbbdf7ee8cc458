"""Large linear layers of a processor's target with a second, packed copy of their weights, for short passes.

The float32 product that torch calls reads the weights once for every three rows, so verifying four draft
tokens costs two reads. Over weights that oneDNN has packed, a few dozen rows cost little more than one. Each
shape is measured, and a layer takes the packed product where it was faster. Knows no slots and no rounds.
Invariant: a layer whose weights were changed or copied computes with the weights that it has.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_log = logging.getLogger(__name__)

LEAST_WEIGHTS = 2**19
"""Of a layer; calling the other product costs more than it saves in a smaller one."""
ROWS = range(4, 65)
"""Sequences times tokens, for which packed weights are used."""
_PACKED_FOR_ROWS, _MEASURED_ROWS, _REPEATS = 16, 5, 5
_LEAST_GAIN = 1.1
_TOLERANCE = 1e-4


class _Packed:
    """A packed copy, and the weights of which it is one. A copy of a layer gets none."""

    def __init__(self, weight: Tensor | None = None) -> None:
        self.tensor: Tensor | None = None
        self._copied = (0, 0)
        if weight is not None:
            self.tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_FOR_ROWS)
            self._copied = weight.data_ptr(), weight._version

    def is_of(self, weight: Tensor) -> bool:
        return self._copied == (weight.data_ptr(), weight._version)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Packed":
        return _Packed()


class PackedLinear(nn.Linear):
    """What `pack_linears` makes of a linear layer; its parameters and their names stay."""

    packed: _Packed

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // self.in_features
        if rows not in ROWS or torch.compiler.is_compiling() or not self.packed.is_of(self.weight):
            return functional.linear(input, self.weight, self.bias)
        return _product(input, self.packed, self.bias)


def pack_linears(model: nn.Module) -> int:
    """Pack the large linear layers of a model whose weights will not change, where that is faster. Returns
    the bytes that it takes; 0 where it is not possible here or done already."""
    if not torch.backends.mkldnn.is_available():
        return 0
    gains: dict[torch.Size, float] = {}
    num_bytes = 0
    for module in packable(model):
        shape = module.weight.shape
        if shape not in gains:
            gains[shape] = _gain(module)
        if gains[shape] >= _LEAST_GAIN:
            module.__class__, module.packed = PackedLinear, _Packed(module.weight)
            num_bytes += module.weight.nbytes
    if gains:
        told = ", ".join(f"{shape[0]}x{shape[1]} {gain:.2f}" for shape, gain in gains.items())
        _log.info("products of %d rows over packed weights, gain by shape: %s", _MEASURED_ROWS, told)
    return num_bytes


def packable(model: nn.Module) -> list[Any]:
    """The layers that may be packed: large, plain, float32, on a processor or not loaded yet."""
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.numel() >= LEAST_WEIGHTS
        and module.weight.dtype == torch.float32
        and module.weight.device.type in ("cpu", "meta")
    ]


def has_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _product(input: Tensor, packed: _Packed, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed.tensor, bias, "none", [], "")
    return found


@torch.inference_mode()
def _gain(layer: nn.Linear) -> float:
    """How much faster; 0 where the packed product cannot be had, or is another one."""
    rows = torch.randn(_MEASURED_ROWS, layer.in_features)
    plain = functional.linear(rows, layer.weight, layer.bias)
    try:
        packed = _Packed(layer.weight)
        difference = float((_product(rows, packed, layer.bias) - plain).abs().max())
    except RuntimeError as error:  # another processor's torch
        _log.info("linear layers are not packed: %s", error)
        return 0.0
    if not difference <= _TOLERANCE * float(plain.abs().max()):
        return 0.0
    plain_s = _fastest(lambda: functional.linear(rows, layer.weight, layer.bias))
    return plain_s / _fastest(lambda: _product(rows, packed, layer.bias))


def _fastest(product: Callable[[], Tensor]) -> float:
    def time_s() -> float:
        began_s = time.perf_counter()
        product()
        return time.perf_counter() - began_s

    return min(time_s() for _ in range(_REPEATS))
