"""A part of the target as an ordinary checkpoint, for an engine that cannot draft with the target itself.

vLLM loads drafts as models from files, so `serving.draft = "self"` becomes what `everdraft draft init`
writes, kept by target, and the learner trains its last block alone. Starts nothing.
"""

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from deploy.child_command import run_everdraft
from deploy.errors import ModelPairError
from deploy.part_choice import AUTO
from deploy.settings import Settings
from serving.cache_folders import cache_folder
from serving.models.inspection import inspect_model
from serving.models.model_files import find_model
from serving.models.target_part import SELF, TargetPart


def with_draft_checkpoint(settings: Settings, narrate: Callable[[str], None]) -> Settings:
    """The settings with a folder in place of `self` where the engine is vLLM; others as they are. Raises
    ModelPairError."""
    serving, learner = settings.serving, settings.learner
    if serving.engine != "vllm" or (serving.draft or "").split(":")[0] != SELF:
        return settings
    part = None if serving.draft == AUTO else TargetPart.named(serving.draft)
    if part is None or part.block != "whole" or part.kept_tokens is not None:
        raise ModelPairError(
            f"serving.draft={serving.draft!r}: vLLM drafts with whole models over all tokens; write self or "
            "self:E; nothing was started"
        )
    num_layers = part.exit_layer + 1
    folder = cache_folder("drafts") / _name(serving.target, serving.dtype, num_layers)
    if not folder.exists():
        narrate(f"writing the target's first {num_layers} layers as a draft, fitted to it: {folder}")
        _write(serving.target, folder, num_layers, serving.dtype)
    if learner.trainable is None:
        learner = learner.model_copy(
            update={"trainable": "full", "target_modules": block_modules(str(folder), num_layers - 1)}
        )
    return settings.model_copy(
        update={"serving": serving.model_copy(update={"draft": str(folder)}), "learner": learner}
    )


def block_modules(draft: str, layer: int) -> tuple[str, ...]:
    """Last parts of the names of a layer's modules that have weights."""
    marker = f".layers.{layer}."
    names = (name.rpartition(".")[0] for name, _ in inspect_model(draft).outline.named_parameters())
    return tuple(
        sorted({f"layers.{layer}." + name.split(marker)[1] for name in names if marker in f"{name}."})
    )


def _name(target: str, dtype: str, num_layers: int) -> str:
    """Another one where the target's files were changed in place."""
    files = sorted(find_model(target).folder.glob("*.safetensors"))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return sha256(json.dumps([target, dtype, num_layers, stamps]).encode()).hexdigest()[:16]


def _write(target: str, folder: Path, num_layers: int, dtype: str) -> None:
    """In a process of its own; whole or not at all."""
    aside = folder.with_name(f"{folder.name}.{os.getpid()}")
    arguments = ("--target", target, "--out", str(aside), "--layers", str(num_layers), "--dtype", dtype)
    try:
        run_everdraft("draft", "init", *arguments, failure=f"serving.draft='{SELF}'")
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
