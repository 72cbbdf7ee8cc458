"""The trainable draft, with LoRA or full weights: logits for a batch, weights in and out.

Knows no records and no loss. Invariants: only the trainable weights ever change; `with_weights` restores the
previous weights on exit; a LoRA state has PEFT's own keys, so an exported adapter loads with
`PeftModel.from_pretrained`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from buffer.records import AdapterManifest
from learner.batch import TrainingBatch
from learner.settings import LearnerSettings, TrainableName
from learner.trainable import full_trainable, lora_trainable, output_head, trainable_name
from serving.models.adapter import merge_adapter
from serving.models.kept_head import IDS, kept_head, most_used, without_rows

AdapterState = Mapping[str, Tensor]
"""The trainable weights, by the key of their export; see Trainable."""


class TrainableDraft:
    """`base` belongs to this object from now on; `parameters` start as the floor.

    `rank`, `alpha` and `seed` are LoRA's. Raises ValueError where `target_modules` names nothing in the
    base.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        draft_id: str,
        draft_revision: str,
        rank: int,
        alpha: float,
        target_modules: tuple[str, ...] | None = None,
        seed: int = 0,
        trainable: TrainableName = "lora",
    ) -> None:
        self.draft_id = draft_id
        self.draft_revision = draft_revision
        if trainable == "full":
            learnt = full_trainable(base, target_modules=target_modules)
        else:
            learnt = lora_trainable(
                base, draft_id=draft_id, rank=rank, alpha=alpha, target_modules=target_modules, seed=seed
            )
        self.rank, self.alpha = learnt.rank, learnt.alpha
        self.target_modules, self.config_json = learnt.target_modules, learnt.config_json
        self.export_dtype = learnt.export_dtype
        self._model, self._weights, self._floor = learnt.model, learnt.weights, learnt.floor
        self._kept = None if self.rank else kept_head(base)
        self._floor |= self._kept_ids()
        self._model.eval()
        self._gather: tuple[Tensor, Tensor] | None = None
        output_head(self._model).register_forward_pre_hook(self._keep_positions)

    @property
    def device(self) -> torch.device:
        return next(iter(self._weights.values())).device

    @property
    def vocab_size(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[0])

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(weight.numel() for weight in self._weights.values())

    @property
    def num_kept_tokens(self) -> int | None:
        """How many tokens the draft's head keeps, which training may choose; None if there is no choice."""
        return None if self._kept is None else len(self._kept[1].token_ids)

    def keep_tokens(self, counts_V: Tensor) -> None:
        """Let the head keep the tokens of the largest counts [V]; of equal ones, those that it keeps now."""
        assert self._kept is not None and self.num_kept_tokens is not None
        _, head = self._kept
        preferred_V = counts_V.clone()
        preferred_V[head.token_ids.cpu()] += 0.5
        head.keep(most_used(preferred_V, self.num_kept_tokens))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The live trainable weights, by key; an optimizer updates them."""
        return dict(self._weights)

    @property
    def identity(self) -> dict[str, object]:
        """The draft's id, revision and number of parameters, for display."""
        return {
            "draft_id": self.draft_id,
            "draft_revision": self.draft_revision,
            "num_parameters": self.num_parameters,
        }

    def logits(self, batch: TrainingBatch) -> Tensor:
        """[N, V] float32 at the batch's positions; no other position's logits are ever computed."""
        self._gather = (batch.row_N, batch.column_N)
        try:
            output = self._model(
                input_ids=batch.token_ids_RT,
                attention_mask=batch.attention_mask_RT,
                position_ids=batch.position_ids_RT,
                use_cache=False,
            )
        finally:
            self._gather = None
        logits: Tensor = output.logits[0]
        return logits.float()

    def state(self) -> dict[str, Tensor]:
        """A copy of the trainable weights, and of the ids of kept tokens, on the CPU."""
        return self.settled({key: weight.detach().cpu().clone() for key, weight in self._weights.items()})

    def settled(self, weights: AdapterState) -> dict[str, Tensor]:
        """These weights as a whole state, with what the draft now has beside weights."""
        return {**weights, **self._kept_ids()}

    def load(self, state: AdapterState | None) -> None:
        """Load these weights; None: the floor. Raises ValueError, with nothing changed, for a state that does
        not fit."""
        if state is not None and (fault := self.fault(state)):
            raise ValueError(f"adapter state does not fit the draft: {fault}; nothing was loaded")
        self.load_unchecked(self._floor if state is None else state)

    def fault(self, state: AdapterState) -> str:
        """Why these weights must not serve: keys, shapes or values that are not finite. Empty: none."""
        kept = self._kept_ids()
        if missing := sorted((self._weights.keys() | kept.keys()) ^ state.keys()):
            return f"keys differ, first {missing[0]!r}"
        for key in kept:
            if self._kept is not None and (fault := self._kept[1].fault(state[key])):
                return f"{key} holds {fault}"
        for key, weight in self._weights.items():
            if state[key].shape != weight.shape:
                return f"{key} has shape {tuple(state[key].shape)}, not {tuple(weight.shape)}"
            if not bool(torch.isfinite(state[key]).all()):
                return f"{key} holds values that are not finite"
        return ""

    def read(self, weights: bytes, manifest: AdapterManifest) -> AdapterState:
        """A published draft as a state of this one; if all weights are trained here, LoRA is merged into
        them, as in serving.

        Raises ValueError for an adapter that this draft cannot represent exactly: another rank, alpha or
        kind.
        """
        state = import_weights(weights)
        if not self.rank:
            with self.with_weights(None):
                merged = merge_adapter(self._model, weights, manifest.adapter_config_json, manifest.sha256)
                state = self.state() | without_rows(self._model, merged)
        elif manifest.rank and manifest.alpha != self.alpha:
            raise ValueError(f"its alpha is {manifest.alpha:g}, not {self.alpha:g}")
        if fault := self.fault(state):
            raise ValueError(fault)
        return state

    @contextmanager
    def with_weights(self, state: AdapterState | None) -> Iterator[None]:
        """Within the context the draft has these weights (None: the floor) and records no gradient."""
        own = self.state()
        self.load(state)
        try:
            with torch.no_grad():
                yield
        finally:
            self.load_unchecked(own)

    def load_unchecked(self, state: AdapterState) -> None:
        """Like `load`, but accepts values that are not finite: used to restore previous weights."""
        weights = dict(state)
        for key in self._kept_ids():
            assert self._kept is not None
            self._kept[1].keep(weights.pop(key))
        with torch.no_grad():
            for key, weight in weights.items():
                self._weights[key].copy_(weight)

    def _kept_ids(self) -> dict[str, Tensor]:
        """The kept tokens' ids by their key in a state; empty where training has no choice of them."""
        if self._kept is None:
            return {}
        name, head = self._kept
        return {f"{name}.{IDS}": head.token_ids.cpu().clone()}

    def _keep_positions(self, _head: nn.Module, hidden: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Passes only the wanted positions to the head, [1, N, H], because logits over the vocabulary are
        expensive."""
        if self._gather is None:
            return None
        return (hidden[0][self._gather][None], *hidden[1:])


def build_draft(
    base: nn.Module, settings: LearnerSettings, *, draft_id: str, draft_revision: str
) -> TrainableDraft:
    """Build the draft that the settings describe; `base`, in float32, is changed in place."""
    return TrainableDraft(
        base,
        draft_id=draft_id,
        draft_revision=draft_revision,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        target_modules=settings.target_modules,
        seed=settings.seed,
        trainable=trainable_name(base, settings.trainable),
    )


def export_weights(state: AdapterState) -> bytes:
    """Bytes of adapter_model.safetensors."""
    return safetensors.torch.save(dict(state), metadata={"format": "pt"})


def import_weights(weights: bytes) -> dict[str, Tensor]:
    """Raises ValueError for bytes that are no safetensors file."""
    try:
        return safetensors.torch.load(weights)
    except Exception as error:  # safetensors raises its own and several builtin errors
        raise ValueError(f"adapter of {len(weights)} bytes is no safetensors file: {error}") from error
