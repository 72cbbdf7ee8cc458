"""What is captured of a step, against the definitions of a record's arrays."""

import numpy as np
import torch

from serving.engine.sampling import SamplingMetadata, processed_logprobs
from serving.engines.async_llm.step_capture import read_rows

WARM = (0.7, 0, 0.9, 0.0)
GREEDY = (0.0, 0, 1.0, 0.0)


def test_rows_are_those_of_the_definitions() -> None:
    torch.manual_seed(0)
    logits_RV = 3 * torch.randn(7, 50)
    greedy, warm = read_rows(logits_RV, [3, 4], [GREEDY, WARM])
    logprobs_RV = logits_RV.log_softmax(-1)
    for capture, rows in ((greedy, logprobs_RV[:3]), (warm, logprobs_RV[3:])):
        top = rows.topk(32)
        np.testing.assert_array_equal(capture.topk_token_ids_EK, top.indices.numpy())
        np.testing.assert_allclose(capture.topk_logprobs_EK, top.values.half().numpy(), atol=4e-3)
    assert (greedy.retemper_E == 0).all()
    retempered = logprobs_RV[3:] / WARM[0] + torch.from_numpy(warm.retemper_E)[:, None]
    np.testing.assert_allclose(retempered, (logits_RV[3:] / WARM[0]).log_softmax(-1), atol=1e-5)
    final = processed_logprobs(logits_RV[None, 3:], SamplingMetadata.stack([WARM]))[0]
    ids = final.argmax(-1).tolist()
    found = warm.target_logprobs(np.arange(4), ids)
    np.testing.assert_allclose(found, final.max(-1).values, atol=1e-6)


def test_a_greedy_target_is_one_hot() -> None:
    logits_RV = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
    [capture] = read_rows(logits_RV, [2], [GREEDY])
    assert capture.target_logprobs(np.arange(2), [1, 2]).tolist() == [0.0, -np.inf]
    assert capture.topk_token_ids_EK.shape == (2, 3), "no more entries than tokens"


def test_what_is_done_to_the_logits_afterwards_does_not_show() -> None:
    """vLLM's sampler works in place on rows without drafts."""
    logits_RV = torch.randn(2, 20)
    expected = logits_RV.log_softmax(-1).max(-1).values.half().numpy()
    [capture] = read_rows(logits_RV, [2], [WARM])
    before = capture.target_logprobs(np.array([0]), [int(capture.topk_token_ids_EK[0, 0])])
    logits_RV.div_(0.1)
    np.testing.assert_allclose(capture.topk_logprobs_EK[:, 0], expected, atol=2e-3)
    after = capture.target_logprobs(np.array([0]), [int(capture.topk_token_ids_EK[0, 0])])
    np.testing.assert_array_equal(before, after)
