"""A SlotPass compiled ahead of time for a processor: one package for all batch sizes, lengths and contexts.

The package holds code and no weights: they are bound by address when it is loaded, so a swap in place is seen
by the next pass, and one package serves every pair of the same shape. Loading runs native code: packages
belong in a folder that only their owner can write. Sizes are symbolic in the package; the exporter does not
guarantee a size of one, so `agrees` compares real passes before a package is used.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, export

from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_pass import SlotPass, additive_mask

MAX_ROWS = 1024
_EXAMPLE_ROWS, _EXAMPLE_TOKENS, _EXAMPLE_COLUMNS = 4, 3, 16
_CHECKED_SHAPES = ((1, 1), (1, 2), (2, 1), (3, 5), (1, 9))
"""Shapes (rows, tokens) that `agrees` compares; those that the runner cannot hold are left out."""


@torch.no_grad()
def compile_pass(slot_pass: SlotPass, keys_and_values: list[Tensor], path: Path) -> None:
    """Write the package to `path`. `keys_and_values`: as in SlotPass, of at least 4 rows; only their shapes
    count. Raises whatever the compiler raises."""
    tokens_BT = torch.zeros((_EXAMPLE_ROWS, _EXAMPLE_TOKENS), dtype=torch.int64)
    columns_BT = torch.arange(5, 5 + _EXAMPLE_TOKENS).expand(_EXAMPLE_ROWS, -1).contiguous()
    mask_B1TK = additive_mask(columns_BT, _EXAMPLE_COLUMNS, keys_and_values[0].dtype)
    keep_E = torch.arange(2)
    rows = Dim("rows", min=2, max=MAX_ROWS)
    tokens = Dim("tokens", min=2, max=slot_pass.max_seq_len)
    columns = Dim("columns", min=2, max=slot_pass.max_seq_len + 1)
    kept = Dim("kept", min=2, max=slot_pass.max_seq_len)
    shapes = (
        {0: rows, 1: tokens},
        {0: rows, 1: tokens},
        {0: rows, 2: tokens, 3: columns},
        {0: kept},
        [{0: rows}] * len(keys_and_values),
    )
    examples = tokens_BT, columns_BT, mask_B1TK, keep_E, [kv[:_EXAMPLE_ROWS] for kv in keys_and_values]
    config: Any = torch.fx.experimental._config
    with config.patch(backed_size_oblivious=True):
        program = export(slot_pass, examples, dynamic_shapes=shapes, strict=False)
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.package_constants_in_so": False},
        )


class CompiledPass:
    """A package bound to a model's live weights."""

    def __init__(self, path: Path, slot_pass: SlotPass) -> None:
        """Raises RuntimeError or OSError for a package that this torch cannot load, KeyError for one of
        another model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._package: Any = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        weights: dict[str, Tensor] = dict(slot_pass.named_buffers(remove_duplicate=False))
        weights.update(slot_pass.named_parameters(remove_duplicate=False))
        bound = {name: weights[name].detach() for name in self._package.get_constant_fqns()}
        self._package.load_constants(bound, check_full_update=True, user_managed=True)
        self._bound = bound  # keeps the tensors alive, of which the package holds only addresses

    def __call__(
        self,
        token_ids_BT: Tensor,
        columns_BT: Tensor,
        mask_B1TK: Tensor,
        keep_E: Tensor,
        keys_and_values: list[Tensor],
    ) -> Tensor:
        """See SlotPass.forward."""
        inputs = [token_ids_BT.contiguous(), columns_BT.contiguous(), mask_B1TK, keep_E, *keys_and_values]
        logits_BEV: Tensor
        [logits_BEV] = self._package.loader.boxed_run(
            inputs
        )  # a call with pytree flattening would take longer than this
        return logits_BEV


@torch.inference_mode()
def agrees(compiled: CompiledPass, slot_pass: SlotPass, runner: Runner) -> bool:
    """Whether logits, keys and values of both are equal up to rounding, over a cache of its own."""
    tolerance = 1e-3 if runner.dtype == torch.float32 else 0.05
    return all(
        _distance(compiled, slot_pass, runner, num_rows, num_tokens) <= tolerance
        for num_rows, num_tokens in _CHECKED_SHAPES
        if num_rows <= runner.num_slots and 2 * num_tokens <= runner.max_seq_len
    )


def _distance(
    compiled: CompiledPass, slot_pass: SlotPass, runner: Runner, num_rows: int, num_tokens: int
) -> float:
    """Largest relative difference of a pass over a random context."""
    generator = torch.Generator().manual_seed(num_rows * 100 + num_tokens)
    tokens_BT = torch.randint(runner.num_embedded, (num_rows, num_tokens), generator=generator)
    start = runner.max_seq_len // 2
    columns_BT = torch.arange(start, start + num_tokens).expand(num_rows, -1).contiguous()
    mask_B1TK = additive_mask(columns_BT, start + num_tokens, runner.dtype)
    keep_E = torch.arange(num_tokens)
    kept = runner.cache.rows(0, num_rows)
    context = [0.5 * torch.randn(kv.shape, generator=generator).to(runner.dtype) for kv in kept]
    outcomes = []
    for run in (slot_pass, compiled):
        keys_and_values = [kv.clone() for kv in context]
        logits_BEV = run(tokens_BT, columns_BT, mask_B1TK, keep_E, keys_and_values)
        outcomes.append([logits_BEV, *keys_and_values])
    return max(_relative(one, other) for one, other in zip(*outcomes, strict=True))


def _relative(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest number; -inf in the same places differs by nothing."""
    difference = torch.where(one == other, 0.0, (one - other).abs())
    return float(difference.max() / one.masked_fill(one.isinf(), 0.0).abs().max().clamp(min=1.0))
