"""The draft that learns: a frozen base under PEFT LoRA weights, exported as any PEFT tool expects.

Knows no records and no loss. Invariants: only LoRA weights ever change; `wearing` puts back what it
found; keys of a state are PEFT's own, so an exported adapter loads with `PeftModel.from_pretrained`.
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from learner.batch import Batch

AdapterState = Mapping[str, Tensor]
"""LoRA weights by PEFT's key (`base_model.model.<module>.lora_A.weight`, `lora_embedding_A`)."""


class TrainableDraft:
    """`base` stays as given; `parameters` are the LoRA weights, float32, that start as the floor.

    Raises ValueError where `target_modules` names nothing in the base.
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
    ) -> None:
        self.draft_id = draft_id
        self.draft_revision = draft_revision
        self.rank = rank
        self.alpha = alpha
        self.target_modules = target_modules or linear_module_names(base)
        self.config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # annotated int; PEFT only divides by the rank
            target_modules=list(self.target_modules),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT asks the base for a property that transformers has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            torch.manual_seed(seed)
            self._model: Any = get_peft_model(base, self.config)
        self.config.base_model_name_or_path = draft_id  # PEFT put the base's local path there
        self._model.eval()
        self._base: Any = self._model.get_base_model()
        self._weights = _lora_weights(self._model)
        self._gather: tuple[Tensor, Tensor] | None = None
        _head(self._base).register_forward_pre_hook(self._keep_positions)

    @property
    def device(self) -> torch.device:
        return next(iter(self._weights.values())).device

    @property
    def vocab_size(self) -> int:
        return int(self._base.get_input_embeddings().weight.shape[0])

    @property
    def num_parameters(self) -> int:
        """Trainable ones."""
        return sum(weight.numel() for weight in self._weights.values())

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The live LoRA weights, by key; what an optimizer updates."""
        return dict(self._weights)

    def logits(self, batch: Batch) -> Tensor:
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
        """A copy of the LoRA weights, on the CPU."""
        return {key: weight.detach().cpu().clone() for key, weight in self._weights.items()}

    def load(self, state: AdapterState | None) -> None:
        """Take these LoRA weights; None: the floor (every B is zero). Raises ValueError, with nothing
        changed, for a state with faults."""
        if state is not None and (fault := self.fault(state)):
            raise ValueError(f"adapter state does not fit the draft: {fault}; nothing was loaded")
        with torch.no_grad():
            for key, weight in self._weights.items():
                if state is not None:
                    weight.copy_(state[key])
                elif _is_second_factor(key):
                    weight.zero_()

    def fault(self, state: AdapterState) -> str:
        """Why these weights must not serve: keys, shapes or values that are not finite. Empty: none."""
        if missing := sorted(self._weights.keys() ^ state.keys()):
            return f"keys differ, first {missing[0]!r}"
        for key, weight in self._weights.items():
            if state[key].shape != weight.shape:
                return f"{key} has shape {tuple(state[key].shape)}, not {tuple(weight.shape)}"
            if not bool(torch.isfinite(state[key]).all()):
                return f"{key} holds values that are not finite"
        return ""

    @contextmanager
    def wearing(self, state: AdapterState | None) -> Iterator[None]:
        """Inside, the draft has these weights (None: the floor) and no gradient is recorded."""
        own = self.state()
        self.load(state)
        try:
            with torch.no_grad():
                yield
        finally:
            self.load_unchecked(own)

    def load_unchecked(self, state: AdapterState) -> None:
        """As `load`, values that are not finite included: to put back what was there."""
        with torch.no_grad():
            for key, weight in self._weights.items():
                weight.copy_(state[key])

    def _keep_positions(self, _head: nn.Module, hidden: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hands the head only the wanted positions, [1, N, H]: a row over the vocabulary is dear."""
        if self._gather is None:
            return None
        return (hidden[0][self._gather][None], *hidden[1:])


def linear_module_names(base: nn.Module) -> tuple[str, ...]:
    """Last name parts of every linear layer but the head: attention and MLP."""
    head = _head(base)
    names = {
        name.split(".")[-1]
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return tuple(sorted(names))


def export_weights(state: AdapterState) -> bytes:
    """adapter_model.safetensors."""
    return safetensors.torch.save(dict(state), metadata={"format": "pt"})


def import_weights(weights: bytes) -> dict[str, Tensor]:
    """Raises ValueError for bytes that are no safetensors file."""
    try:
        return safetensors.torch.load(weights)
    except Exception as error:  # safetensors raises its own and several builtin errors
        raise ValueError(f"adapter of {len(weights)} bytes is no safetensors file: {error}") from error


def export_config(draft: TrainableDraft) -> str:
    """adapter_config.json, as PEFT itself writes it, ready for inference."""
    with tempfile.TemporaryDirectory() as folder:
        config = copy.copy(draft.config)
        config.inference_mode = True
        config.save_pretrained(folder)
        text = (Path(folder) / "adapter_config.json").read_text()
    return json.dumps(json.loads(text), sort_keys=True)


def _lora_weights(model: PeftModel) -> dict[str, nn.Parameter]:
    """The model's own LoRA parameters under the keys that PEFT exports them with."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    exported = get_peft_model_state_dict(model, save_embedding_layers=False)
    by_pointer = {parameter.data_ptr(): parameter for parameter in trainable}
    weights = {key: by_pointer[tensor.data_ptr()] for key, tensor in sorted(exported.items())}
    assert len(weights) == len(trainable), "every trainable weight has a key of its own"
    return weights


def _head(model: Any) -> nn.Module:
    """The layer that gives logits, wrapped in LoRA or not."""
    head: nn.Module = model.get_output_embeddings()
    return head


def _is_second_factor(key: str) -> bool:
    return "lora_B" in key or "lora_embedding_B" in key
