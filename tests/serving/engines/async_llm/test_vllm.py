"""vLLM's own engine under everdraft: swaps by their behaviour, records against transformers, exact sampling.

Every swap is judged by what it does: the target's own weights in the draft must be accepted, the floor must
count what it counted before.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

from buffer.names import DEFAULT_ROUTE
from buffer.records import AdapterManifest
from serving.engine.request import Generation, GenerationRequest, SamplingParams
from serving.engine.sampling import SamplingMetadata, processed_logprobs
from serving.engines.async_llm.draft_files import write_draft
from serving.engines.async_llm.plugin import UNMENDED
from serving.models.adapter import AdapterRejectedError
from serving.models.full_weights import full_config
from tests.serving.engines.async_llm.conftest import VOCAB_SIZE, Models, engine_on
from tests.support.chi_square import FALSE_ALARM_RATE, fit_p_value

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

PROMPTS = [tuple(int(token) for token in row) for row in np.random.default_rng(0).integers(0, 16, (12, 9))]
WAIT_S = 120.0


def run(
    engine: Any, prompts: list[tuple[int, ...]], capture: bool = False, **params: Any
) -> list[Generation]:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 32, **params})
    handles = [
        engine.submit(GenerationRequest(f"r{number}", prompt, sampling, capture=capture))
        for number, prompt in enumerate(prompts)
    ]
    return [handle.result(WAIT_S) for handle in handles]


def whole_weights(engine: Any, folder: str, version: int) -> tuple[AdapterManifest, bytes]:
    """Another model's weights as a version of the draft."""
    tensors = {name: weight.clone() for name, weight in load_file(f"{folder}/model.safetensors").items()}
    weights = save(tensors)
    return (
        AdapterManifest(
            route=DEFAULT_ROUTE,
            draft_version=version,
            parent_version=0,
            draft_id="draft",
            draft_revision=engine.pair.draft_revision,
            target_revision=engine.target_revision,
            rank=0,
            alpha=0.0,
            target_modules=(),
            adapter_config_json=full_config(None),
            sha256=hashlib.sha256(weights).hexdigest(),
            num_bytes=len(weights),
            created_at_s=time.time(),
        ),
        weights,
    )


def acceptance(generations: list[Generation]) -> float:
    return sum(each.num_accepted for each in generations) / sum(each.num_attempted for each in generations)


@pytest.fixture(scope="module")
def untied(models: Callable[[bool], Models]) -> Iterator[tuple[Any, Models]]:
    with engine_on(models(False)) as engine:
        yield engine, models(False)


@pytest.mark.parametrize(
    ("tied", "compiled"),
    [
        (True, False),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_a_swap_is_proven_by_what_it_does(
    models: Callable[[bool], Models], tied: bool, compiled: bool
) -> None:
    with engine_on(models(tied), compiled=compiled) as engine:
        _swap_there_and_back(engine, models(tied).target)


def test_a_swap_of_an_untied_draft_is_proven_by_what_it_does(untied: tuple[Any, Models]) -> None:
    _swap_there_and_back(untied[0], untied[1].target)


def _swap_there_and_back(engine: Any, target: str) -> None:
    before = run(engine, PROMPTS)
    assert acceptance(before) < 0.6, "the draft is another model"
    drafts = engine.drafts
    report = drafts.swap(DEFAULT_ROUTE, drafts.stage(DEFAULT_ROUTE, *whole_weights(engine, target, 1)))
    assert report.draft_version == engine.draft_version == 1
    swapped = run(engine, PROMPTS)
    assert acceptance(swapped) >= 0.99
    drafts.swap(DEFAULT_ROUTE, drafts.stage(DEFAULT_ROUTE, None))
    after = run(engine, PROMPTS)
    for one, two, three in zip(before, swapped, after, strict=True):
        assert one.output_token_ids == two.output_token_ids == three.output_token_ids
        assert one.accepted_histogram == three.accepted_histogram


def test_a_tied_head_that_stays_what_it_was_is_seen(
    models: Callable[[bool], Models], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: without packing the tied head again the swap does not do what it says."""
    monkeypatch.setenv(UNMENDED, "1")
    with engine_on(models(True)) as engine, pytest.raises(AssertionError):
        _swap_there_and_back(engine, models(True).target)


def test_a_file_that_is_not_the_drafts_never_serves(untied: tuple[Any, Models], tmp_path: Path) -> None:
    """Half a file, another sha256, another model's: each refused, and the incumbent serves on."""
    engine, models = untied
    drafts = engine.drafts
    manifest, weights = whole_weights(engine, models.target, 1)
    drafts.swap(DEFAULT_ROUTE, drafts.stage(DEFAULT_ROUTE, manifest, weights))
    tensors = load_file(f"{models.target}/model.safetensors")
    path, _ = write_draft(tmp_path, 7, tensors)
    other, other_digest = write_draft(tmp_path, 8, {"a": torch.zeros(1)})
    half, half_digest = write_draft(tmp_path, 9, tensors)
    half.write_bytes(half.read_bytes()[:-100])
    with pytest.raises(Exception, match="not like the draft"):
        engine.call("everdraft_stage", str(other), other_digest, 8)
    for file, sha256 in ((path, "0" * 64), (half, half_digest)):
        engine.call("everdraft_stage", str(file), sha256, 7)
        with pytest.raises(Exception, match="was not swapped in"):
            engine.call("everdraft_swap")
    with pytest.raises(AdapterRejectedError, match="another model's adapter"):
        drafts.stage(DEFAULT_ROUTE, replace(manifest, draft_version=2, draft_revision="0" * 64), weights)
    assert acceptance(run(engine, PROMPTS)) >= 0.99
    drafts.swap(DEFAULT_ROUTE, drafts.stage(DEFAULT_ROUTE, None))


@torch.inference_mode()
def test_records_hold_what_transformers_says_after_a_rejection_too(untied: tuple[Any, Models]) -> None:
    engine, models = untied
    model: Any = AutoModelForCausalLM.from_pretrained(models.target).eval()
    num_after_rejection = 0
    for generation in run(engine, PROMPTS[:6], capture=True):
        assert generation.captured_rounds
        for each in generation.captured_rounds:
            context = [*generation.prompt_token_ids, *generation.output_token_ids][: each.start]
            ids = [*context, *each.drafted_token_ids_G.tolist()]
            logprobs_TV = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            expected_EV = logprobs_TV[len(context) - 1 :]
            found_EK = torch.from_numpy(each.topk_logprobs_EK.astype(np.float32))
            ids_EK = torch.from_numpy(each.topk_token_ids_EK.astype(np.int64))
            expected_EK = expected_EV.gather(-1, ids_EK)
            spacing_EK = 2.0**-10 * expected_EK.abs().clamp(min=1.0)  # of half precision, rounded either way
            assert ((found_EK - expected_EK).abs() <= 1e-3 + spacing_EK).all()
            assert len(expected_EV) == len(found_EK)
            num_after_rejection += len(found_EK) - 1 - each.num_accepted
    assert num_after_rejection > 100


def exact(folder: str, prompt: tuple[int, ...], sampling: SamplingParams, length: int) -> dict[Any, float]:
    """Probability of every output of `length` tokens."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    row = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    found: dict[Any, float] = {(): 1.0}
    with torch.inference_mode():
        for step in range(length):
            contexts = list(product(range(VOCAB_SIZE), repeat=step))
            ids = torch.tensor([[*prompt, *context] for context in contexts])
            logits_NV = model(ids).logits[:, -1].float()
            metadata = SamplingMetadata.stack([row] * len(contexts))
            probs_NV = processed_logprobs(logits_NV[:, None], metadata)[:, 0].exp().double()
            found = {
                (*context, token): found[context] * float(probs_NV[number, token])
                for number, context in enumerate(contexts)
                for token in range(VOCAB_SIZE)
            }
    return found


def p_value(engine: Any, target: str, sampling: SamplingParams, num_samples: int) -> float:
    """Of outputs of 3 tokens."""
    params = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
    outputs = [
        tuple(generation.output_token_ids)
        for generation in run(engine, [PROMPTS[0]] * num_samples, max_tokens=3, **params)
    ]
    distribution = exact(target, PROMPTS[0], sampling, 3)
    impossible = sum(distribution[output] == 0 for output in outputs)
    return 0.0 if impossible else fit_p_value(outputs, distribution)


SAMPLINGS = [SamplingParams(temperature=1.0), SamplingParams(temperature=0.8, top_p=0.7)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "top-p"])
def test_sampled_text_follows_the_targets_distribution(
    untied: tuple[Any, Models], sampling: SamplingParams
) -> None:
    """On a prompt of high entropy; false-alarm rate as in `chi_square`."""
    engine, models = untied
    assert p_value(engine, models.target, sampling, 2000) > FALSE_ALARM_RATE


def test_unmended_vllm_does_not(models: Callable[[bool], Models], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control, vllm#55005: parameters of sampled requests are read from uninitialised memory."""
    monkeypatch.setenv(UNMENDED, "1")
    with engine_on(models(False)) as engine:
        target = models(False).target
        caught = any(  # what memory holds is chance, so that one look may see nothing
            p_value(engine, target, sampling, 1000) < FALSE_ALARM_RATE / 10
            for _ in range(3)
            for sampling in SAMPLINGS
        )
    assert caught


@pytest.mark.slow
def test_two_hundred_prompts_across_five_swaps_under_eight_clients(models: Callable[[bool], Models]) -> None:
    """Greedy float32, token for token what vLLM says without a draft."""
    rng = np.random.default_rng(1)
    prompts = [tuple(int(token) for token in rng.integers(0, 16, rng.integers(4, 40))) for _ in range(200)]
    both = models(False)
    with engine_on(both, num_draft_tokens=0) as engine:
        plain = [generation.output_token_ids for generation in run(engine, prompts, max_tokens=48)]
    with engine_on(both) as engine:
        found: list[Generation] = []
        handles: list[Any] = []
        for start in range(0, 200, 8):
            sampling = SamplingParams(temperature=0.0, max_tokens=48)
            handles = [
                engine.submit(GenerationRequest(f"r{start + number}", prompt, sampling))
                for number, prompt in enumerate(prompts[start : start + 8])
            ]
            if start % 32 == 0:
                version = start // 32 + 1
                folder = both.target if version % 2 else both.draft
                staged = engine.drafts.stage(DEFAULT_ROUTE, *whole_weights(engine, folder, version))
                engine.drafts.swap(DEFAULT_ROUTE, staged)
            found += [handle.result(WAIT_S) for handle in handles]
        assert engine.stats().num_swaps >= 5
    assert [generation.finish_reason for generation in found] == ["length"] * 200
    assert [generation.output_token_ids for generation in found] == plain
