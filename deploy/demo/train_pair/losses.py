"""What each model learns: the target its documents, the draft what the target says.

Knows nothing of loops or files. B rows, T tokens, N learned positions, V vocabulary, H width.
"""

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from deploy.demo.train_pair.batches import PackedBatch


def logits_at(model: LlamaForCausalLM, batch: PackedBatch) -> torch.Tensor:
    """Logits [N, V] in float32 at the positions that predict a learned token; layers run in bfloat16."""
    with torch.autocast(batch.ids_BT.device.type, torch.bfloat16):
        hidden_BTH = model.model(batch.ids_BT, use_cache=False).last_hidden_state
        logits_NV: torch.Tensor = model.lm_head(hidden_BTH[:, :-1][batch.learned_BT[:, 1:]])
    return logits_NV.to(torch.float32)


def next_token_loss(model: LlamaForCausalLM, batch: PackedBatch) -> torch.Tensor:
    """Mean negative log-likelihood of the learned tokens, in nats."""
    return functional.cross_entropy(logits_at(model, batch), batch.ids_BT[:, 1:][batch.learned_BT[:, 1:]])


def distillation_loss(draft: LlamaForCausalLM, target: LlamaForCausalLM, batch: PackedBatch) -> torch.Tensor:
    """Mean forward KL from target to draft plus the draft's loss at the target's likeliest token, in nats."""
    with torch.no_grad():
        target_logprobs_NV = logits_at(target, batch).log_softmax(-1)
    draft_logprobs_NV = logits_at(draft, batch).log_softmax(-1)
    divergence = (target_logprobs_NV.exp() * (target_logprobs_NV - draft_logprobs_NV)).sum(-1).mean()
    return divergence + functional.nll_loss(draft_logprobs_NV, target_logprobs_NV.argmax(-1))
