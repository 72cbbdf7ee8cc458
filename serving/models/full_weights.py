"""A draft's own weights as an adapter: for a learner that trains the whole draft instead of LoRA pairs.

The bytes are safetensors by parameter name; in place of PEFT's adapter_config.json stands
`{"everdraft": "full", "target_modules": null}`, or a list of module names where only those were trained. Of a
part of the target only the block and the norm are its own: `{"everdraft": "part", "part": "self:2", …}`, and
which tokens its head keeps, if not all.
Invariant: the file holds exactly the parameters that its config names, each once; tied weights go under
their first name, and taking them in changes every module that shares them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from serving.models.adapter_tensors import AdapterRejectedError, read_tensors
from serving.models.kept_head import read_kept
from serving.models.target_part import TargetPart, own_parameters

_MARK, _FULL, _PART = "everdraft", "full", "part"


def full_config(target_modules: Sequence[str] | None, part: TargetPart | None = None) -> str:
    """Configuration that stands in for PEFT's adapter_config.json."""
    kind = {_MARK: _FULL} if part is None else {_MARK: _PART, _PART: str(part)}
    return json.dumps(kind | {"target_modules": list(target_modules) if target_modules else None})


def is_full(config: Mapping[str, Any]) -> bool:
    """Whether the adapter holds weights themselves, no LoRA pairs."""
    return config.get(_MARK) in (_FULL, _PART)


def full_parameters(module: nn.Module, target_modules: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The draft's own parameters by first name, each once. `target_modules` None: all; else those of modules
    whose names end with one of them."""
    owned = own_parameters(module)
    if not target_modules:
        return owned
    wanted = {
        parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if belongs(name.rpartition(".")[0], target_modules)
    }
    return {name: parameter for name, parameter in owned.items() if parameter in wanted}


def read_full(base: nn.Module, weights: bytes, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, in the base's dtype, with what belongs to kept tokens; `base` is not changed. Raises
    AdapterRejectedError."""
    ours, theirs = TargetPart.of(base), config.get(_PART)
    if theirs != (None if ours is None else str(ours)):
        raise AdapterRejectedError(
            f"adapter holds the weights of {theirs or 'a whole draft model'}, and this replica drafts with "
            f"{ours or 'a draft model'}; they would be put where they do not belong"
        )
    targets = config.get("target_modules")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise AdapterRejectedError(f"full weights' target_modules={targets!r} are no module names")
    tensors, parameters = dict(read_tensors(weights)), full_parameters(base, targets)
    kept = read_kept(base, tensors)
    absent, stray = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if absent or stray or not parameters:
        raise AdapterRejectedError(
            f"full weights and the draft disagree: of the draft's parameters {absent[:3]} are missing, "
            f"and {stray[:3]} are none that target_modules={targets} names"
        )
    return kept | {name: _fitted(name, tensors[name], parameter) for name, parameter in parameters.items()}


def _fitted(name: str, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    if tensor.shape != parameter.shape:
        raise AdapterRejectedError(
            f"full weight {name!r} has shape {tuple(tensor.shape)}; the draft's is {tuple(parameter.shape)}"
        )
    fitted = tensor.to(parameter.device, parameter.dtype)
    if not torch.isfinite(fitted).all():
        raise AdapterRejectedError(f"full weight {name!r} is not finite as {parameter.dtype}")
    return fitted


def belongs(module_name: str, target_modules: Sequence[str]) -> bool:
    """Whether a module's name ends with one of these, as PEFT reads them."""
    return any(module_name == target or module_name.endswith(f".{target}") for target in target_modules)
