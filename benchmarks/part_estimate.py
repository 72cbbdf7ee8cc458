"""What a target's own part would be worth on a GPU, calculated from what a pass must read; nothing is run.

One request, greedy. A pass takes the time in which the GPU reads the weights that it needs: that of a
decoding step whose bytes are all weights. The acceptance is assumed, not predicted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from serving.engine.counters import expected_block_efficiency

MAX_LENGTH = 8


@dataclass(frozen=True)
class Hardware:
    """Milliseconds of a target of 8 billion weights in bfloat16 on a GPU that reads 4.8 TB/s."""

    pass_ms: float = 4.5
    """A decoding step of the target: 16 GB, and what starting it costs."""
    head_ms: float = 0.33
    """Its head: 128,256 rows of 4,096."""
    layer_ms: float = 0.115
    """One of its 32 layers: 218 million weights, and starting it."""
    attention_share: float = 0.25
    """Of a layer's weights, those of its attention and its norms."""
    round_ms: float = 0.35
    """What a round costs beside passes."""
    vocab_size: int = 128_256


SMOLLM2 = Hardware(
    pass_ms=1.0, head_ms=0.04, layer_ms=0.026, attention_share=0.6, round_ms=0.35, vocab_size=49_152
)
"""SmolLM2-135M on the same GPU: a layer of 3.5 million weights is read in .0015 ms, so that starting it, the
.024 ms that is left of the large one's, is nearly all of it, of attention alone as well."""


@dataclass(frozen=True)
class Estimate:
    """The best draft length of a part, and what it gives."""

    draft_ms: float
    num_draft_tokens: int
    speedup: float


def estimate(
    exit_layer: int,
    acceptance: float,
    *,
    whole_block: bool = True,
    kept_tokens: int | None = None,
    hardware: Hardware | None = None,
) -> Estimate:
    """`kept_tokens`: rows of the draft's head; None: the target's whole head."""
    gpu = hardware or Hardware()
    head_ms = gpu.head_ms * (1.0 if kept_tokens is None else kept_tokens / gpu.vocab_size)
    block = 1.0 if whole_block else gpu.attention_share
    draft_ms = (exit_layer + block) * gpu.layer_ms + head_ms
    speedups = {
        length: expected_block_efficiency([acceptance] * length)
        * gpu.pass_ms
        / (gpu.pass_ms + gpu.round_ms + length * draft_ms)
        for length in range(1, MAX_LENGTH + 1)
    }
    best = max(speedups, key=lambda length: speedups[length])
    return Estimate(draft_ms, best, speedups[best])


ACCEPTANCES = (0.6, 0.7, 0.8, 0.9)


def rows(hardware: Hardware | None = None) -> Iterator[tuple[str, ...]]:
    """Part, head, milliseconds a draft pass, and the speed-up at each acceptance with its draft length."""
    gpu = hardware or Hardware()
    for exit_layer in (0, 1, 2, 4, 7):
        for block in ("whole", "attention"):
            for kept, head in ((None, "whole"), (32_768, "32,768 rows"), (8_192, "8,192 rows")):
                found = [
                    estimate(exit_layer, value, whole_block=block == "whole", kept_tokens=kept, hardware=gpu)
                    for value in ACCEPTANCES
                ]
                name = f"`self:{exit_layer}`" if block == "whole" else f"`self:{exit_layer}:attention`"
                speeds = (f"{one.speedup:.2f} ({one.num_draft_tokens})" for one in found)
                yield (name, head, f"{found[0].draft_ms:.2f}", *speeds)
