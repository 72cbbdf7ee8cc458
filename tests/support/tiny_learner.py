"""A random tiny Llama pair and a trainable draft on it, for the learner's tests."""

import torch
from transformers import LlamaForCausalLM

from learner.draft import TrainableDraft
from learner.settings import LearnerSettings
from tests.support.tiny_models import tiny_model

VOCAB_SIZE = 32
MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "embed_tokens",
    "lm_head",
)


def tiny_pair() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Target of two layers, draft of one, unrelated weights; the same ones at every call."""
    models = []
    for num_layers in (2, 1):
        torch.manual_seed(num_layers)
        model = tiny_model("llama", num_layers, VOCAB_SIZE)
        models.append(model.eval().requires_grad_(False))
    return models[0], models[1]


def tiny_draft(seed: int = 0) -> TrainableDraft:
    """Trainable, on the draft of `tiny_pair`."""
    return TrainableDraft(
        tiny_pair()[1],
        draft_id="tiny-draft",
        draft_revision="draft-1",
        rank=16,
        alpha=32.0,
        target_modules=MODULES,
        seed=seed,
    )


def quick_settings(**changes: object) -> LearnerSettings:
    """Small and fast; every field may be changed."""
    quick: dict[str, object] = {
        "learning_rate": 1e-2,
        "divergence": "forward_kl",
        "records_per_step": 16,
        "min_records_per_cycle": 20,
        "max_busy_share": 1.0,
        "max_rest_records": 0,
        "warmup_steps": 0,
        "gate_min_records": 4,
        "gate_num_resamples": 200,
        "retry_s": 0.01,
        "quiet_after_publish_s": 0.0,
    }
    return LearnerSettings.model_validate(quick | changes)
