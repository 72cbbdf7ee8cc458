"""vLLM's second model runner, with its kernels interpreted: what is reported of its steps is what it did."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

pytest.importorskip("vllm")
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    module = "tests.serving.engines.async_llm.interpreted_runner"
    child = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr[-4000:]
    found: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    return found


def of(told: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [message for message in told["messages"] if message["request"] == name]


def test_the_runners_are_told_apart_by_where_they_draw(told: dict[str, Any]) -> None:
    assert told["draws_in__sample"] == [True, False] and told["has_add_requests"]


def test_what_is_reported_as_emitted_is_what_its_samplers_drew(told: dict[str, Any]) -> None:
    drawn: dict[str, list[list[int]]] = {}
    for order, rows, counts in zip(
        (["greedy", "sampled", "apart", "reading"], ["greedy", "sampled", "apart"]),
        told["sampled"],
        told["num_sampled"],
        strict=True,
    ):
        for name, row, count in zip(order, rows, counts, strict=True):
            drawn.setdefault(name, []).append(row[:count])
    for name in ("greedy", "sampled", "apart"):
        assert [message["emitted"] for message in of(told, name)] == drawn[name], name
    assert drawn["reading"] == [[]] and of(told, "reading") == [], "half a prompt draws nothing"


def test_every_draft_token_is_reported_with_the_version_that_proposed_it(told: dict[str, Any]) -> None:
    for name in ("greedy", "sampled"):
        message = of(told, name)[1]
        assert message["version"] == 0, "live when it was drafted; version 5 came between the steps"
        assert message["num_drafted"] == len(told["drafted"][name])
        assert message["captured"]["drafted_token_ids_G"] == told["drafted"][name]
    assert of(told, "apart")[1]["version"] == 5, "drawn without a draft, while 5 was live"
    assert all(message["captured"] is None for message in of(told, "apart")), "it was not to be recorded"


def test_rows_are_the_targets_own_after_a_rejection_too(told: dict[str, Any]) -> None:
    logits_RV = torch.tensor(told["logits"])
    greedy = of(told, "greedy")[1]
    assert len(greedy["emitted"]) < 4, "a token was rejected, and rows after it are checked here"
    for message, rows in ((greedy, logits_RV[:4]), (of(told, "sampled")[1], logits_RV[4:7])):
        expected = rows.log_softmax(-1).topk(32, dim=-1)
        assert message["captured"]["topk_token_ids_EK"] == expected.indices.tolist()
        assert_allclose(message["captured"]["topk_logprobs_EK"], expected.values, atol=5e-3)


def test_log_probabilities_are_those_that_the_ratio_test_reads(told: dict[str, Any]) -> None:
    message, drafted = of(told, "sampled")[1], told["drafted"]["sampled"]
    draft_GV = (torch.tensor(told["draft_logits"])[: len(drafted)] / 0.7).log_softmax(-1)
    mine = [float(draft_GV[place, token]) for place, token in enumerate(drafted)]
    assert_allclose(message["captured"]["drafted_draft_logprobs_G"], mine, atol=1e-4)
    target_EV = np.array([nucleus(row, 0.7, 0.8) for row in torch.tensor(told["logits"])[4:7]])
    emitted = message["emitted"]
    assert_allclose(
        np.exp(message["captured"]["emitted_target_logprobs_C"]),
        target_EV[np.arange(len(emitted)), emitted],
        atol=1e-4,
    )
    assert_allclose(
        np.exp(message["captured"]["drafted_target_logprobs_G"]),
        target_EV[np.arange(len(drafted)), drafted],
        atol=1e-4,
    )


def nucleus(logits_V: torch.Tensor, temperature: float, top_p: float) -> list[float]:
    """The shortest list of tokens by probability that holds `top_p`, made a distribution again."""
    probs = (logits_V.double() / temperature).softmax(-1)
    kept, held = torch.zeros_like(probs), 0.0
    for token in probs.argsort(descending=True).tolist():
        if held >= top_p:
            break
        kept[token], held = probs[token], held + float(probs[token])
    found: list[float] = (kept / kept.sum()).tolist()
    return found
