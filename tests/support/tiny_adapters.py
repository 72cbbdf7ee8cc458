"""LoRA adapters for a tiny draft, made by PEFT itself, with the manifest that publishes them."""

import hashlib
import json
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from buffer.names import DEFAULT_ROUTE
from buffer.records import AdapterManifest
from serving.models.loading import load_draft, weights_revision

RANK, ALPHA, MODULES = 4, 8, ("q_proj", "v_proj", "down_proj")


def tiny_adapter(
    draft: str,
    *,
    draft_version: int,
    target_revision: str,
    draft_revision: str | None = None,
    parent_version: int = 0,
    route: str = DEFAULT_ROUTE,
    size: float = 0.3,
) -> tuple[AdapterManifest, bytes]:
    """A random adapter (another one for each version) whose weights have standard deviation `size`."""
    base = load_draft(draft)
    revision = draft_revision or weights_revision(base)
    torch.manual_seed(draft_version)
    with warnings.catch_warnings():  # PEFT reads a name that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES)))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=size)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = (Path(folder) / "adapter_model.safetensors").read_bytes()
        config = json.dumps(json.loads((Path(folder) / "adapter_config.json").read_text()))
    manifest = AdapterManifest(
        route=route,
        draft_version=draft_version,
        parent_version=parent_version,
        draft_id="tiny",
        draft_revision=revision,
        target_revision=target_revision,
        rank=RANK,
        alpha=float(ALPHA),
        target_modules=MODULES,
        adapter_config_json=config,
        sha256=hashlib.sha256(weights).hexdigest(),
        num_bytes=len(weights),
        created_at_s=time.time(),
    )
    return manifest, weights
