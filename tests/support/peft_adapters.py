"""Real PEFT adapters of a model, as bytes."""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

ALL_MODULES = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "lm_head",
    "embed_tokens",
]


def random_adapter(
    model: nn.Module, *, rank: int = 4, alpha: float = 8.0, seed: int = 0, modules: list[str] | None = None
) -> tuple[bytes, str, nn.Module]:
    """(safetensors bytes, adapter_config.json, the PEFT model); the weights are random, not zero."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=modules or ALL_MODULES,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder, save_embedding_layers=False)
        weights = (Path(folder) / "adapter_model.safetensors").read_bytes()
        text = (Path(folder) / "adapter_config.json").read_text()
    return weights, text, peft_model
