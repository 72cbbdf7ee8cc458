"""Replayed rounds are the rounds that the engine would have run, for every request, in both modes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.osd.arms import settings_of, trainable
from benchmarks.osd.corpus import CorpusExchange
from benchmarks.osd.recorded_answers import Asking, RecordedAnswer, fitted_prompt, load, record_answers, save
from benchmarks.osd.replay import Replay
from deploy.commands.demo import PAIR
from deploy.demo.corpus import prompts
from serving.engine.request import Generation, SamplingParams
from serving.local import build_engine
from serving.models.loading import ModelPair, load_pair
from serving.options import EngineOptions

NUM_DRAFT_TOKENS = 4
ASKING = Asking(prompt_tokens=64, max_tokens=24)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return load_pair(str(PAIR / "target"), str(PAIR / "draft"))


@pytest.fixture(scope="module", params=[0.0, 1.0])
def recorded(request: pytest.FixtureRequest, pair: ModelPair) -> list[RecordedAnswer]:
    stream = prompts("prose", "heldout", seed=3)
    rows = [CorpusExchange("prose", "en", next(stream).messages[-1]["content"], "") for _ in range(12)]
    return record_answers(pair, rows, request.param, ASKING)


def _engine(pair: ModelPair, recorded: list[RecordedAnswer]) -> list[Generation]:
    """One request at a time: with batch mates a row may sit out a round while it catches up."""
    with build_engine(
        pair,
        options=EngineOptions(
            num_slots=1, max_seq_len=128, num_draft_tokens=NUM_DRAFT_TOKENS, speculation="model"
        ),
    ) as engine:
        return [
            engine.generate(
                [one.prompt_token_ids.tolist()],
                SamplingParams(temperature=one.temperature, seed=one.seed, max_tokens=ASKING.max_tokens),
            )[0]
            for one in recorded
        ]


def _replayed(pair: ModelPair, recorded: list[RecordedAnswer]) -> list[tuple[int, int, int]]:
    draft = trainable(pair, settings_of("ours", {}))
    played = Replay(pair.target_revision, NUM_DRAFT_TOKENS).play(draft, 0, recorded)
    return [(one.num_rounds, one.num_attempted, one.num_accepted) for one in played]


def test_a_replay_counts_what_the_engine_counts(pair: ModelPair, recorded: list[RecordedAnswer]) -> None:
    generations = _engine(pair, recorded)
    assert [list(one.token_ids_N) for one in recorded] == [one.output_token_ids for one in generations]
    counted = [(one.num_rounds, one.num_attempted, one.num_accepted) for one in generations]
    assert _replayed(pair, recorded) == counted
    assert sum(accepted for _, _, accepted in counted) > 0


def test_a_replay_with_another_draft_length_or_noise_is_seen(
    pair: ModelPair, recorded: list[RecordedAnswer]
) -> None:
    """The control of the test above: what it compares does depend on what it should."""
    counted = _replayed(pair, recorded)
    draft = trainable(pair, settings_of("ours", {}))
    shorter = Replay(pair.target_revision, 1).play(draft, 0, recorded)
    assert [one.num_rounds for one in shorter] != [rounds for rounds, _, _ in counted]
    if recorded[0].seed is not None:
        assert _replayed(
            pair, [replace(one, seed=one.seed + 1) for one in recorded if one.seed is not None]
        ) != (counted)


def test_rows_that_were_never_recorded_are_not_numbers(
    pair: ModelPair, recorded: list[RecordedAnswer]
) -> None:
    draft = trainable(pair, settings_of("ours", {}))
    played = Replay(pair.target_revision, NUM_DRAFT_TOKENS).play(draft, 0, recorded)
    traces = [trace for one in played for trace in one.record.rounds]
    rejected = [trace for trace in traces if trace.num_accepted < trace.num_drafted]
    assert rejected
    for trace in rejected:
        emitted = len(trace.emitted_target_logprobs_C)
        assert np.isnan(trace.topk_logprobs_EK[emitted:]).all()
        assert np.isfinite(trace.topk_logprobs_EK[:emitted]).all()


def test_what_was_recorded_survives_its_file(tmp_path: Path, recorded: list[RecordedAnswer]) -> None:
    save(tmp_path / "recorded.npz", recorded)
    for one, other in zip(recorded, load(tmp_path / "recorded.npz"), strict=True):
        assert vars(one).keys() == vars(other).keys()
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


def test_a_long_question_loses_its_beginning_and_the_template_nothing(pair: ModelPair) -> None:
    tokenizer = pair.tokenizer
    assert tokenizer is not None
    question = " ".join(f"word{number}" for number in range(60))
    whole, cut = fitted_prompt(tokenizer, question, 4096), fitted_prompt(tokenizer, question, 48)
    empty = fitted_prompt(tokenizer, "", 48)
    assert len(cut) <= 48 < len(whole)
    head = next(index for index, (a, b) in enumerate(zip(empty, whole, strict=False)) if a != b)
    tail = len(empty) - head
    assert cut[:head] == whole[:head] and cut[-tail - 4 :] == whole[-tail - 4 :]
    with pytest.raises(ValueError, match="template alone"):
        fitted_prompt(tokenizer, question, len(empty) - 1)
