"""How long a text the models of a service can take, and beyond which length their text would be wrong.

A sliding window has no effect on texts that fit in it, and long-rope keeps one set of frequencies up to the
length that the model was first trained on. So such models are served up to that length, where they are exact,
and refused beyond it.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from serving.models.errors import UnsupportedModelError
from serving.models.refusals import has_sliding_layers, rope_of, text_part


class FittedContext(NamedTuple):
    max_seq_len: int
    note: str = ""
    """What was cut, and why; empty if nothing was."""


def max_positions(model: nn.Module) -> int:
    """Longest context that the model takes."""
    return int(getattr(text_part(model.config), "max_position_embeddings", 0) or 2**20)


def fitted_context(asked: int, models: Iterable[tuple[str, nn.Module]]) -> FittedContext:
    """`asked` tokens, or as many as all of these models (name, model or outline) have positions for. Raises
    UnsupportedModelError for a model whose text would be wrong at that length, with the length that works."""
    named = list(models)
    lengths = {name: max_positions(model) for name, model in named}
    fitted = min([asked, *lengths.values()])
    for name, model in named:
        for exact, reason in _exact_lengths(text_part(model.config)):
            if fitted > exact:
                raise UnsupportedModelError(
                    f"model {name!r} {reason}, so its text would be wrong at max_seq_len={fitted}; "
                    f"max_seq_len={exact} works"
                )
    if fitted == asked:
        return FittedContext(asked)
    positions = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
    return FittedContext(
        fitted,
        f"max_seq_len={asked} is cut to {fitted}, the fewest positions of a model ({positions}): prompt and "
        f"output together hold at most {fitted} tokens",
    )


def hold_frequencies(model: nn.Module) -> None:
    """Keep a long-rope model at its frequencies for short texts, which it was loaded with: by itself it would
    look at the positions of each pass and choose."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            setattr(module, "rope_type", "default")  # noqa: B010 (an attribute that nn.Module does not declare)


def _exact_lengths(text: Any) -> Iterator[tuple[int, str]]:
    """(longest exact text, what becomes wrong beyond it)"""
    if has_sliding_layers(text):
        window = text.sliding_window
        yield (
            window,
            f"uses sliding-window attention (sliding_window={window}), and the engine's masks bypass it",
        )
    rope = rope_of(text)
    if rope.get("rope_type") == "longrope":
        length = rope["original_max_position_embeddings"]
        yield (
            length,
            f"has other frequencies for texts of over {length} tokens (rope_type='longrope'), so that batch "
            "mates would change the text",
        )
