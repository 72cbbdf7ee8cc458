"""Reads adapters from bytes: validates everything, then merges into new tensors. Changes no live weight.

The bytes are PEFT's `adapter_model.safetensors` and `adapter_config.json`, as any PEFT tool writes them;
linear and embedding modules are supported. A config that says `{"everdraft": "full"}` or "part" stands for
the draft's own weights (full_weights.py). An adapter is accepted whole or refused whole.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from serving.models.adapter_tensors import AdapterRejectedError, read_tensors
from serving.models.full_weights import is_full, read_full
from serving.models.target_part import TargetPart, own_parameters

__all__ = ["AdapterRejectedError", "check_config", "merge_adapter", "sha256_of"]

_KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+?)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(?:\.weight)?$"
)


@dataclass(frozen=True)
class LoraPair:
    """delta = scale * B @ A (transposed for embeddings, whose weight is [V, D])."""

    a: Tensor
    b: Tensor
    is_embedding: bool

    def delta(self, scale: float) -> Tensor:
        product = self.b.float() @ self.a.float()
        return scale * (product.T if self.is_embedding else product)


def sha256_of(weights: bytes) -> str:
    return hashlib.sha256(weights).hexdigest()


def merge_adapter(
    base: nn.Module, weights: bytes, adapter_config_json: str, sha256: str
) -> dict[str, Tensor]:
    """Merged weights by parameter name, for the modules the adapter touches, in the base's dtype.

    `base` holds the floor's weights and is not changed. Raises AdapterRejectedError for a wrong hash, an
    unreadable file, an unknown module, a wrong rank or shape, a value that is not finite, or a LoRA pair
    on tied weights.
    """
    if sha256_of(weights) != sha256:
        raise AdapterRejectedError(
            f"adapter bytes hash to {sha256_of(weights)[:12]}…, the manifest says {sha256[:12]}…; "
            "they were corrupted on the way"
        )
    config = _parse(adapter_config_json)
    if is_full(config):
        return read_full(base, weights, config)
    _check_config(config)
    scale = _scale(config)
    merged: dict[str, Tensor] = {}
    modules = dict(base.named_modules())
    for name, pair in _pairs(weights).items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise AdapterRejectedError(
                f"adapter touches {name!r}, which is no linear or embedding of the draft"
            )
        _check_pair(name, pair, module, int(config["r"]))
        weight = module.weight.detach()
        result = (weight.float() + pair.delta(scale).to(weight.device)).to(weight.dtype)
        if not torch.isfinite(result).all():
            raise AdapterRejectedError(f"adapter module {name!r} merges to values that are not finite")
        merged[f"{name}.weight"] = result
    _check_targets(config, merged)
    _check_not_tied(base, merged)
    _check_not_shared(base, merged)
    return merged


def check_config(adapter_config_json: str, rank: int, alpha: float) -> None:
    """Raises AdapterRejectedError unless the configuration, which no hash covers, says what the manifest
    says: another alpha would scale the whole adapter, and every value of it would still be finite."""
    config = _parse(adapter_config_json)
    theirs = (0, 0.0) if is_full(config) else _check_config(config)
    if theirs != (rank, float(alpha)):
        raise AdapterRejectedError(
            f"adapter_config.json has r={theirs[0]}, lora_alpha={theirs[1]}, its manifest says {rank}, "
            f"{alpha}; one of them was changed on the way"
        )


def _parse(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise AdapterRejectedError(f"adapter_config.json is unusable: {error!r}") from error


def _check_config(config: dict[str, Any]) -> tuple[int, float]:
    """(rank, alpha)."""
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise AdapterRejectedError(f"adapter_config.json is unusable: {error!r}") from error
    if rank < 1 or alpha <= 0:
        raise AdapterRejectedError(
            f"adapter_config.json has r={rank}, lora_alpha={alpha}; both must be positive"
        )
    unsupported = [
        key for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(key)
    ]
    if unsupported or config.get("bias", "none") != "none":
        raise AdapterRejectedError(
            f"adapter_config.json uses {unsupported or ['bias']}, which is not supported"
        )
    return rank, alpha


def _scale(config: dict[str, Any]) -> float:
    rank = int(config["r"])
    divisor = rank**0.5 if config.get("use_rslora") else rank
    return float(config["lora_alpha"]) / float(divisor)


def _pairs(weights: bytes) -> dict[str, LoraPair]:
    halves: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    for key, tensor in read_tensors(weights).items():
        match = _KEY.match(key)
        if match is None:
            raise AdapterRejectedError(f"adapter holds the tensor {key!r}, which is no LoRA weight")
        halves.setdefault(match["module"], {})[match["half"]] = tensor
        if match["embedding"]:
            embeddings.add(match["module"])
    if not halves:
        raise AdapterRejectedError("adapter holds no LoRA weights")
    missing = sorted(name for name, pair in halves.items() if len(pair) != 2)
    if missing:
        raise AdapterRejectedError(f"adapter lacks lora_A or lora_B of {missing}")
    return {name: LoraPair(pair["A"], pair["B"], name in embeddings) for name, pair in halves.items()}


def _check_pair(name: str, pair: LoraPair, module: nn.Linear | nn.Embedding, rank: int) -> None:
    rows, columns = module.weight.shape
    if pair.is_embedding != isinstance(module, nn.Embedding):
        raise AdapterRejectedError(f"adapter module {name!r} is of another kind than the draft's")
    inputs, outputs = (rows, columns) if pair.is_embedding else (columns, rows)
    if tuple(pair.a.shape) != (rank, inputs) or tuple(pair.b.shape) != (outputs, rank):
        raise AdapterRejectedError(
            f"adapter module {name!r} has lora_A {tuple(pair.a.shape)} and lora_B {tuple(pair.b.shape)}; "
            f"rank {rank} on this draft needs {(rank, inputs)} and {(outputs, rank)}"
        )


def _check_targets(config: dict[str, Any], merged: dict[str, Tensor]) -> None:
    """Check that every target module in the config has tensors, and no other module has."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return
    if not all(isinstance(target, str) for target in targets):
        raise AdapterRejectedError(f"adapter's target_modules={targets!r} are no module names")
    module_names = {name.removesuffix(".weight") for name in merged}
    stray = sorted(
        name
        for name in module_names
        if not any(name == target or name.endswith(f".{target}") for target in targets)
    )
    absent = sorted(
        target
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in module_names)
    )
    if stray or absent:
        raise AdapterRejectedError(
            f"adapter's tensors and its target_modules disagree: without tensors {absent}, unnamed {stray}"
        )


def _check_not_shared(base: nn.Module, merged: dict[str, Tensor]) -> None:
    """What a part shares with its target would change the target."""
    part = TargetPart.of(base)
    if part is not None and (shared := sorted(merged.keys() - own_parameters(base).keys())):
        raise AdapterRejectedError(
            f"adapter touches {shared[0]!r}, which {part} shares with the target; merging it would change "
            "the target's text"
        )


def _check_not_tied(base: nn.Module, merged: dict[str, Tensor]) -> None:
    """A weight shared by two modules cannot take two different deltas in place."""
    owners: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    for names in owners.values():
        touched = [name for name in names if name in merged]
        if touched and len(names) > 1:
            raise AdapterRejectedError(
                f"adapter touches {touched[0]!r}, which the draft ties to "
                f"{sorted(set(names) - set(touched))}; merging it would change both"
            )
