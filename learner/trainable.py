"""The trainable weights of a draft: PEFT LoRA pairs on a frozen base, or the draft's own weights.

Knows no records and no loss. Invariants: every trainable weight is listed once, under the key that it is
exported with; with the values of `floor` the draft is the one that was loaded; nothing else of the model ever
changes.
"""

import copy
import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from learner.settings import TrainableName
from serving.models.full_weights import full_config, full_parameters
from serving.models.target_part import TargetPart, own_parameters


@dataclass(frozen=True, eq=False)
class Trainable:
    """A model that computes logits, and its trainable weights."""

    model: Any
    weights: dict[str, nn.Parameter]
    """The live weights: LoRA by PEFT's key (`base_model.model.<module>.lora_A.weight`), full weights by
    parameter name."""
    floor: dict[str, Tensor]
    """The part of `weights` that the floor determines, with its values."""
    rank: int
    """0 for full weights, which have no alpha."""
    alpha: float
    target_modules: tuple[str, ...]
    """Empty: every weight."""
    config_json: str
    """The configuration that is exported with `weights`."""
    export_dtype: torch.dtype = torch.float32
    """In which a candidate is judged, exported and served."""


def trainable_name(base: nn.Module, asked: TrainableName | None) -> TrainableName:
    """What learns; None was asked: of a part of the target its own weights, of a draft model LoRA pairs."""
    return asked or ("lora" if TargetPart.of(base) is None else "full")


def export_dtype(base: nn.Module, trainable: TrainableName) -> torch.dtype:
    """In which trained weights are judged and published."""
    return torch.bfloat16 if trainable == "full" and TargetPart.of(base) is not None else torch.float32


def lora_trainable(
    base: nn.Module,
    *,
    draft_id: str,
    rank: int,
    alpha: float,
    target_modules: tuple[str, ...] | None,
    seed: int,
) -> Trainable:
    """LoRA on the base, which PEFT wraps in place. Every B starts at zero, so the start is the floor."""
    modules = target_modules or adapted_module_names(base)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # annotated int; PEFT only divides by the rank
        target_modules=list(modules),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks the base for a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        torch.manual_seed(seed)
        model: Any = get_peft_model(base, config)
    config.base_model_name_or_path = draft_id  # PEFT put the base's local path there
    weights = _lora_weights(model)
    floor = {key: torch.zeros_like(weight) for key, weight in weights.items() if _is_second_factor(key)}
    return Trainable(model, weights, floor, rank, alpha, modules, _peft_config_json(config))


def full_trainable(base: nn.Module, *, target_modules: tuple[str, ...] | None) -> Trainable:
    """Trains the base itself, or only the named modules; tied weights are trained as one.

    Raises ValueError where `target_modules` names nothing in the base."""
    base.requires_grad_(False)
    weights = dict(sorted(full_parameters(base, target_modules).items()))
    if not weights:
        raise ValueError(f"target_modules={target_modules} names no weight of the draft; nothing would learn")
    floor = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    config_json, dtype = full_config(target_modules, TargetPart.of(base)), export_dtype(base, "full")
    return Trainable(base, weights, floor, 0, 0.0, target_modules or (), config_json, dtype)


def adapted_module_names(base: Any) -> tuple[str, ...]:
    """Names, or their last parts, of the modules that LoRA adapts by default: attention, MLP and, unless they
    are tied, embedding and head, which a draft needs for tokens that were rare in its own training; of a part
    of the target, the linear layers of its block."""
    if TargetPart.of(base) is not None:
        own = {name.rpartition(".")[0] for name in own_parameters(base)}
        return tuple(sorted(name for name in own if isinstance(base.get_submodule(name), nn.Linear)))
    head, embedding = output_head(base), base.get_input_embeddings()
    ends = [module for module in (head, embedding) if isinstance(module, nn.Linear | nn.Embedding)]
    tied = head.weight is embedding.weight
    names = {
        name.split(".")[-1]
        for name, module in base.named_modules()
        if (isinstance(module, nn.Linear) and module is not head) or (not tied and module in ends)
    }
    return tuple(sorted(names))


def state_bytes(num_trainable: int, export_bytes: int) -> int:
    """What a route's training state takes: trained weights, two moments and their mean in float32; the
    candidate, what serves as tensors and as bytes, and its parent at `export_bytes` a weight."""
    return (4 * 4 + 4 * export_bytes) * num_trainable


def output_head(model: Any) -> nn.Module:
    """The layer that gives logits, wrapped in LoRA or not."""
    head: nn.Module = model.get_output_embeddings()
    return head


def _lora_weights(model: PeftModel) -> dict[str, nn.Parameter]:
    """The model's own LoRA parameters under the keys that PEFT exports them with."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    exported = get_peft_model_state_dict(model, save_embedding_layers=False)
    by_pointer = {parameter.data_ptr(): parameter for parameter in trainable}
    weights = {key: by_pointer[tensor.data_ptr()] for key, tensor in sorted(exported.items())}
    assert len(weights) == len(trainable), "every trainable weight has a key of its own"
    return weights


def _peft_config_json(config: LoraConfig) -> str:
    """adapter_config.json, as PEFT itself writes it, ready for inference."""
    with tempfile.TemporaryDirectory() as folder:
        ready = copy.copy(config)
        ready.inference_mode = True
        ready.save_pretrained(folder)
        text = (Path(folder) / "adapter_config.json").read_text()
    return json.dumps(json.loads(text), sort_keys=True)


def _is_second_factor(key: str) -> bool:
    return "lora_B" in key or "lora_embedding_B" in key
