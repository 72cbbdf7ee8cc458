"""Refuses models that cannot be served, from their configuration or transformers' report of a load.

The slot cache needs models whose whole state is keys and values of one size at absolute positions, and an
attention that takes a boolean mask as it is (sdpa). Each check is a small function that returns what is
wrong, or None; read `_CONFIG_CHECKS` for the list.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.auto import AutoHfQuantizer

from serving.models.errors import UnsupportedModelError, first_few, refusing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEVICE = re.compile(r"cpu|cuda(:(?P<index>\d+))?")
_UNSAFE_ROPE = ("dynamic", "longrope")
"""Of these the last is safe up to a length, where all layers have it; see `context_limit`."""
_OTHER_SENSES = re.compile("vision|audio|image|speech|video")
_LAYER = re.compile(r"^(?P<stack>.*?)(?P<number>\d+)\.")
_UNUSED_IN_LAYERS = re.compile(r"rotary|inv_freq|masked_bias|\.(attn|attention)\.bias$|\.[kv]_scale$")
"""Constants of old checkpoints, which the class makes by itself."""


def check_device(device: str, *, is_here: bool = True) -> None:
    """Refuse a device that does not exist; `is_here` False: it is on another machine, so only its name is
    checked."""
    if (name := _DEVICE.fullmatch(device)) is None:
        raise UnsupportedModelError(
            f"device={device!r} is none of cpu, cuda and cuda:N; nothing can run on it"
        )
    if device == "cpu" or not is_here:
        return
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(name["index"] or 0) >= num_devices:
        raise UnsupportedModelError(
            f"device={device!r} is not on this machine, where torch sees {num_devices} CUDA devices; "
            "nothing can run on it"
        )


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UnsupportedModelError(f"dtype={dtype!r} is none of {sorted(DTYPES)}; nothing was loaded")


def check_code(name: str, config: Mapping[str, Any]) -> None:
    """Refuse, before transformers would ask interactively, a model that brings its own code or that this
    transformers does not know. `config` is the parsed config.json."""
    model_type, auto_map = config.get("model_type"), config.get("auto_map")
    if str(model_type) in CONFIG_MAPPING:
        return
    if auto_map:
        raise UnsupportedModelError(
            f"model {name!r} needs code of its own (model_type={model_type!r}, auto_map={auto_map}), which "
            "is never run: it could do anything on this machine"
        )
    if model_type is not None:
        raise UnsupportedModelError(
            f"model {name!r} has model_type={model_type!r}, which this transformers does not know, so it "
            "cannot be loaded"
        )


def text_part(config: Any) -> Any:
    """The part of a configuration that is about text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def check_config(name: str, config: Any) -> None:
    """Refuse a model whose state is more than keys and values at absolute positions."""
    text = text_part(config)
    for check in _CONFIG_CHECKS:
        if (reason := check(config, text)) is not None:
            raise UnsupportedModelError(f"model {name!r} {reason}")
    check_quantization(name, config, text)


def _other_senses(config: Any, text: Any) -> str | None:
    parts = [key for key in getattr(config, "sub_configs", {}) if _OTHER_SENSES.search(key)]
    parts = [key for key in parts if getattr(config, key, None) is not None]
    if not parts:
        return None
    return (
        f"({config.model_type}) has {first_few(parts)}: it reads more than text, and only models of text "
        "alone are served"
    )


def _encoder_decoder(config: Any, text: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder; only decoder-only models work"
    return None


def has_sliding_layers(text: Any) -> bool:
    """Whether some layers attend to a window only; `context_limit` says up to which length that is
    nothing."""
    layer_types = _layer_types(text)
    if layer_types:
        return "sliding_attention" in layer_types
    return bool(getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True))


def _unknown_window(config: Any, text: Any) -> str | None:
    window, chunked = getattr(text, "sliding_window", None), "chunked_attention" in _layer_types(text)
    if not chunked and (window or not has_sliding_layers(text)):
        return None
    return (
        f"uses {'chunked' if chunked else 'sliding-window'} attention (sliding_window={window}); the "
        "engine's masks bypass it, so its text would be wrong. Use a model with full attention"
    )


def _recurrent(config: Any, text: Any) -> str | None:
    recurrent = _layer_types(text) - {"full_attention", "sliding_attention"}
    if not recurrent and getattr(text, "num_attention_heads", None):
        return None
    return (
        f"({config.model_type}) has recurrent or linear-attention layers {sorted(recurrent)}; their state "
        "cannot be rolled back after a rejected draft"
    )


def rope_of(text: Any) -> dict[str, Any]:
    """How positions are told; by kind of layer where they differ."""
    return getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}


def _unsafe_rope(config: Any, text: Any) -> str | None:
    rope = rope_of(text)
    by_layer = [part for part in rope.values() if isinstance(part, dict)]
    types = [str(part.get("rope_type", part.get("type", "default"))) for part in by_layer or [rope]]
    unsafe = _UNSAFE_ROPE if by_layer else _UNSAFE_ROPE[:1]
    if (rope_type := next((each for each in types if each in unsafe), None)) is None:
        return None
    return (
        f"uses rope_type={rope_type!r}, whose frequencies depend on the longest sequence of the batch: batch "
        "mates would change the text. Disable the scaling"
    )


def _alibi(config: Any, text: Any) -> str | None:
    attention = getattr(text, "attn_config", None)
    biased = getattr(text, "alibi", False) or getattr(attention, "alibi", False)
    if not biased and text.model_type != "bloom" and getattr(text, "position_embedding_type", "") != "alibi":
        return None
    return (
        f"({text.model_type}) tells positions by ALiBi, a bias on attention that the engine's boolean masks "
        "cannot carry, so its text would be wrong"
    )


def _unequal_heads(config: Any, text: Any) -> str | None:
    """Multi-head latent attention has key heads of two parts, and value heads of another size."""
    parts = [getattr(text, key, None) or 0 for key in ("qk_nope_head_dim", "qk_rope_head_dim")]
    usual = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key_dim = sum(parts) or usual
    value_dim = getattr(text, "v_head_dim", None) or key_dim
    if key_dim == value_dim == usual:
        return None
    return (
        f"({text.model_type}) has key heads of {key_dim} values and value heads of {value_dim} "
        f"(v_head_dim), with head_dim={usual}; the slot cache holds heads of one size, so it cannot be served"
    )


def _no_language_model(config: Any, text: Any) -> str | None:
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    return f"({config.model_type}) is no causal language model to transformers, so it generates no text"


def _no_sdpa(config: Any, text: Any) -> str | None:
    if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_sdpa", False):
        return None
    return (
        f"({config.model_type}) has no sdpa attention, and eager attention adds a boolean mask instead of "
        "applying it, which is silently wrong"
    )


_CONFIG_CHECKS: tuple[Callable[[Any, Any], str | None], ...] = (
    _other_senses,
    _encoder_decoder,
    _unknown_window,
    _recurrent,
    _unsafe_rope,
    _alibi,
    _unequal_heads,
    _no_language_model,
    _no_sdpa,
)
"""Run in this order on the configuration and its text part; the first fault is reported."""


def _layer_types(text: Any) -> set[str]:
    return set(getattr(text, "layer_types", None) or ())


def quantization(config: Any) -> Any:
    """How the weights are packed; None for plain ones."""
    text = text_part(config)
    return getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)


def check_quantization(name: str, config: Any, text: Any) -> None:
    """Refuse packed weights whose library is not installed or does not run here."""
    packing = quantization(config)
    if packing is None:
        return
    method = packing.get("quant_method") if isinstance(packing, dict) else packing.quant_method
    with refusing(name, f"has quantization_config with quant_method={method!r}, which cannot be loaded here"):
        quantizer = AutoHfQuantizer.from_config(packing, pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)


def check_attention(name: str, model: nn.Module) -> None:
    """Refuse any attention but sdpa, e.g. eager, which would add the boolean mask."""
    config: Any = model.config
    text = text_part(config)
    implementation = getattr(text, "_attn_implementation", None)
    if implementation != "sdpa":
        raise UnsupportedModelError(
            f"model {name!r} runs attn_implementation={implementation!r}; only 'sdpa' applies the engine's "
            "boolean mask as it is (eager adds it, silently wrong). Load it with sdpa"
        )


def check_account(name: str, model: nn.Module, account: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that does not fit the class: `account` is transformers' `output_loading_info`, in
    which tied weights and constants that a class expects or ignores do not appear."""
    if missing := account["missing_keys"]:
        raise UnsupportedModelError(
            f"model {name!r} lacks {len(missing)} of its tensors: {first_few(missing)}; they would be random "
            "numbers, others at each load. Complete its weights' files"
        )
    if mismatched := sorted(account["mismatched_keys"]):
        key, found, expected = mismatched[0]
        raise UnsupportedModelError(
            f"model {name!r} has {len(mismatched)} tensors of other shapes than its config.json says: "
            f"{key!r} is {list(found)}, not {list(expected)}; they would be random numbers. Give the right "
            "config.json"
        )
    if unplaced := _unplaced(model, account["unexpected_keys"]):
        raise UnsupportedModelError(
            f"model {name!r} has {len(unplaced)} tensors in its layers that {type(model).__name__} with "
            f"num_hidden_layers={_num_layers(model)} has no place for: {first_few(unplaced)}; what they "
            "compute would be left out, silently wrong. Give the right config.json"
        )


def _unplaced(model: nn.Module, unexpected: set[str]) -> set[str]:
    """Unexpected tensors within the decoder's own layers; other towers and layers that predict further tokens
    do not change the text, and transformers logs that they are left out."""
    config: Any = model.config
    stacks = {layer["stack"] for key in model.state_dict() if (layer := _LAYER.match(key))}
    stacks |= {stack.removeprefix(f"{model.base_model_prefix}.") for stack in stacks}
    first = _num_layers(model)
    further = range(first, first + (getattr(config, "num_nextn_predict_layers", None) or 0))
    return {
        key
        for key in unexpected
        if (layer := _LAYER.match(key))
        and layer["stack"] in stacks
        and int(layer["number"]) not in further
        and not _UNUSED_IN_LAYERS.search(key)
    }


def _num_layers(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.num_hidden_layers)
