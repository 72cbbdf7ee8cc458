"""Puts a whole draft into vLLM's live draft model in one call, between two steps.

vLLM's layerwise reload runs each layer's processing again, which packs weights on a processor; a head that is
tied to its embedding keeps the packed copy of the old weights there and is packed again by us. Source:
vllm.model_executor.model_loader.reload of the tested versions.
"""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from serving.engines.async_llm.plugin import UNMENDED


def apply_weights(worker: Any, tensors: Mapping[str, Tensor]) -> None:
    """`tensors` by checkpoint name, all of them."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = worker.get_draft_model()
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        model.load_weights(iter(tensors.items()))
        finalize_layerwise_reload(model, worker.vllm_config.speculative_config.draft_model_config)
        if os.environ.get(UNMENDED) != "1":
            repack_tied_heads(model)


def repack_tied_heads(model: Any) -> None:
    """Nothing is loaded under a tied head's own name, so the reload leaves it what it was packed from."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if not getattr(model.config, "tie_word_embeddings", False):
        return
    tables = [
        module
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    ]
    for head in model.modules():
        if isinstance(head, ParallelLMHead):
            head.weight = tables[0].weight
            head.quant_method.process_weights_after_loading(head)
