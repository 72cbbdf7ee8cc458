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
from benchmarks.osd.stand import STAND_SETTINGS, WEAKENED, House, Stand, weakened
from learner.draft import export_weights
from learner.gate import GateDecision
from learner.judge import Judge, Judgement
from learner.settings import LearnerSettings
from serving.local import build_engine
from serving.models.loading import ModelPair, load_pair
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
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """The target is the draft with a random adapter merged in: three quarters of that are the incumbent,
    the whole is the better draft, and nobody has to be trained."""
    pair = load_pair(*save_tiny_pair(tmp_path_factory.mktemp("pair")))
    settings = quick_settings(
        **STAND_SETTINGS, target_modules=MODULES, lora_rank=8, lora_alpha=16.0, held_out_window_records=64
    )
    truth = _random_adapter(pair, settings)
    assert pair.draft is not None
    pair = replace(pair, target=truth.merged(pair.draft), target_revision="draft and adapter")
    traffic = {f"kind {first}": prompts(first) for first in (10, 110, 210)}
    with build_engine(pair, num_slots=8, max_seq_len=64, prefix_cache_mib=0, num_draft_tokens=3) as engine:
        engine.seed(0)
        stand = Stand(pair, engine, settings, weakened(truth, WEAKENED), traffic, max_tokens=24)
        stand.fill(32)
        yield stand


def _random_adapter(pair: ModelPair, settings: LearnerSettings) -> Adapter:
    draft = trainable(pair, settings)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(weight.shape, generator=generator) * SIZE for name, weight in draft.state().items()
    }
    return Adapter(export_weights(state), draft.config_json)


@pytest.mark.parametrize("kind", BAD_ADAPTERS)
def test_a_spoilt_adapter_is_refused_by_the_replica_and_taken_back(stand: Stand, kind: str) -> None:
    outcome = attacks.spoilt_adapter(stand, 3, kind)
    assert not outcome.served
    assert (outcome.refused_by, outcome.told) == ("replica", True), outcome


@pytest.mark.parametrize("kind", attacks.CANDIDATES)
def test_a_bad_candidate_is_refused_by_the_gate(stand: Stand, kind: str) -> None:
    outcome = attacks.bad_candidate(stand, 0, kind)
    assert not outcome.served
    assert outcome.told and outcome.reason


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_training_on_bad_records_serves_nothing(stand: Stand, kind: str) -> None:
    outcome = attacks.bad_training(stand, 0, kind)
    assert not outcome.served
    assert outcome.told and outcome.reason


def test_what_only_live_traffic_shows_is_rolled_back_in_time_and_not_let_in_again(stand: Stand) -> None:
    outcomes = [
        live_attacks.unjudged(stand, 0, "random weights"),
        live_attacks.unjudged(stand, 1, "the floor"),
        live_attacks.bad_swap(stand, 0, "nothing was copied"),
        live_attacks.bad_swap(stand, 1, "merged twice"),
        live_attacks.misleading_window(stand, 1),
    ]
    assert all(outcome.served and outcome.rolled_back for outcome in outcomes), outcomes
    figures = metrics(outcomes)
    assert figures["num_live_costly"] == len(outcomes), outcomes
    assert figures["num_live_costly_rolled_back_in_time"] == len(outcomes), outcomes
    assert figures["rounds_until_rollback_max"] <= MOST_ROUNDS
    assert figures["num_promoted_again"] == figures["num_untold"] == 0


def test_a_good_draft_stays_when_traffic_shifts(stand: Stand) -> None:
    outcome = live_attacks.shift(stand, 0)
    assert outcome.served
    assert not outcome.rolled_back, outcome


class OpenDoor(Judge):
    """A gate with its test disabled."""

    def judge(self, *args: object, **kwargs: object) -> Judgement:
        return Judgement(GateDecision(True, "whatever it is"))


def test_with_the_gates_test_disabled_attacks_get_through_and_are_seen(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(House, "judge_type", OpenDoor)
    for kind in ("random weights", "the floor again"):
        assert attacks.bad_candidate(stand, 0, kind).served
    assert attacks.bad_training(stand, 0, "poisoned").served
