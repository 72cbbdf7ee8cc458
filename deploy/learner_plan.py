"""Plans the memory that a learner will hold at most, by part, from its settings and the draft's shapes.

Allocates nothing. Worst cases: a pass as large as the settings allow, records as long as a context. Not in
it: the libraries themselves, and the target, which is loaded for its revision and let go.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from learner.settings import LOGITS_COPIES, LearnerSettings, TrainableName
from learner.trainable import (
    adapted_module_names,
    export_dtype,
    output_head,
    state_bytes,
    trainable_name,
)
from serving.engine.capture import TOP_K
from serving.engine.request import captured_round_bytes
from serving.memory_plan import ModelSize, Part
from serving.models.full_weights import belongs, full_parameters
from serving.models.target_part import own_parameters

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class LearnerPlan:
    """Of one learner."""

    settings: LearnerSettings
    weights_bytes: int
    """The whole draft in float32, with what it uses of the target."""
    num_trainable: int
    """Weights that learn."""
    export_bytes: int
    """Bytes of each of them where a draft is judged and published."""
    vocab_size: int
    token_bytes: int
    """What a token of a pass leaves for the gradient."""
    max_record_tokens: int
    num_routes: int = 0
    """Routes beyond `default` whose training state is planned."""

    @classmethod
    def outlined(
        cls, draft: nn.Module, settings: LearnerSettings, *, max_record_tokens: int, num_routes: int
    ) -> "LearnerPlan":
        """`draft` may be an outline on the meta device; a part of the target over the target's outline."""
        trainable = trainable_name(draft, settings.trainable)
        return cls(
            settings=settings,
            weights_bytes=_FLOAT_BYTES * sum(weight.numel() for weight in draft.parameters()),
            num_trainable=num_trainable(draft, settings, trainable),
            export_bytes=export_dtype(draft, trainable).itemsize,
            vocab_size=ModelSize.of(draft).vocab_size,
            token_bytes=_FLOAT_BYTES * _kept_by_a_token(draft),
            max_record_tokens=max_record_tokens,
            num_routes=num_routes,
        )

    @property
    def trainable_bytes(self) -> int:
        return _FLOAT_BYTES * self.num_trainable

    @property
    def route_bytes(self) -> int:
        return state_bytes(self.num_trainable, self.export_bytes)

    @property
    def pass_bytes(self) -> int:
        """The largest pass: gradients and the weights put aside while a draft is scored, logits, and what a
        token leaves for the gradient."""
        longest = min(self.settings.max_row_tokens, self.max_record_tokens)
        one_row = longest * self.vocab_size * _FLOAT_BYTES * LOGITS_COPIES
        logits = max(int(self.settings.max_logits_mib_per_pass * 2**20), one_row)
        return 2 * self.trainable_bytes + logits + self.settings.max_tokens_per_pass * self.token_bytes

    @property
    def records_bytes(self) -> int:
        """Those held out, those of a cycle and those replayed in it; two tokens a round."""
        settings = self.settings
        replayed = int(settings.max_steps_per_cycle * settings.records_per_step * settings.replay_share)
        count = settings.held_out_window_records + settings.max_records_per_cycle + replayed
        return count * self.max_record_tokens * captured_round_bytes(2, min(TOP_K, self.vocab_size)) // 2

    def parts(self) -> tuple[Part, ...]:
        parts = [
            Part("weights of the draft in float32", self.weights_bytes),
            Part("weights that learn, as shipped (floor)", self.trainable_bytes),
            Part("training state of the default route", self.route_bytes),
            Part(f"training state of {self.num_routes} more routes", self.num_routes * self.route_bytes),
            Part("the largest pass", self.pass_bytes),
            Part("records in hand", self.records_bytes),
        ]
        return tuple(part for part in parts if part.num_bytes)


def num_trainable(draft: Any, settings: LearnerSettings, trainable: TrainableName) -> int:
    """How many weights learn, of a draft or its outline."""
    if trainable == "full":
        return sum(weight.numel() for weight in full_parameters(draft, settings.target_modules).values())
    names = settings.target_modules or adapted_module_names(draft)
    return sum(
        settings.lora_rank * sum(module.weight.shape)
        for name, module in draft.named_modules()
        if belongs(name, names)
    )


def _kept_by_a_token(draft: Any) -> int:
    """Numbers that a pass keeps of each token: what goes into and out of every linear layer that a gradient
    reaches. Of a part those are its own; below them nothing learns."""
    own, head = set(map(id, own_parameters(draft).values())), output_head(draft)
    return sum(
        sum(module.weight.shape)
        for module in draft.modules()
        if isinstance(module, nn.Linear) and module is not head and id(module.weight) in own
    )
