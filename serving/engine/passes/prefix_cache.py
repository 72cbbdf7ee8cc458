"""Prefix cache: keys and values that were computed before are copied into a slot instead of prefilled again.

A prefix is a chain of blocks, each found by its parent block and its own tokens: an exact key, no hash that
could collide. Chains share their common blocks; the least recently used block is evicted. Knows no sequences
and no weights: a draft, whose weights change, clears its own. Invariants: a parent is always marked as used
after its children, so that it is never evicted before them; values that are not finite are never kept. Copied
values may have been computed in chunks of another shape: equal up to the last bits, as chunked prefill is in
any case. Requests of one salt share blocks, those of different API keys too: the time to the first token
shows that a prompt's beginning was seen before, and nothing else does. An isolated tenant has a salt of its
own; `prefix_cache_mib = 0` turns the cache off.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from serving.engine.passes.prompt_embedding import BlockMean
from serving.engine.passes.slot_cache import SlotCache

BLOCK_TOKENS = 16
_ROOT = -1

_Key = tuple[int | str, tuple[int, ...]]
"""The parent block's row in the pool, and the block's tokens. A first block has its salt in place of a row,
or _ROOT without one."""


@dataclass(frozen=True)
class PrefixCacheStats:
    """Counters since the start, and the present size."""

    num_query_tokens: int = 0
    """Prompt tokens that were looked up."""
    num_hit_tokens: int = 0
    """Tokens among them that were copied instead of prefilled."""
    num_evicted_blocks: int = 0
    num_bytes: int = 0
    """Bytes of the blocks in use; never above `max_bytes`."""
    max_bytes: int = 0


class PrefixCache:
    """A pool of blocks [layers, 2, kv heads, N blocks, C columns, head_dim] beside a SlotCache."""

    def __init__(self, slots: SlotCache, *, max_bytes: int, block_tokens: int = BLOCK_TOKENS) -> None:
        """Allocates all memory: as many whole blocks as `max_bytes` holds."""
        num_layers, _, _, num_heads, _, head_dim = slots.kv_L2SHTD.shape
        self._block_bytes = block_tokens * slots.column_bytes
        self._num_blocks = max_bytes // self._block_bytes
        shape = (num_layers, 2, num_heads, self._num_blocks, block_tokens, head_dim)
        self._kv_L2HNCD = slots.kv_L2SHTD.new_zeros(shape)
        self._slots, self._block_tokens = slots, block_tokens
        self._rows: OrderedDict[_Key, int] = OrderedDict()
        """Row of each block, least recently used first."""
        self._means: dict[int, BlockMean] = {}
        """Mean hidden state of a block's tokens, by row, where it is known; on the host."""
        self._free = list(range(self._num_blocks))
        self._num_query_tokens = self._num_hit_tokens = self._num_evicted_blocks = 0

    @property
    def num_bytes(self) -> int:
        return self._kv_L2HNCD.numel() * self._kv_L2HNCD.element_size()

    def stats(self) -> PrefixCacheStats:
        return PrefixCacheStats(
            num_query_tokens=self._num_query_tokens,
            num_hit_tokens=self._num_hit_tokens,
            num_evicted_blocks=self._num_evicted_blocks,
            num_bytes=len(self._rows) * self._block_bytes,
            max_bytes=self.num_bytes,
        )

    def load(self, slot: int, token_ids: Sequence[int], salt: str | None = None) -> int:
        """Fill a slot's first columns with the longest known prefix of `token_ids`. Returns how many."""
        chain = self._find(token_ids, salt)
        num_columns = len(chain) * self._block_tokens
        if chain:
            self._touch(chain)
            rows_N = self._index([self._rows[key] for key in chain])
            blocks_L2HNCD = self._kv_L2HNCD.index_select(3, rows_N)
            self._slots.columns(slot, 0, num_columns).copy_(blocks_L2HNCD.flatten(3, 4))
        self._num_query_tokens += len(token_ids)
        self._num_hit_tokens += num_columns
        return num_columns

    @property
    def block_tokens(self) -> int:
        return self._block_tokens

    def means(self, token_ids: Sequence[int], salt: str | None = None) -> list[BlockMean]:
        """Means of the known blocks that `token_ids` begin with."""
        return [self._means.get(self._rows[key]) for key in self._find(token_ids, salt)]

    def store(
        self,
        slot: int,
        token_ids: Sequence[int],
        means: Sequence[BlockMean] = (),
        salt: str | None = None,
    ) -> None:
        """Keep the slot's first columns, which hold `token_ids`: whole blocks that are not kept yet. `means`:
        hidden states of the first blocks, as far as they are known."""
        chain = self._find(token_ids, salt)
        self._touch(chain)
        num_known = len(chain)
        num_new = min(len(token_ids) // self._block_tokens, self._num_blocks) - num_known
        if num_new <= 0:
            return
        start, end = num_known * self._block_tokens, (num_known + num_new) * self._block_tokens
        columns_L2HTD = self._slots.columns(slot, start, end)
        if not torch.isfinite(columns_L2HTD).all():
            return
        rows = self._take(num_new)
        blocks_L2HNCD = columns_L2HTD.unflatten(3, (num_new, self._block_tokens))
        self._kv_L2HNCD.index_copy_(3, self._index(rows), blocks_L2HNCD)
        for number, row in enumerate(rows, start=num_known):
            parent = self._rows[chain[-1]] if chain else _root(salt)
            chain.append(self._key(parent, self._block(token_ids, number)))
            self._rows[chain[-1]] = row
            if number < len(means):
                self._means[row] = means[number]
        self._touch(chain)

    def clear(self) -> None:
        """Forget every block."""
        self._rows.clear()
        self._means.clear()
        self._free = list(range(self._num_blocks))

    def _find(self, token_ids: Sequence[int], salt: str | None) -> list[_Key]:
        """The longest chain of known blocks that `token_ids` begin with."""
        chain: list[_Key] = []
        parent = _root(salt)
        for number in range(len(token_ids) // self._block_tokens):
            key = self._key(parent, self._block(token_ids, number))
            row = self._rows.get(key)
            if row is None:
                break
            chain.append(key)
            parent = row
        return chain

    def _key(self, parent: int | str, tokens: tuple[int, ...]) -> _Key:
        return parent, tokens

    def _block(self, token_ids: Sequence[int], number: int) -> tuple[int, ...]:
        return tuple(token_ids[number * self._block_tokens : (number + 1) * self._block_tokens])

    def _touch(self, chain: list[_Key]) -> None:
        """Mark the chain as used, the root last, so that the root is evicted last."""
        for key in reversed(chain):
            self._rows.move_to_end(key)

    def _take(self, count: int) -> list[int]:
        """Rows for new blocks; evicts the least recently used blocks if none are free."""
        while len(self._free) < count:
            _, row = self._rows.popitem(last=False)
            self._free.append(row)
            self._means.pop(row, None)
            self._num_evicted_blocks += 1
        return [self._free.pop() for _ in range(count)]

    def _index(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows, device=self._kv_L2HNCD.device)


def _root(salt: str | None) -> int | str:
    """The parent of a first block."""
    return _ROOT if salt is None else salt
