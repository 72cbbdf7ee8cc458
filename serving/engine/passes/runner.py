"""One model and its slot cache: tokens at positions in, logits out. Knows nothing of rounds or drafts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from serving.engine.passes.kv_shape import KvShape
from serving.engine.passes.slot_cache import SlotCache
from serving.engine.passes.slot_pass import SlotPassFunction
from serving.engine.passes.static_pass import StaticPass
from serving.engine.passes.strategy import FunctionPass, ModelPass, Pass, PassInput
from serving.engine.passes.transfer import to_device


class Runner:
    """Runs passes over contiguous slots of a transformers causal language model."""

    def __init__(
        self,
        model: nn.Module,
        *,
        num_slots: int,
        max_seq_len: int,
        vocab_size: int | None = None,
        cache: SlotCache | None = None,
    ) -> None:
        """`vocab_size`: the pair's common one; if the model's own differs by padding, its logits are cut to
        it or padded with -inf. `cache`: another runner's cache, to share it."""
        shape = KvShape.of(model)
        parameter = next(model.parameters())
        self.model = model
        self.device, self.dtype = parameter.device, parameter.dtype
        self.num_embedded = shape.vocab_size
        self.vocab_size = vocab_size or self.num_embedded
        self.num_slots, self.max_seq_len = num_slots, max_seq_len
        self.cache = cache or SlotCache(
            num_layers=shape.num_layers,
            num_slots=num_slots,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_len=max_seq_len,
            dtype=self.dtype,
            device=self.device,
        )
        self.slower_rows = range(0)
        """Sequences times tokens of the passes that compiled code would slow down; set before `compiled`."""
        self._own = ModelPass(model, self.cache)
        self._compiled: FunctionPass | None = None
        self._static: StaticPass | None = None
        self._ways: tuple[Pass, ...] = (self._own,)

    @property
    def compiled(self) -> SlotPassFunction | None:
        """Compiled code that runs the passes in place of the model's own, once there is any. Set between two
        rounds, by the thread that runs them."""
        return None if self._compiled is None else self._compiled.function

    @compiled.setter
    def compiled(self, function: SlotPassFunction | None) -> None:
        self._compiled = None if function is None else FunctionPass(function, self.cache, self.slower_rows)
        self._order_ways()

    @property
    def static(self) -> StaticPass | None:
        """Static passes, which come first for the shapes that they hold; their logits are valid until the
        next pass."""
        return self._static

    @static.setter
    def static(self, static: StaticPass | None) -> None:
        self._static = static
        self._order_ways()

    def twin(self, num_slots: int | None = None) -> "Runner":
        """The same model over a cache of its own, with the model's own code. `num_slots` None: as many."""
        twin = Runner(
            self.model,
            num_slots=num_slots or self.num_slots,
            max_seq_len=self.max_seq_len,
            vocab_size=self.vocab_size,
        )
        twin.slower_rows = self.slower_rows
        return twin

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
        """Logits [B, T, V] in float32 (the last `logits_to_keep` positions; 0: all).

        A token at position p attends to columns 0..p of its slot. Padding tokens sit at the cache's trash
        column. `kv_len` is one more than the largest real position.
        """
        assert token_ids_BT.shape == positions_BT.shape
        embedded_BT = token_ids_BT
        if self.num_embedded < self.vocab_size:
            embedded_BT = token_ids_BT.clamp(max=self.num_embedded - 1)
        given = PassInput(embedded_BT, positions_BT, kv_len, first_slot, logits_to_keep)
        way = next(way for way in self._ways if way.can_run(given))
        return self.fit_vocabulary(way.run(given))

    def _order_ways(self) -> None:
        """The fastest first; the model's own code, which can run every pass, last."""
        preferred: tuple[Pass | None, ...] = (self._static, self._compiled)
        self._ways = (*(way for way in preferred if way is not None), self._own)

    def fit_vocabulary(self, logits: Tensor) -> Tensor:
        """[..., own vocabulary] to [..., vocab_size]."""
        missing = self.vocab_size - logits.shape[-1]
        if missing > 0:
            return nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits[..., : self.vocab_size]

    def prefill(self, slot: int, token_ids: Sequence[int], start: int, *, logits_to_keep: int = 1) -> Tensor:
        """Cache one slot's tokens at positions start, start + 1, …. Returns logits [1, T, V] of the last
        `logits_to_keep` ones (0: all)."""
        end = start + len(token_ids)
        sent = to_device([list(token_ids), range(start, end)], self.device)
        return self.forward(
            sent[:1],
            sent[1:],
            kv_len=end,
            first_slot=slot,
            logits_to_keep=logits_to_keep,
        )
