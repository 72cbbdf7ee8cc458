"""Models that are exact up to a length are served up to it; beyond it they are refused, with that length."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from deploy.settings import Settings
from deploy.wiring import ModelPairError, check_models
from serving.engine import SamplingParams
from serving.local import load_engine
from serving.memory_plan import MemoryPlan
from serving.models.context_limit import fitted_context
from serving.models.loading import UnsupportedModelError, check_config, load_model, load_pair
from serving.options import EngineOptions
from tests.support.tiny_models import save_tiny_pair, tiny_model

LIMIT = 48
VOCAB = 64
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": LIMIT,
}
KINDS: dict[str, tuple[type[PreTrainedModel], type[PreTrainedConfig], dict[str, Any]]] = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": LIMIT, "head_dim": 8}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"sliding_window": LIMIT}),
    "phi3 longrope": (
        Phi3ForCausalLM,
        Phi3Config,
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": LIMIT},
    ),
    "qwen3, some layers": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "use_sliding_window": True,
            "sliding_window": LIMIT,
            "layer_types": ["full_attention", "sliding_attention"],
            "head_dim": 8,
        },
    ),
    "gemma3, some layers": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "sliding_window": LIMIT,
            "layer_types": ["sliding_attention", "full_attention"],
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
        },
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    model_class, config_class, more = KINDS[request.param]
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4 * LIMIT,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=None,
        **more,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    model_class(config).save_pretrained(path)
    return str(path)


def own_greedy(folder: str, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers says, without a cache: its own windows and frequencies, one text at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("draft", ["self:1", "as target"])
def test_up_to_its_limit_a_model_says_what_transformers_says(folder: str, draft: str) -> None:
    options = EngineOptions(num_slots=3, max_seq_len=LIMIT, num_draft_tokens=3)
    prompts = [[5, 6, 7], [9] * 20, list(range(1, 41))]
    with load_engine(folder, folder if draft == "as target" else draft, options) as engine:
        generations = [
            engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=LIMIT - len(prompt)))[0]
            for prompt in prompts
        ]
        together = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=LIMIT - 40))
    for prompt, generation, beside in zip(prompts, generations, together, strict=True):
        expected = own_greedy(folder, prompt, LIMIT - len(prompt))
        assert list(generation.output_token_ids) == expected
        assert list(beside.output_token_ids) == expected[: LIMIT - 40]


def test_beyond_it_transformers_says_something_else(folder: str) -> None:
    """The control: full attention at held frequencies, which is what serves, is wrong one token later."""
    model, held = AutoModelForCausalLM.from_pretrained(folder), load_model(folder)
    tokens = torch.arange(2 * LIMIT)[None] % VOCAB
    columns = torch.arange(2 * LIMIT)
    mask = (columns[None] <= columns[:, None])[None, None]
    with torch.inference_mode():
        for length, same in ((LIMIT, True), (LIMIT + 1, False)):
            theirs = model(input_ids=tokens[:, :length], use_cache=False).logits
            ours = held(
                input_ids=tokens[:, :length], attention_mask=mask[..., :length, :length], use_cache=False
            ).logits
            assert torch.allclose(theirs, ours, atol=1e-4) == same


def test_beyond_it_a_target_and_a_draft_are_refused_with_the_number_that_works(folder: str) -> None:
    works = f"max_seq_len={LIMIT} works"
    with pytest.raises(UnsupportedModelError, match=works):
        load_engine(folder, None, EngineOptions(num_slots=1, max_seq_len=LIMIT + 1))
    serving = {"target": folder, "max_seq_len": LIMIT + 1}
    with pytest.raises(ModelPairError, match=works):
        check_models(Settings.model_validate({"serving": serving}))
    check_models(Settings.model_validate({"serving": serving | {"max_seq_len": LIMIT}}))


def test_a_window_of_the_draft_alone_counts_too(tmp_path: Path) -> None:
    target = tmp_path / "target"
    tiny_model("llama", 2, VOCAB).save_pretrained(target)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=32,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "draft")
    pair = load_pair(str(target), str(tmp_path / "draft"))
    with pytest.raises(UnsupportedModelError, match=r"draft.*max_seq_len=32 works"):
        fitted_context(33, pair.named)
    assert fitted_context(32, pair.named) == (32, "")


def test_positions_that_run_out_cut_the_context_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target, draft = save_tiny_pair(tmp_path)
    config = Path(draft) / "config.json"
    config.write_text(
        config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 100')
    )
    expected = (
        "max_seq_len=1024 is cut to 100, the fewest positions of a model "
        f"({target!r} has 512, {draft!r} has 100): prompt and output together hold at most 100 tokens"
    )
    plan = MemoryPlan.outlined(target, draft, EngineOptions(), dtype="float32")
    assert plan.options.max_seq_len == 100
    assert plan.lines()[0] == expected
    with caplog.at_level(logging.WARNING), load_engine(target, draft, EngineOptions(num_slots=1)) as engine:
        assert engine.max_seq_len == 100
    assert expected in caplog.messages
    quiet = MemoryPlan.outlined(target, draft, EngineOptions(max_seq_len=100), dtype="float32")
    assert quiet.note == ""


def test_a_window_of_unknown_size_is_refused() -> None:
    config = Qwen3Config(num_hidden_layers=1, layer_types=["sliding_attention"])
    config.sliding_window = None
    with pytest.raises(UnsupportedModelError, match="sliding-window"):
        check_config("m", config)
    config.layer_types = ["chunked_attention"]
    with pytest.raises(UnsupportedModelError, match="chunked"):
        check_config("m", config)
