"""Keys and values of a part of the target: its first layers are the target's slot cache, the rest is its own.

A draft's pass writes the shared layers at the columns that it runs. Tokens that the target has read get the
values that are there, up to rounding; columns of draft tokens are written again by the pass that verifies
them. Invariant: clearing or moving a slot touches only what this cache owns: the other layers hold the
target's context.
"""

from torch import Tensor

from serving.engine.passes.slot_cache import SlotCache, SlotLayer


class SharedSlotCache(SlotCache):
    """`kv_L2SHTD`, `columns`, sizes, clearing and moving are those of its own layers; a pass sees all."""

    def __init__(self, shared: SlotCache, *, num_shared: int, num_own: int = 1) -> None:
        """The first `num_shared` layers of `shared`, and `num_own` further ones."""
        _, _, num_slots, num_kv_heads, _, head_dim = shared.kv_L2SHTD.shape
        super().__init__(
            num_layers=num_own,
            num_slots=num_slots,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_len=shared.max_len,
            dtype=shared.kv_L2SHTD.dtype,
            device=shared.kv_L2SHTD.device,
        )
        self._shared, self._num_shared = shared, num_shared
        self._all_rows: dict[tuple[int, int], list[Tensor]] = {}
        first = [
            SlotLayer(keys_SHTD, values_SHTD) for keys_SHTD, values_SHTD in shared.kv_L2SHTD[:num_shared]
        ]
        self._slot_layers = [*first, *self._slot_layers]
        self.layers = list(self._slot_layers)

    def rows(self, first_slot: int, num_rows: int) -> list[Tensor]:
        """See SlotCache; the shared layers' first."""
        where = first_slot, num_rows
        if where not in self._all_rows:
            shared = self._shared.rows(first_slot, num_rows)[: 2 * self._num_shared]
            self._all_rows[where] = [*shared, *super().rows(first_slot, num_rows)]
        return self._all_rows[where]
