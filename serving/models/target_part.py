"""A part of the target as its draft: the target's first layers, one block on top of them, and its head.

Block, last norm and a linear map before the head are a part's own, and learn; all else are the target's
modules, so that a part costs little memory and its first layers' keys and values are the target's. A part is
a model of the target's class with fewer layers, and runs wherever a draft model runs. After Kangaroo (arXiv
2404.18911), whose block is attention alone; the map is what `part_fit` sets.
"""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from serving.models.errors import UnsupportedModelError
from serving.models.kept_head import first_tokens, kept_buffers, kept_head, shrink_head
from serving.models.refusals import text_part

Block = Literal["whole", "attention"]

SELF = "self"
"""What names a part of the target in place of a draft model."""
DEFAULT_EXIT_LAYER = 2
_CONFIG_KEY = "everdraft_part"
_MADE = 1
"""Raised where a part is built or fitted in another way: adapters of the earlier ones do not fit it."""


@dataclass(frozen=True)
class TargetPart:
    """Which part. `exit_layer`: number of the target's layers in it, which the block follows. `kept_tokens`:
    so many tokens its head can propose; None: all."""

    exit_layer: int = DEFAULT_EXIT_LAYER
    block: Block = "whole"
    kept_tokens: int | None = None

    @classmethod
    def named(cls, name: str | None) -> Self | None:
        """The part that a name such as `self`, `self:E`, `self:E:attention`, `self:E:M` or
        `self:E:attention:M` means; None for a name of anything else.

        Raises UnsupportedModelError for a name that begins like one of a part and is none."""
        kind, *details = (name or "").split(":")
        if kind != SELF:
            return None
        layer = details.pop(0) if details else str(DEFAULT_EXIT_LAYER)
        block = details.pop(0) if details and details[0] in get_args(Block) else "whole"
        kept = details.pop(0) if details else None
        if details or not layer.isdecimal() or not (kept is None or (kept.isdecimal() and int(kept))):
            raise UnsupportedModelError(
                f"draft {name!r} names no part of the target: `self`, `self:E`, `self:E:attention`, "
                "`self:E:M` or `self:E:attention:M`, where E is the number of the target's layers in it "
                "and M how many tokens its head can propose (`self:auto` is for `everdraft serve`, which "
                "chooses one of them); nothing is drafted with it"
            )
        return cls(int(layer), block, None if kept is None else int(kept))  # type: ignore[arg-type]  # checked

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """The part that a model was built as; None for any other model."""
        described = getattr(model.config, _CONFIG_KEY, None)
        return None if described is None else cls(**described)

    def __str__(self) -> str:
        block = "" if self.block == "whole" else f":{self.block}"
        return f"{SELF}:{self.exit_layer}{block}" + (f":{self.kept_tokens}" if self.kept_tokens else "")

    def revision(self, target_revision: str) -> str:
        """Of the part as it starts, which follows from the target and the fit."""
        return hashlib.sha256(f"{target_revision} {self} {_MADE}".encode()).hexdigest()

    def build(self, target: nn.Module) -> nn.Module:
        """The part, in eval mode without gradients, its block a copy of the target's layer `exit_layer`. On
        the meta device if the target is.

        Raises UnsupportedModelError where the target has too few layers, or none that can be told apart."""
        source = _Anatomy.of(target)
        num_layers = len(source.layers)
        if self.exit_layer >= num_layers:
            raise UnsupportedModelError(
                f"draft {str(self)!r} takes {self.exit_layer} of the target's layers and copies the next "
                f"one; the target has {num_layers} layers, so E must be below {num_layers}"
            )
        num_tokens = text_part(target.config).vocab_size
        if self.kept_tokens is not None and self.kept_tokens >= num_tokens:
            raise UnsupportedModelError(
                f"draft {str(self)!r} has a head over {self.kept_tokens} tokens, and the target has "
                f"{num_tokens}, so M must be below {num_tokens}; leave it out for a head over all"
            )
        with torch.device("meta"):
            part: Any = type(target)(self._config(target))
        _reshape_decoder(part, self)
        own = _Anatomy.of(part)
        _share(part, target, {source.layers, source.norm})
        _reshape_head(part, self)
        for number in range(self.exit_layer):
            own.layers[number] = source.layers[number]
        _fill(own.layers[self.exit_layer], source.layers[self.exit_layer])
        assert isinstance(own.norm, MappedNorm)
        _fill(own.norm.norm, source.norm)
        weight = next(source.norm.parameters())
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        own.norm.map.weight = nn.Parameter(identity)
        module: nn.Module = part.eval().requires_grad_(False)
        return module

    def _config(self, target: nn.Module) -> Any:
        """The target's, with fewer layers, and what part it is."""
        config: Any = copy.deepcopy(target.config)
        text = text_part(config)
        num_layers = text.num_hidden_layers
        for key, value in vars(text).items():
            if "layer" in key and isinstance(value, list) and len(value) == num_layers:
                setattr(text, key, value[: self.exit_layer + 1])
        text.num_hidden_layers = self.exit_layer + 1
        setattr(config, _CONFIG_KEY, asdict(self))
        return config


def reshape(model: nn.Module) -> None:
    """Make a model of its class, with few layers, the part that its configuration says, or give it the small
    head that it says; no other model changes. Raises UnsupportedModelError."""
    shrink_head(model, text_part(model.config), {})
    part = TargetPart.of(model)
    if part is not None:
        _reshape_decoder(model, part)
        _reshape_head(model, part)


def _reshape_decoder(model: nn.Module, part: TargetPart) -> None:
    anatomy = _Anatomy.of(model)
    setattr(anatomy.decoder, anatomy.norm_name, MappedNorm(anatomy.norm))
    if part.block == "whole":
        return
    block = anatomy.layers[part.exit_layer]
    if not hasattr(block, "mlp"):
        raise UnsupportedModelError(
            f"draft {str(part)!r} needs layers whose feed-forward part is called `mlp`; those of "
            f"{type(model).__name__} have none. Use the whole block, `{SELF}:{part.exit_layer}`"
        )
    block.mlp = NoUpdate()


def _reshape_head(model: Any, part: TargetPart) -> None:
    if part.kept_tokens is None:
        return
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"draft {str(part)!r} needs a linear head; that of {type(model).__name__} is a "
            f"{type(head).__name__}. Leave out M"
        )
    model.set_output_embeddings(first_tokens(head, part.kept_tokens))


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By first name, each once: those of a part's block, norm and map; all parameters of any other model."""
    named = dict(model.named_parameters())
    if TargetPart.of(model) is None:
        return named
    own = {id(weight) for module in _own_modules(model) for weight in module.parameters()}
    return {name: weight for name, weight in named.items() if id(weight) in own}


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """By name, what a swap may change: `own_parameters`, and which tokens a part's head keeps."""
    return {**own_parameters(model), **kept_buffers(model)}


def own_copy(model: nn.Module) -> nn.Module:
    """A copy with weights of its own, which shares with a part's target what the part shares with it."""
    if TargetPart.of(model) is None:
        return copy.deepcopy(model)
    own = {id(module) for each in _own_modules(model) for module in each.modules()}
    if head := kept_head(model):
        own.add(id(head[1]))
    shared = [module for module in model.modules() if own.isdisjoint(map(id, module.modules()))]
    return copy.deepcopy(model, {id(module): module for module in shared})


def plain_config(part: nn.Module) -> Any:
    """Of an ordinary model of the target's class with the part's layers, and a head of its own."""
    config: Any = copy.deepcopy(part.config)
    delattr(config, _CONFIG_KEY)
    config.tie_word_embeddings = text_part(config).tie_word_embeddings = False
    return config


def plain_weights(part: nn.Module) -> dict[str, Tensor]:
    """The weights of a part with a whole block, without its map, as the model of `plain_config` names
    them."""
    anatomy = _Anatomy.of(part)
    [norm] = [name for name, module in part.named_modules() if module is anatomy.norm]
    own, kept = f"{norm}.norm.", {}
    for name, weight in part.state_dict().items():
        if name.startswith(own):
            kept[f"{norm}.{name.removeprefix(own)}"] = weight
        elif not name.startswith(f"{norm}."):
            kept[name] = weight
    return kept


class NoUpdate(nn.Module):
    """In place of a sub-layer that is skipped: adds nothing to the residual stream."""

    def forward(self, states_BTH: Tensor) -> Tensor:
        return torch.zeros_like(states_BTH)


class MappedNorm(nn.Module):
    """A part's last norm, and a linear map of its output to what the target's head expects."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weight = next(norm.parameters())
        self.norm = norm
        self.map = nn.Linear(len(weight), len(weight), bias=False, dtype=weight.dtype, device=weight.device)

    def forward(self, states_BTH: Tensor) -> Tensor:
        mapped_BTH: Tensor = self.map(self.norm(states_BTH))
        return mapped_BTH


def map_of(part: nn.Module) -> nn.Linear:
    """The part's map, which is the identity until it is fitted or learns."""
    norm = _Anatomy.of(part).norm
    assert isinstance(norm, MappedNorm)
    return norm.map


@dataclass(frozen=True)
class _Anatomy:
    """Where a causal language model has its layers and its last norm."""

    decoder: nn.Module
    layers: nn.ModuleList
    norm_name: str

    @property
    def norm(self) -> nn.Module:
        return self.decoder.get_submodule(self.norm_name)

    @classmethod
    def of(cls, model: nn.Module) -> "_Anatomy":
        """Raises UnsupportedModelError."""
        get_decoder: Any = getattr(model, "get_decoder", None)
        decoder: nn.Module = model if get_decoder is None else get_decoder()
        layers = [each for each in decoder.children() if isinstance(each, nn.ModuleList)]
        norms = [name for name, each in decoder.named_children() if each not in layers and _is_norm(each)]
        if len(layers) != 1 or len(norms) != 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} has {len(layers)} lists of layers and {len(norms)} norms beside "
                "them, not one of each, so no part of it can be told from the rest. Give a draft model"
            )
        return cls(decoder, layers[0], norms[0])


def _own_modules(part: nn.Module) -> Iterator[nn.Module]:
    anatomy, described = _Anatomy.of(part), TargetPart.of(part)
    assert described is not None
    yield from anatomy.layers[described.exit_layer :]
    yield anatomy.norm


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, MappedNorm):
        return True
    weights = list(module.parameters())
    return bool(weights) and all(weight.dim() == 1 for weight in weights)


def _share(part: nn.Module, target: nn.Module, own: set[nn.Module]) -> None:
    """Put the target's modules into the part, all but `own`."""
    for name, module in target.named_children():
        if module in own:
            continue
        if own.isdisjoint(module.modules()):
            setattr(part, name, module)
        else:
            _share(getattr(part, name), module, own)


def _fill(outline: nn.Module, source: nn.Module) -> None:
    """Give a module on the meta device copies of the source's weights."""
    found = source.state_dict()
    outline.load_state_dict({key: found[key].clone() for key in outline.state_dict()}, assign=True)
