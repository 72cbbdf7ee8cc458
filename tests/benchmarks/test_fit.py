"""What a part guesses is counted at the target's own tokens."""

from itertools import cycle
from pathlib import Path

import pytest
import torch

from benchmarks.adapted import Adapter
from benchmarks.fit import measure
from learner.draft import build_draft, export_weights
from learner.settings import LearnerSettings
from serving.models.loading import load_pair
from serving.models.target_part import own_copy
from tests.support.tiny_models import save_tiny_pair

PROMPTS = [[1, 2, 3], [4, 5, 6, 7], list(range(30))]


def test_the_last_exit_is_the_target_and_earlier_ones_guess_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target, _ = save_tiny_pair(tmp_path)
    figures = measure(load_pair(target), cycle(PROMPTS), exit_layers=[0, 2], num_prompts=3, max_tokens=6)
    parts = figures["parts"]
    assert figures["num_prompts"] == 3 and 3 <= figures["num_tokens"] <= 18
    assert parts["self:2"]["acceptance_before"] == 1.0
    assert parts["self:0"]["acceptance_before"] < 1.0
    assert all(0.0 <= row["acceptance_after"] <= 1.0 for row in parts.values())
    assert [row["layers"] for row in parts.values()] == [1, 3]


def test_what_a_part_learnt_is_measured_with_the_tokens_that_its_head_keeps(tmp_path: Path) -> None:
    pair = load_pair(save_tiny_pair(tmp_path)[0], "self:1:40")
    assert pair.draft is not None
    learner = build_draft(own_copy(pair.draft), LearnerSettings(), draft_id="self:1:40", draft_revision="1")
    learner.keep_tokens(torch.arange(320).double())  # the last 40
    adapter = Adapter(export_weights(learner.state()), learner.config_json)
    logits_TV = adapter.merged(pair.draft)(input_ids=torch.tensor([[1, 2, 3]])).logits[0]
    assert (logits_TV[0] > -torch.inf).nonzero()[:, 0].tolist() == list(range(280, 320))
    floor_TV = pair.draft(input_ids=torch.tensor([[1, 2, 3]])).logits[0]
    assert not torch.equal(floor_TV > -torch.inf, logits_TV > -torch.inf)
