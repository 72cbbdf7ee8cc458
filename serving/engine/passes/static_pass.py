"""Passes of a few fixed shapes, captured as CUDA graphs where there is CUDA: one launch instead of thousands.

A pass over the slots 0, 1, … is padded up to a bucket of rows, tokens and context columns. A captured graph
holds addresses: the bucket's inputs are copied into place, and weights that are swapped in place are seen by
the next replay. Without CUDA the same code runs uncaptured. Rows past the batch may be other sequences'
slots: padding is written to the trash column only, attends to column 0 only, and is cut from the logits; no
pass reads the trash column. Legend: B rows, T tokens, K columns of a bucket; V vocabulary.
"""

import bisect
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from serving.engine.passes.slot_cache import SlotCache
from serving.engine.passes.slot_pass import SlotPassFunction, additive_mask
from serving.engine.passes.strategy import PassInput

_log = logging.getLogger(__name__)

TOKEN_BUCKETS = (1, 2, 4, 6, 9)
"""Numbers of tokens a row; longer passes (chunks of a prompt) run eagerly."""
MAX_GRAPHS = 64
"""Above this the least recently used graph is dropped: long texts need many context buckets one after
another."""
_LEAST_COLUMNS = 256
_NUM_WARM_UPS = 2


@dataclass(frozen=True)
class Bucket:
    num_rows: int
    num_tokens: int
    num_columns: int


def row_buckets(num_slots: int) -> tuple[int, ...]:
    """1, 2, 4, … and all slots."""
    powers = (2**power for power in range(num_slots.bit_length()))
    return (*(rows for rows in powers if rows < num_slots), num_slots)


def column_buckets(max_seq_len: int) -> tuple[int, ...]:
    """256 and up in steps of a quarter of an octave, so that few columns are read unnecessarily; the whole
    slot last."""
    columns, step, buckets = _LEAST_COLUMNS, _LEAST_COLUMNS // 4, list[int]()
    while columns < max_seq_len:
        buckets.append(columns)
        columns += step
        if columns == 8 * step:
            step *= 2
    return (*buckets, max_seq_len)


class StaticPass:
    """`run` over a cache's first slots in fixed shapes. Called by one thread at a time."""

    def __init__(
        self, run: SlotPassFunction, cache: SlotCache, *, num_logits: int, max_graphs: int = MAX_GRAPHS
    ) -> None:
        """`num_logits`: the size of the model's own vocabulary."""
        self._run = run
        self._cache = cache
        self._device = cache.kv_L2SHTD.device
        num_slots = int(cache.kv_L2SHTD.shape[2])
        self._row_buckets = row_buckets(num_slots)
        self._column_buckets = column_buckets(cache.max_len)
        self._max_graphs = max_graphs
        self._shapes: OrderedDict[Bucket, _StaticShape] = OrderedDict()
        most_logits = num_slots * TOKEN_BUCKETS[-1] * num_logits
        self._logits_N = torch.empty(most_logits, dtype=torch.float32, device=self._device)
        self._num_logits = num_logits
        captures = self._device.type == "cuda"
        self._pool: Any = torch.cuda.graph_pool_handle() if captures else None
        self._stream: Any = torch.cuda.Stream(self._device) if captures else None

    def can_run(self, given: PassInput) -> bool:
        """Whether a pass of this shape has a bucket."""
        num_rows, num_tokens = given.token_ids_BT.shape
        fits = num_rows <= self._row_buckets[-1] and num_tokens <= TOKEN_BUCKETS[-1]
        return given.first_slot == 0 and fits

    def run(self, given: PassInput) -> Tensor:
        """See Pass; the logits are valid until the next run."""
        logits_BTV = self(given.token_ids_BT, given.positions_BT, given.kv_len)
        return logits_BTV[:, -given.logits_to_keep :]

    @torch.inference_mode()
    def __call__(self, token_ids_BT: Tensor, columns_BT: Tensor, kv_len: int) -> Tensor:
        """Logits [B, T, V] in float32, valid until the next call. A token at column c attends to 0..c;
        `kv_len` is one more than the largest that is not the trash column."""
        num_rows, num_tokens = token_ids_BT.shape
        shape = self._shape(num_rows, num_tokens, kv_len)
        shape.fill(token_ids_BT, columns_BT)
        if shape.graph is None:
            self._pass(shape)
        else:
            shape.graph.replay()
        return shape.logits_BTV[:num_rows, :num_tokens]

    def _shape(self, num_rows: int, num_tokens: int, kv_len: int) -> "_StaticShape":
        bucket = Bucket(
            _at_least(self._row_buckets, num_rows),
            _at_least(TOKEN_BUCKETS, num_tokens),
            _at_least(self._column_buckets, kv_len),
        )
        if bucket not in self._shapes:
            if len(self._shapes) == self._max_graphs:
                self._shapes.popitem(last=False)
            self._shapes[bucket] = self._made(bucket)
        self._shapes.move_to_end(bucket)
        return self._shapes[bucket]

    def _made(self, bucket: Bucket) -> "_StaticShape":
        num_logits = bucket.num_rows * bucket.num_tokens * self._num_logits
        shape = _StaticShape(
            bucket,
            trash_column=self._cache.trash_column,
            keys_and_values=self._cache.rows(0, bucket.num_rows),
            logits_BTV=self._logits_N[:num_logits].view(bucket.num_rows, bucket.num_tokens, -1),
        )
        if self._stream is not None:
            self._capture(shape)
        return shape

    def _pass(self, shape: "_StaticShape") -> None:
        """Run one pass with inputs and logits at fixed addresses: the part that a graph captures."""
        trash = self._cache.trash_column
        attended_BT = shape.columns_BT.masked_fill(shape.columns_BT == trash, 0)
        logits_BTV = self._run(
            shape.token_ids_BT,
            shape.columns_BT,
            additive_mask(attended_BT, shape.bucket.num_columns, self._cache.kv_L2SHTD.dtype),
            shape.keep_T,
            shape.keys_and_values,
        )
        shape.logits_BTV.copy_(logits_BTV)

    def _capture(self, shape: "_StaticShape") -> None:
        """Capture a shape. Its inputs are still all padding, so the warm-up changes no sequence. Other
        threads may use the device meanwhile. A shape that cannot be captured runs without a graph."""
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_NUM_WARM_UPS):
                    self._pass(shape)
            current.wait_stream(self._stream)
            try:
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    self._pass(shape)
            except RuntimeError:
                _log.exception("%s cannot be captured; it runs without a graph", shape.bucket)
                return
        shape.graph = graph

    @property
    def num_captured(self) -> int:
        return sum(shape.graph is not None for shape in self._shapes.values())


@dataclass(eq=False)
class _StaticShape:
    """One bucket: its inputs, its logits, and its graph."""

    bucket: Bucket
    trash_column: int
    keys_and_values: list[Tensor]
    logits_BTV: Tensor
    """Shared by all buckets, because passes run one at a time."""
    graph: Any = None
    token_ids_BT: Tensor = field(init=False)
    columns_BT: Tensor = field(init=False)
    keep_T: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows, tokens, device = self.bucket.num_rows, self.bucket.num_tokens, self.logits_BTV.device
        self.token_ids_BT = torch.zeros((rows, tokens), dtype=torch.int64, device=device)
        self.columns_BT = torch.full_like(self.token_ids_BT, self.trash_column)
        self.keep_T = torch.arange(tokens, device=device)
        self._filled = (0, 0)

    def fill(self, token_ids_BT: Tensor, columns_BT: Tensor) -> None:
        """Copy a pass's inputs into place; the rest stays padding."""
        num_rows, num_tokens = token_ids_BT.shape
        if (num_rows, num_tokens) != self._filled:
            self.columns_BT.fill_(self.trash_column)
            self._filled = num_rows, num_tokens
        self.token_ids_BT[:num_rows, :num_tokens].copy_(token_ids_BT)
        self.columns_BT[:num_rows, :num_tokens].copy_(columns_BT)


def _at_least(buckets: tuple[int, ...], count: int) -> int:
    return buckets[bisect.bisect_left(buckets, count)]
