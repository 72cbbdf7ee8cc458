"""One model and its slot cache: tokens at positions in, logits out. Knows nothing of rounds or drafts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from serving.engine.passes.kv_shape import KvShape
from serving.engine.passes.slot_cache import SlotCache
from serving.engine.passes.slot_pass import Pass, additive_mask
from serving.engine.passes.static_pass import StaticPass
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
        self.compiled: Pass | None = None
        """Compiled code that runs the passes instead of the model's own, once there is any. Set between two
        rounds, by the thread that runs them."""
        self.static: StaticPass | None = None
        """Static passes, which come first for the shapes that they hold; their logits are valid until the
        next pass."""
        self._columns_T = torch.arange(max_seq_len + 1, device=self.device)

    def twin(self) -> "Runner":
        """The same model over a cache of its own, with the model's own code."""
        return Runner(
            self.model, num_slots=self.num_slots, max_seq_len=self.max_seq_len, vocab_size=self.vocab_size
        )

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
        if self.static is not None and self.static.holds(first_slot, *token_ids_BT.shape):
            logits_BTV = self.static(embedded_BT, positions_BT, kv_len)[:, -logits_to_keep:]
        elif self.compiled is None:
            logits_BTV = self._model_pass(embedded_BT, positions_BT, kv_len, first_slot, logits_to_keep)
        else:
            num_rows, num_tokens = token_ids_BT.shape
            logits_BTV = self.compiled(
                embedded_BT,
                positions_BT,
                additive_mask(positions_BT, kv_len, self.dtype),
                self._columns_T[num_tokens - logits_to_keep if logits_to_keep else 0 : num_tokens],
                self.cache.rows(first_slot, num_rows),
            )
        return self.fit_vocabulary(logits_BTV)

    def _model_pass(
        self, token_ids_BT: Tensor, positions_BT: Tensor, kv_len: int, first_slot: int, logits_to_keep: int
    ) -> Tensor:
        self.cache.window(first_slot, positions_BT, kv_len)
        mask_B1TK = (self._columns_T[:kv_len] <= positions_BT[..., None])[:, None]
        output = self.model(
            input_ids=token_ids_BT,
            position_ids=positions_BT.clamp(max=self.max_seq_len - 1),
            attention_mask=mask_B1TK,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        logits_BTV: Tensor = output.logits.float()
        return logits_BTV

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
