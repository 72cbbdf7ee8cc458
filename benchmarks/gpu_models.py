"""Models of a real pair's shape with random weights, the floor under a pass of theirs, and how it is timed.

The floor of a pass is the bytes it must read (weights, embedding rows aside, and the keys and values of its
context) over the bandwidth that a copy reaches on the same device, bytes read plus bytes written.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

from serving.engine.passes.runner import Runner

Shape = dict[str, Any]

TARGET: Shape = {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
"""Qwen3-8B's."""
DRAFT: Shape = TARGET | {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "intermediate_size": 3072,
    "tie_word_embeddings": True,
}
"""Qwen3-0.6B's."""
TINY_TARGET: Shape = TARGET | {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 256,
}
TINY_DRAFT: Shape = TINY_TARGET | {"num_hidden_layers": 1, "tie_word_embeddings": True}


def build(shape: Shape, *, max_positions: int, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """A Qwen3 model made where it will run, without a copy on the host."""
    config = Qwen3Config(
        **shape,
        max_position_embeddings=max_positions,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.pad_token_id = 0
    return model.to(device).eval().requires_grad_(False)


def pass_bytes(model: Any, *, num_rows: int, kv_len: int) -> int:
    """What one pass cannot but read."""
    config = model.config
    weights = {id(weight): weight for weight in model.parameters()}
    if not config.tie_word_embeddings:
        del weights[id(model.get_input_embeddings().weight)]
    size = next(iter(weights.values())).element_size()
    kv_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    num_read = sum(weight.numel() for weight in weights.values())
    return int(size * (num_read + num_rows * kv_len * kv_per_token))


def copy_bytes_per_s(device: torch.device, num_bytes: int, repeats: int) -> float:
    """Of a large copy on the device, read plus written."""
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    seconds = in_turn_s(
        {"copy": lambda: destination.copy_(source)}, device, calls=4, warm_ups=2, repeats=repeats
    )
    return 2 * num_bytes / seconds["copy"]


def in_turn_s(
    arms: dict[str, Callable[[], Any]], device: torch.device, *, calls: int, warm_ups: int, repeats: int
) -> dict[str, float]:
    """Seconds of one call of each arm: the median over turns, each a window of `calls` calls."""
    for run in arms.values():
        for _ in range(warm_ups):
            run()
    windows: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, run in arms.items():
            windows[name].append(window_s(run, device, calls) / calls)
    return {name: statistics.median(seconds) for name, seconds in windows.items()}


def window_s(run: Callable[[], Any], device: torch.device, calls: int) -> float:
    """From an idle device to the end of the last call's work."""
    synchronize(device)
    began_s = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return time.perf_counter() - began_s


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class SyntheticAcceptance(Runner):
    """LOSSY BY DESIGN, for timing only: drafted tokens are accepted by a fixed pseudo-random pattern.

    Runs the model in full, then overrules what it said of the tokens of the pass itself: where the pattern
    accepts, the drafted token gets the largest logit, elsewhere the least. Greedy requests only.
    """

    overrules = False
    """Switched on once the passes were checked."""

    def __init__(self, model: nn.Module, *, num_slots: int, max_seq_len: int, acceptance: float) -> None:
        super().__init__(model, num_slots=num_slots, max_seq_len=max_seq_len)
        generator = torch.Generator().manual_seed(0)
        uniform_SK = torch.rand((num_slots, max_seq_len + 1), generator=generator)
        self._accepts_SK = (uniform_SK < acceptance).to(self.device)

    @torch.inference_mode()
    def forward(
        self,
        token_ids_BT: Tensor,
        positions_BT: Tensor,
        *,
        kv_len: int,
        first_slot: int = 0,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """See Runner.forward."""
        logits_BTV = super().forward(
            token_ids_BT,
            positions_BT,
            kv_len=kv_len,
            first_slot=first_slot,
            logits_to_keep=logits_to_keep,
        )
        if not self.overrules or token_ids_BT.shape[1] == 1 or logits_to_keep:
            return logits_BTV
        rows_B1 = torch.arange(token_ids_BT.shape[0], device=self.device)[:, None]
        accepts_BG = self._accepts_SK[rows_B1, positions_BT[:, :-1]]
        overruled_BG = torch.where(accepts_BG, 1e4, -1e4)
        logits_BTV[:, :-1].scatter_(-1, token_ids_BT[:, 1:, None], overruled_BG[..., None])
        return logits_BTV
