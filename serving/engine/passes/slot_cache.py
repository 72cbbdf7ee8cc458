"""Keys and values by slot, under unmodified transformers models.

One tensor holds every layer; a row is a slot. A pass over the contiguous slots [first, first + B) writes each
token's keys at its own position and hands attention the first `kv_len` columns as a view, no copy. After a
rejection the sequence's length simply does not grow: columns past it hold stale values, which the mask hides
until they are written again. The last column is the trash column: padding tokens are written there.
Invariant: a slot is zeroed before it is used by another sequence, because even a masked NaN would spread
through attention.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

Where = tuple[Tensor, Tensor, Tensor]
"""Rows [B, 1, 1], heads [H, 1] and columns [B, 1, T] that index keys or values [B, H, columns, D]."""


class SlotCache(Cache):
    """KV [layers, 2, slots, kv heads, max_len + 1, head_dim]; `window` chooses what a pass sees."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (num_layers, 2, num_slots, num_kv_heads, max_len + 1, head_dim)
        self.kv_L2SHTD = torch.zeros(shape, dtype=dtype, device=device)
        self.max_len = max_len
        self.trash_column = max_len
        self.num_bytes = self.kv_L2SHTD.numel() * self.kv_L2SHTD.element_size()
        self.column_bytes = self.num_bytes // (num_slots * (max_len + 1))
        self._slot_layers = [SlotLayer(keys_SHTD, values_SHTD) for keys_SHTD, values_SHTD in self.kv_L2SHTD]
        self._rows: dict[tuple[int, int], list[Tensor]] = {}
        super().__init__(layers=list(self._slot_layers))

    def window(self, first_slot: int, positions_BT: Tensor, kv_len: int) -> None:
        """The next pass runs slots [first_slot, first_slot + B) and writes at `positions_BT`."""
        num_rows, num_tokens = positions_BT.shape
        if (
            num_rows == 1 and positions_BT.device.type == "cpu"
        ):  # on a GPU reading positions would wait for the device
            start = int(positions_BT[0, 0])
            is_run = int(positions_BT[0, -1]) == start + num_tokens - 1
            span = slice(start, start + num_tokens) if is_run else None
        else:
            span = None
        where = where_of(positions_BT, self.kv_L2SHTD.shape[3])
        for layer in self._slot_layers:
            layer.aim(first_slot, num_rows, where, span, kv_len)

    def rows(self, first_slot: int, num_rows: int) -> list[Tensor]:
        """Keys and values in turn, by layer, of the slots [first_slot, first_slot + num_rows); views."""
        where = first_slot, num_rows
        if where not in self._rows:
            rows_L2BHTD = self.kv_L2SHTD[:, :, first_slot : first_slot + num_rows]
            self._rows[where] = list(rows_L2BHTD.flatten(0, 1).unbind())
        return self._rows[where]

    def clear(self, slot: int, from_column: int = 0) -> None:
        """Zero a slot, or the columns from one on, so that no values of its last sequence, in particular no
        NaN, remain."""
        self.kv_L2SHTD[:, :, slot, :, from_column:].zero_()

    def columns(self, slot: int, start: int, end: int) -> Tensor:
        """A view [layers, 2, kv heads, end - start, head_dim] of one slot's columns."""
        return self.kv_L2SHTD[:, :, slot, :, start:end]

    def clear_all(self) -> None:
        self.kv_L2SHTD.zero_()

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the first `length` columns of a slot over another's and clear the rest of it; slots stay
        contiguous that way."""
        if length > 0:
            self.kv_L2SHTD[:, :, destination, :, :length] = self.kv_L2SHTD[:, :, source, :, :length]
        self.clear(destination, from_column=length)


def where_of(positions_BT: Tensor, num_heads: int) -> Where:
    """Indices at which a pass writes, in the memory order of the cache: with a transposed view a compiler
    would copy the whole cache."""
    num_rows, device = positions_BT.shape[0], positions_BT.device
    rows_B11 = torch.arange(num_rows, device=device)[:, None, None]
    return rows_B11, torch.arange(num_heads, device=device)[:, None], positions_BT[:, None]


def cache_of(layers: "list[SlotLayer]") -> Cache:
    """A transformers Cache of layers whose window is already set."""
    return Cache(layers=list(layers))


class SlotLayer(CacheLayerMixin):
    """One layer of the cache; transformers calls `update` in each attention."""

    is_sliding = False

    def __init__(self, keys_SHTD: Tensor, values_SHTD: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keys_SHTD, self._values_SHTD = keys_SHTD, values_SHTD
        self.is_initialized = True

    def aim(
        self,
        first_slot: int,
        num_rows: int,
        where: Where,
        span: slice | None,
        kv_len: int,
    ) -> None:
        slots = slice(first_slot, first_slot + num_rows)
        self._keys_BHTD, self._values_BHTD = self._keys_SHTD[slots], self._values_SHTD[slots]
        self._where = where
        self._span, self._kv_len = span, kv_len

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values [B, H, T, D] in, the whole visible [B, H, kv_len, D] out."""
        if self._span is not None:
            self._keys_BHTD[:, :, self._span] = key_states
            self._values_BHTD[:, :, self._span] = value_states
        else:
            self._keys_BHTD[self._where] = key_states
            self._values_BHTD[self._where] = value_states
        return self._keys_BHTD[:, :, : self._kv_len], self._values_BHTD[:, :, : self._kv_len]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the storage exists from the start."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._kv_len, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return int(self._keys_SHTD.shape[2])
