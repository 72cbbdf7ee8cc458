"""`everdraft draft init`: what it writes is an ordinary draft model, here and for others."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.candidate_generator import AssistedCandidateGenerator
from typer.testing import CliRunner

from deploy.cli import app
from deploy.commands.demo import PAIR
from deploy.demo.corpus import prompts
from learner.trainable import adapted_module_names
from serving.engine import SamplingParams
from serving.local import load_engine
from serving.models.errors import UnsupportedModelError
from serving.models.loading import load_model, weights_revision
from serving.models.part_checkpoint import write_draft
from serving.models.part_fit import TEXT_TOKENS, fit_map, generic_texts
from serving.models.target_part import TargetPart, map_of
from serving.options import EngineOptions

TARGET = str(PAIR / "target")
NUM_DRAFT_TOKENS, NUM_TOKENS = 3, 64
TEXTS = [" ".join(text.split()) for text in generic_texts(12)]


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    out, data = folder / "init", folder / "texts"
    data.write_text("\n".join(TEXTS))
    result = CliRunner().invoke(
        app, ["draft", "init", "--target", TARGET, "--out", str(out), "--data", str(data)]
    )
    assert result.exit_code == 0, result.output
    assert "a draft of 2 layers" in result.output
    return out


def ordinary(name: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def test_it_is_an_ordinary_checkpoint_of_the_targets_class(draft: Path) -> None:
    target, model = (ordinary(name) for name in (TARGET, draft))
    assert type(model) is type(target) and model.config.num_hidden_layers == 2
    assert not any("everdraft" in key for key in model.config.to_dict())
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, target.model.layers[1].mlp.up_proj.weight)


def test_it_computes_what_the_fitted_part_computes(draft: Path) -> None:
    target = load_model(TARGET)
    part, tokenizer = TargetPart(1).build(target), AutoTokenizer.from_pretrained(TARGET)
    texts = [tokenizer.encode(text, add_special_tokens=False)[:TEXT_TOKENS] for text in TEXTS]
    ids = torch.arange(40, 80)[None]
    with torch.no_grad():
        map_of(part).weight.copy_(fit_map(part, target, texts))
        ours, theirs = part(input_ids=ids).logits, ordinary(draft)(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_it_drafts_for_others_as_it_does_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted over drafted tokens, in transformers' assisted generation and in the engine."""
    draft = tmp_path / "draft"
    write_draft(TARGET, draft, num_layers=10, texts=TEXTS)
    target, assistant = ordinary(TARGET), ordinary(draft)
    assistant.generation_config.update(
        num_assistant_tokens=NUM_DRAFT_TOKENS,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
        eos_token_id=None,  # or it would never draft the end that the target is told to go past
    )
    matches: list[int] = []
    drafted: list[int] = []
    own = AssistedCandidateGenerator.update_candidate_strategy

    def count(self: AssistedCandidateGenerator, input_ids: Any, scores: Any, num_matches: int) -> None:
        matches.append(int(num_matches))
        drafted.append(scores.shape[1] - 1)
        own(self, input_ids, scores, num_matches)

    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", count)
    options = EngineOptions(
        num_slots=1, max_seq_len=256, num_draft_tokens=NUM_DRAFT_TOKENS, speculation="model"
    )
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with load_engine(TARGET, str(draft), options) as engine:
        tokenizer = engine.pair.tokenizer
        stream = prompts("sql", "heldout")
        asked = [tokenizer.encode(next(stream).answer)[:32] for _ in range(3)]
        mine = engine.generate(asked, params)
    for prompt, generation in zip(asked, mine, strict=True):
        output = target.generate(
            torch.tensor([prompt]),
            assistant_model=assistant,
            do_sample=False,
            min_new_tokens=NUM_TOKENS,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert output[0, len(prompt) :].tolist() == generation.output_token_ids
    here = sum(one.num_accepted for one in mine) / sum(one.num_drafted for one in mine)
    assert here == pytest.approx(sum(matches) / sum(drafted), abs=0.01)
    assert here > 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "17"], "the target has 16 layers"),
        (["--data", "missing.txt"], "--data missing.txt cannot be read"),
    ],
)
def test_what_cannot_be_made_is_said_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    out = tmp_path / "draft"
    result = CliRunner().invoke(app, ["draft", "init", "--target", TARGET, "--out", str(out), *arguments])
    assert result.exit_code == 2 and words in result.output.replace("\n", " ")
    assert not out.exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    result = CliRunner().invoke(app, ["draft", "init", "--target", TARGET, "--out", str(tmp_path)])
    assert result.exit_code == 2 and "is not an empty folder" in result.output.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# -- a head over the tokens that the texts use ------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "texts").write_text("\n".join(TEXTS))
    files = ["--out", str(folder / "init"), "--data", str(folder / "texts")]
    result = CliRunner().invoke(app, ["draft", "init", "--target", TARGET, *files, "--vocab", "300"])
    assert result.exit_code == 0, result.output
    return folder / "init"


def test_a_small_head_computes_its_tokens_as_the_whole_one_does(draft: Path, small: Path) -> None:
    ids = torch.arange(40, 80)[None]
    with torch.no_grad():
        whole_BTV, small_BTV = (load_model(str(name))(input_ids=ids).logits for name in (draft, small))
    kept_V = small_BTV[0, 0] > -torch.inf
    assert int(kept_V.sum()) == 300 < whole_BTV.shape[-1] == small_BTV.shape[-1]
    assert torch.allclose(small_BTV[..., kept_V], whole_BTV[..., kept_V], atol=1e-4), "other words"
    written = load_file(small / "model.safetensors")
    assert len(written["lm_head.weight"]) == len(written["d2t"]) == 300
    assert (written["d2t"] + torch.arange(300)).tolist() == kept_V.nonzero()[:, 0].tolist()


def test_rows_of_other_words_are_noticed(draft: Path, small: Path, tmp_path: Path) -> None:
    """The control: ids that a row too far would give."""
    other = tmp_path / "other"
    shutil.copytree(small, other)
    written = load_file(other / "model.safetensors")
    written["lm_head.weight"] = written["lm_head.weight"].roll(1, 0)
    save_file(written, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="other words"):
        test_a_small_head_computes_its_tokens_as_the_whole_one_does(draft, other)


def test_a_draft_with_a_small_head_serves_learns_by_lora_and_changes_no_text(small: Path) -> None:
    options = EngineOptions(num_slots=1, max_seq_len=128, num_draft_tokens=3, speculation="model")
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with load_engine(TARGET, str(small), options) as engine, load_engine(TARGET) as alone:
        assert engine.generate([[5, 6, 7]], params)[0].num_attempted > 0
        texts = [each.generate([[5, 6, 7]], params)[0].output_token_ids for each in (engine, alone)]
        assert texts[0] == texts[1]
        draft = engine.pair.draft
        assert "lm_head" not in adapted_module_names(draft) and "q_proj" in adapted_module_names(draft)
        assert weights_revision(draft) != weights_revision(load_model(TARGET))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d2t": None}, "draft_vocab_size is set, and lm_head.weight or d2t is not in its files"),
        ({"d2t": torch.zeros(300, dtype=torch.int64) + 10**6}, "d2t gives ids that are not"),
        ({"lm_head.weight": torch.zeros(299, 192)}, "draft_vocab_size=300"),
    ],
)
def test_a_head_that_is_not_what_it_says_is_refused(
    small: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(small, other)
    written = load_file(other / "model.safetensors") | change
    kept = {name: tensor for name, tensor in written.items() if tensor is not None}
    save_file(kept, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=said):
        load_model(str(other))


def test_a_head_no_smaller_than_the_targets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no smaller than the target's"):
        write_draft(TARGET, tmp_path / "draft", num_tokens=10**6, texts=TEXTS)
    assert not (tmp_path / "draft").exists()
