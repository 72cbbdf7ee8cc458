"""Bad drafts are refused before they serve, or taken back soon; each for a reason that can be read.

The same attacks as `everdraft bench attacks`, on tiny models. Greedy and sampled; everything is seeded.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.adapted import Adapter
from benchmarks.osd import attacks, live_attacks
from benchmarks.osd.arms import trainable
from benchmarks.osd.attack_views import MOST_ROUNDS, metrics
from benchmarks.osd.bad_adapters import BAD_ADAPTERS
from benchmarks.osd.bad_records import BAD_RECORDS
from benchmarks.osd.testbed import TESTBED_SETTINGS, WEAKENED, InProcessDeployment, Testbed, weakened
from learner.draft import export_weights
from learner.judging.gate import GateDecision
from learner.judging.judge import Judge, Judgement
from learner.settings import LearnerSettings
from serving.local import build_engine
from serving.models.loading import ModelPair, load_pair
from serving.options import EngineOptions
from tests.support.tiny_learner import quick_settings
from tests.support.tiny_models import save_tiny_pair

SIZE = 0.15
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def prompts(first: int) -> Iterator[list[int]]:
    """Of one kind of traffic: its own tokens."""
    rng = np.random.default_rng(first)
    while True:
        yield [first, *(first + rng.integers(0, 40, 3)).tolist()]


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """The target is the draft with a random adapter merged in: three quarters of that are the incumbent,
    the whole is the better draft, and nobody has to be trained."""
    pair = load_pair(*save_tiny_pair(tmp_path_factory.mktemp("pair")))
    settings = quick_settings(
        **TESTBED_SETTINGS, target_modules=MODULES, lora_rank=8, lora_alpha=16.0, held_out_window_records=64
    )
    truth = _random_adapter(pair, settings)
    assert pair.draft is not None
    pair = replace(pair, target=truth.merged(pair.draft), target_revision="draft and adapter")
    traffic = {f"kind {first}": prompts(first) for first in (10, 110, 210)}
    with build_engine(
        pair, options=EngineOptions(num_slots=8, max_seq_len=64, prefix_cache_mib=0, num_draft_tokens=3)
    ) as engine:
        engine.seed(0)
        testbed = Testbed(pair, engine, settings, weakened(truth, WEAKENED), traffic, max_tokens=24)
        testbed.fill(32)
        yield testbed


def _random_adapter(pair: ModelPair, settings: LearnerSettings) -> Adapter:
    draft = trainable(pair, settings)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(weight.shape, generator=generator) * SIZE for name, weight in draft.state().items()
    }
    return Adapter(export_weights(state), draft.config_json)


@pytest.mark.parametrize("kind", BAD_ADAPTERS)
def test_a_spoilt_adapter_is_refused_by_the_replica_and_taken_back(testbed: Testbed, kind: str) -> None:
    outcome = attacks.spoilt_adapter(testbed, 3, kind)
    assert not outcome.served
    assert (outcome.refused_by, outcome.reported) == ("replica", True), outcome


@pytest.mark.parametrize("kind", attacks.CANDIDATES)
def test_a_bad_candidate_is_refused_by_the_gate(testbed: Testbed, kind: str) -> None:
    outcome = attacks.bad_candidate(testbed, 0, kind)
    assert not outcome.served
    assert outcome.reported and outcome.reason


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_training_on_bad_records_serves_nothing(testbed: Testbed, kind: str) -> None:
    outcome = attacks.bad_training(testbed, 0, kind)
    assert not outcome.served
    assert outcome.reported and outcome.reason


def test_what_only_live_traffic_shows_is_rolled_back_in_time_and_not_let_in_again(testbed: Testbed) -> None:
    outcomes = [
        live_attacks.unjudged(testbed, 0, "random weights"),
        live_attacks.unjudged(testbed, 1, "the floor"),
        live_attacks.bad_swap(testbed, 0, "nothing was copied"),
        live_attacks.bad_swap(testbed, 1, "merged twice"),
        live_attacks.misleading_window(testbed, 1),
    ]
    assert all(outcome.served and outcome.rolled_back for outcome in outcomes), outcomes
    figures = metrics(outcomes)
    assert figures["num_live_costly"] == len(outcomes), outcomes
    assert figures["num_live_costly_rolled_back_in_time"] == len(outcomes), outcomes
    assert figures["rounds_until_rollback_max"] <= MOST_ROUNDS
    assert figures["num_promoted_again"] == figures["num_unreported"] == 0


def test_a_good_draft_stays_when_traffic_shifts(testbed: Testbed) -> None:
    outcome = live_attacks.shift(testbed, 0)
    assert outcome.served
    assert not outcome.rolled_back, outcome


class OpenDoor(Judge):
    """A gate with its test disabled."""

    def judge(self, *args: object, **kwargs: object) -> Judgement:
        return Judgement(GateDecision(True, "whatever it is"))


def test_with_the_gates_test_disabled_attacks_get_through_and_are_seen(
    testbed: Testbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InProcessDeployment, "judge_type", OpenDoor)
    for kind in ("random weights", "the floor again"):
        assert attacks.bad_candidate(testbed, 0, kind).served
    assert attacks.bad_training(testbed, 0, "poisoned").served
