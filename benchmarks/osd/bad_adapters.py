"""Adapters that must never be applied: each is a fitting one with a single thing wrong.

Pure functions of (manifest, weights, generator). Knows no engine. Invariant: everything but the one fault
would pass, so a refusal can only be due to it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from buffer.records import AdapterManifest
from serving.models.adapter import sha256_of

Package = tuple[AdapterManifest, bytes]
Tamper = Callable[[AdapterManifest, bytes, np.random.Generator], Package]


def _repacked(manifest: AdapterManifest, tensors: Mapping[str, Tensor]) -> Package:
    """With a hash that is right again."""
    weights = safetensors.torch.save(dict(tensors), {"format": "pt"})
    return replace(manifest, sha256=sha256_of(weights), num_bytes=len(weights)), weights


def _one_tensor(change: Callable[[Tensor, np.random.Generator], Tensor]) -> Tamper:
    def tamper(manifest: AdapterManifest, weights: bytes, rng: np.random.Generator) -> Package:
        tensors = safetensors.torch.load(weights)
        name = sorted(tensors)[rng.integers(len(tensors))]
        return _repacked(manifest, tensors | {name: change(tensors[name].clone(), rng).contiguous()})

    return tamper


def _tensors(change: Callable[[dict[str, Tensor], np.random.Generator], dict[str, Tensor]]) -> Tamper:
    def tamper(manifest: AdapterManifest, weights: bytes, rng: np.random.Generator) -> Package:
        changed = change(safetensors.torch.load(weights), rng)
        return _repacked(manifest, {name: tensor.contiguous() for name, tensor in changed.items()})

    return tamper


def _bytes(change: Callable[[bytes, np.random.Generator], bytes], *, rehashed: bool) -> Tamper:
    def tamper(manifest: AdapterManifest, weights: bytes, rng: np.random.Generator) -> Package:
        changed = change(weights, rng)
        return (replace(manifest, sha256=sha256_of(changed)) if rehashed else manifest), changed

    return tamper


def _says(**fields: Any) -> Tamper:
    return lambda manifest, weights, rng: (replace(manifest, **fields), weights)


def _config(change: Callable[[dict[str, Any]], object]) -> Tamper:
    def tamper(manifest: AdapterManifest, weights: bytes, rng: np.random.Generator) -> Package:
        changed = change(json.loads(manifest.adapter_config_json))
        text = changed if isinstance(changed, str) else json.dumps(changed)
        return replace(manifest, adapter_config_json=text), weights

    return tamper


def _filled(tensor: Tensor, rng: np.random.Generator, value: float) -> Tensor:
    tensor.view(-1)[int(rng.integers(tensor.numel()))] = value
    return tensor


def _flipped(weights: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(weights)
    changed[int(rng.integers(len(weights)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _without_one(tensors: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    del tensors[sorted(tensors)[rng.integers(len(tensors))]]
    return tensors


def _without_a_module(tensors: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    """Every module of one name, both halves: what a target list promises and the file lacks."""
    ends = sorted({name.split(".lora_")[0].split(".")[-1] for name in tensors})
    gone = ends[rng.integers(len(ends))]
    return {name: tensor for name, tensor in tensors.items() if f".{gone}.lora_" not in name}


def _another_layer(tensors: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    return {name.replace("layers.0.", "layers.99."): tensor for name, tensor in tensors.items()}


def _lower_rank(tensors: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    return {name: tensor[:-1] if "lora_A" in name else tensor[:, :-1] for name, tensor in tensors.items()}


def _huge(tensors: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    """Finite, but not once A and B are multiplied."""
    return {name: torch.full_like(tensor, 3e38) for name, tensor in tensors.items()}


def _foreign_name(tensors: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    return {name.replace("lora_", "ia3_"): tensor for name, tensor in tensors.items()}


BAD_ADAPTERS: Mapping[str, Tamper] = {
    "wrong hash": _says(sha256="0" * 64),
    "flipped bit": _bytes(_flipped, rehashed=False),
    "truncated": _bytes(lambda weights, rng: weights[: int(rng.integers(8, len(weights)))], rehashed=False),
    "truncated, hash right": _bytes(
        lambda weights, rng: weights[: int(rng.integers(8, len(weights)))], rehashed=True
    ),
    "no bytes": _bytes(lambda weights, rng: b"", rehashed=True),
    "noise for bytes": _bytes(lambda weights, rng: rng.bytes(len(weights)), rehashed=True),
    "NaN": _one_tensor(lambda tensor, rng: _filled(tensor, rng, float("nan"))),
    "infinity": _one_tensor(lambda tensor, rng: _filled(tensor, rng, float("inf"))),
    "overflow when merged": _tensors(_huge),
    "wrong shape": _one_tensor(lambda tensor, rng: tensor.T),
    "integers": _one_tensor(lambda tensor, rng: (100 * tensor).to(torch.int32)),
    "lower rank than it says": _tensors(_lower_rank),
    "half a pair": _tensors(_without_one),
    "modules missing": _tensors(_without_a_module),
    "modules of another model": _tensors(_another_layer),
    "no LoRA": _tensors(_foreign_name),
    "foreign target": _says(target_revision="f" * 64),
    "foreign draft": _says(draft_revision="f" * 64),
    "another rank in the manifest": _says(rank=1),
    "another alpha in the config": _config(lambda config: config | {"lora_alpha": 1e3}),
    "no config": _config(lambda config: "not JSON"),
    "unsupported config": _config(lambda config: config | {"use_dora": True}),
    "another rank in the config": _config(lambda config: config | {"r": config["r"] + 1}),
}
