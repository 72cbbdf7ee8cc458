"""A GGUF file as an ordinary checkpoint: its weights in float32, configuration and tokenizer, written once.

transformers reads the file; what it leaves in the model so that it cannot be saved, and what it does not take
over of the tokenizer, is mended here. Invariant: a folder is whole, or it is not there.
"""

import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from serving.cache_folders import cache_folder
from serving.models.errors import UnsupportedModelError, refusing

SUFFIX = ".gguf"
_PRE = "tokenizer.ggml.pre"
_DIGIT_BY_DIGIT = ("smollm",)
"""Values of `_PRE` whose tokenizer splits numbers into digits before anything else."""


def converted_folder(file: Path) -> Path:
    """Where the conversion of this file lies or would lie; another file under its name has another."""
    status = file.stat()
    stamp = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    return cache_folder("converted") / f"{file.stem}-{sha256(stamp.encode()).hexdigest()[:12]}"


def convert_gguf(file: Path, out: Path) -> None:
    """Write the model of a GGUF file to the folder `out`, which must not be there. Needs the package gguf,
    twice the model's size in memory, and about a minute a hundred million weights. Raises
    UnsupportedModelError, FileExistsError."""
    if out.exists():
        raise FileExistsError(f"{out} is there already; nothing was written")
    _require_gguf(file)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with refusing(str(file), "cannot be converted"):
        model: Any = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(**given)
        _split_digits(file, tokenizer)
        model.config._name_or_path = file.stem
        for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if hasattr(owner, name):
                delattr(owner, name)  # the weights are not quantised any more, and would not be saved
        aside = out.with_name(f"{out.name}.{os.getpid()}")
        try:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            aside.rename(out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _require_gguf(file: Path) -> None:
    try:
        import gguf  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError as error:
        raise UnsupportedModelError(
            f"model {str(file)!r} is a GGUF file, which the package gguf reads: `pip install gguf`; nothing "
            "was converted"
        ) from error


def _split_digits(file: Path, tokenizer: Any) -> None:
    """transformers does not take over what `_PRE` names."""
    from gguf import GGUFReader  # type: ignore[import-not-found,unused-ignore]
    from tokenizers import pre_tokenizers

    field = GGUFReader(file).fields.get(_PRE)
    if field is None or field.contents() not in _DIGIT_BY_DIGIT:
        return
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
