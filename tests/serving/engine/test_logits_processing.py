"""Penalties, bias and allowed ids: the distribution of every position is that of its own context, drafted or
not.

Distributions by chi-square against full enumeration (false-alarm rate in chi_square.py), texts by equality
with the same engine without a draft, tensors against a plain reference. Distributions and texts must fail on
each injected bug.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serving.engine import Generation, GenerationRequest, SamplingParams
from serving.engine.engine import Engine
from serving.engine.logits_processing import LogitsProcessing, RowContext
from serving.local import load_engine
from serving.options import EngineOptions
from tests.support.chi_square import FALSE_ALARM_RATE, fit_p_value
from tests.support.table_engine import table_engine
from tests.support.table_model import TableModel
from tests.support.tiny_models import save_tiny_pair

VOCAB = 6
PROMPTS = [[1, 2, 3], [4], [0, 5, 2, 2, 1, 3, 0, 4], [2, 2], [5, 1]]
ASKED: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "encouraged": {"frequency_penalty": -0.5, "presence_penalty": -0.5},
    "repetition": {"repetition_penalty": 1.8},
    "bias": {"logit_bias": {1: 2.0, 3: -math.inf, 5: -1.0}},
    "allowed": {"allowed_token_ids": (0, 2, 4)},
    "all": {
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 0.8,
        "logit_bias": {0: -1.0, 4: 1.5},
        "allowed_token_ids": (0, 1, 3, 4),
        "min_tokens": 5,
        "stop_token_ids": (4,),
    },
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "coupled": {"seed": 3, "temperature": 0.9},
}


def reference(logits_V: Sequence[float], row: RowContext, drafted: Sequence[int]) -> list[float]:
    """The processed logits after `drafted`, id by id as the documentation reads."""
    sampling, prompt = row.sampling, row.token_ids[: row.prompt_len]
    output = [*row.token_ids[row.prompt_len :], *drafted]
    processed = []
    for token, logit in enumerate(logits_V):
        logit += dict(sampling.bias_pairs).get(token, 0.0)
        if sampling.allowed_token_ids is not None and token not in sampling.allowed_token_ids:
            logit = -math.inf
        if token in prompt or token in output:
            repetition = sampling.repetition_penalty
            logit = logit / repetition if logit > 0 else logit * repetition
        logit -= sampling.frequency_penalty * output.count(token)
        logit -= sampling.presence_penalty if token in output else 0.0
        processed.append(-math.inf if len(output) < sampling.min_tokens and token in row.stop_ids else logit)
    return processed


def context(prompt: Sequence[int], output: Sequence[int] = (), **sampling: Any) -> RowContext:
    params = SamplingParams(**{"max_tokens": 64, **sampling})
    return RowContext(params, [*prompt, *output], len(prompt), frozenset(params.stop_token_ids))


def processing(*rows: RowContext) -> LogitsProcessing:
    stacked = LogitsProcessing.stack(rows, VOCAB)
    assert stacked is not None
    return stacked


# -- tensors against the reference -------------------------------------------------------------

tokens = st.lists(st.integers(0, VOCAB - 1), max_size=5)
penalties = st.sampled_from([0.0, 0.0, -2.0, -0.3, 0.7, 2.0])
sampling_fields = st.fixed_dictionaries(
    {
        "presence_penalty": penalties,
        "frequency_penalty": penalties,
        "repetition_penalty": st.sampled_from([1.0, 1.0, 0.01, 0.6, 1.3, 100.0]),
        "logit_bias": st.dictionaries(
            st.integers(0, VOCAB - 1), st.sampled_from([-math.inf, -100.0, -0.5, 3.0]), max_size=3
        ),
        "allowed_token_ids": st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1).map(tuple),
        "min_tokens": st.integers(0, 8),
        "stop_token_ids": st.sets(st.integers(0, VOCAB - 1), max_size=2).map(tuple),
    }
)
rows = st.builds(
    lambda prompt, output, sampling: context(prompt, output, **sampling), tokens, tokens, sampling_fields
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(rows, min_size=1, max_size=4), st.integers(0, 4), st.integers(0, 2**31))
def test_the_tensors_agree_with_the_reference_position_by_position(
    asked: list[RowContext], num_drafts: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BEV = 4.0 * torch.randn(len(asked), num_drafts + 1, VOCAB, generator=generator)
    logits_BEV[logits_BEV < -6.0] = -torch.inf
    drafted_BG = torch.randint(VOCAB, (len(asked), num_drafts), generator=generator)
    raw_BEV = logits_BEV.clone()
    stacked = LogitsProcessing.stack(asked, VOCAB)
    whole_BEV = logits_BEV if stacked is None else stacked.apply(logits_BEV, drafted_BG)
    assert torch.equal(logits_BEV, raw_BEV)
    for row, position in itertools.product(range(len(asked)), range(num_drafts + 1)):
        drafted = drafted_BG[row, :position].tolist()
        expected_V = torch.tensor(reference(raw_BEV[row, position].tolist(), asked[row], drafted))
        assert torch.allclose(whole_BEV[row, position], expected_V, rtol=1e-5, atol=1e-4)
    if stacked is None:
        return
    for position in range(num_drafts + 1):
        one_B1V = stacked.apply(logits_BEV[:, position : position + 1], drafted_BG[:, :position], position)
        assert torch.equal(one_B1V[:, 0], whole_BEV[:, position]), (
            "the draft's call differs from the target's"
        )
    stacked.commit([row_G[: index % 3] for index, row_G in enumerate(drafted_BG.tolist())])
    later = [
        RowContext(row.sampling, [*row.token_ids, *row_G[: index % 3]], row.prompt_len, row.stop_ids)
        for index, (row, row_G) in enumerate(zip(asked, drafted_BG.tolist(), strict=True))
    ]
    rebuilt = LogitsProcessing.stack(later, VOCAB)
    rebuilt_BEV = logits_BEV if rebuilt is None else rebuilt.apply(logits_BEV, drafted_BG)
    assert torch.equal(stacked.apply(logits_BEV, drafted_BG), rebuilt_BEV)


def test_frequency_and_presence_ignore_the_prompt_and_repetition_sees_it() -> None:
    logits_BXV = torch.tensor([[[2.0, 1.0, -1.0, 0.5, 3.0, -2.0]]])
    none_B0 = torch.zeros((1, 0), dtype=torch.int64)
    output_only = processing(context([0, 0, 2], frequency_penalty=1.0, presence_penalty=1.0))
    assert torch.equal(output_only.apply(logits_BXV, none_B0), logits_BXV)
    both = processing(context([0, 0, 2], [4], repetition_penalty=2.0))
    assert both.apply(logits_BXV, none_B0).tolist() == [[[1.0, 1.0, -2.0, 0.5, 1.5, -2.0]]]


def test_rows_that_ask_for_nothing_stay_byte_identical_and_a_batch_of_them_is_not_touched() -> None:
    logits_BXV = torch.randn(3, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    drafted_BG = torch.tensor([[1, 1], [2, 2], [3, 3]])
    mixed = processing(context([1]), context([1], **ASKED["all"]), context([2]))
    processed_BXV = mixed.apply(logits_BXV, drafted_BG)
    assert torch.equal(processed_BXV[[0, 2]], logits_BXV[[0, 2]])
    assert not torch.equal(processed_BXV[1], logits_BXV[1])
    assert LogitsProcessing.stack([context([1]), context([2], top_k=3, stop_token_ids=(1,))], VOCAB) is None
    reached = processing(context([1], min_tokens=2, stop_token_ids=(1,)))
    reached.commit([[3, 4]])
    first_BXV = logits_BXV[:1]
    assert reached.apply(first_BXV, drafted_BG[:1]) is first_BXV


# -- texts: the same with and without a draft --------------------------------------------------


def _texts(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    return [generation.output_token_ids for generation in engine.generate(prompts, params)]


def _table_texts_agree(params: SamplingParams) -> bool:
    """Of a table engine with drafts and one without; batches form and break up on the way."""
    target, draft = TableModel(VOCAB, seed=1), TableModel(VOCAB, seed=2)
    with table_engine(target, None, num_draft_tokens=0, num_slots=1) as alone:
        expected = _texts(alone, PROMPTS, params)
    for is_target, model in enumerate([draft, target]):
        with table_engine(target, model, num_draft_tokens=4, num_slots=3) as engine:
            generations = engine.generate(PROMPTS, params)
        if [generation.output_token_ids for generation in generations] != expected:
            return False
        assert sum(generation.num_accepted for generation in generations) > 0
        if is_target:  # a draft equal to the target: processed alike, so accepted throughout
            assert all(generation.num_accepted == generation.num_attempted for generation in generations)
    return True


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asked", ASKED)
def test_the_text_is_that_of_the_target_alone(asked: str, mode: str) -> None:
    assert _table_texts_agree(SamplingParams(max_tokens=30, **{**ASKED[asked], **MODES[mode]}))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def engines(pair: tuple[str, str]) -> Iterator[list[Engine]]:
    """Without speculation, with a draft, with the target as its own draft."""
    with (
        load_engine(pair[0], options=EngineOptions(num_slots=1, max_seq_len=128)) as alone,
        load_engine(
            *pair, options=EngineOptions(num_draft_tokens=4, num_slots=3, max_seq_len=128)
        ) as drafted,
        load_engine(
            pair[0], pair[0], options=EngineOptions(num_draft_tokens=3, num_slots=2, max_seq_len=128)
        ) as own,
    ):
        yield [alone, drafted, own]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asked", ASKED)
def test_the_text_of_a_random_llama_is_that_of_the_target_alone(
    engines: list[Engine], asked: str, mode: str
) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True, **{**ASKED[asked], **MODES[mode]})
    prompts = [[5, 6, 7, 8], [9], [0, 1, 2, 3, 4] * 8, [30, 31]]
    alone, drafted, own = (_texts(engine, prompts, params) for engine in engines)
    assert alone == drafted == own
    assert alone != _texts(engines[0], prompts, SamplingParams(max_tokens=24, ignore_eos=True, **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_mate_with_penalties_changes_nobody_elses_text(mode: str) -> None:
    target, draft = TableModel(VOCAB, seed=1), TableModel(VOCAB, seed=2)
    plain = SamplingParams(max_tokens=30, logprobs=3, **MODES[mode])
    asking = SamplingParams(max_tokens=30, **{**ASKED["all"], **MODES[mode]})
    with table_engine(target, draft, num_draft_tokens=3) as engine:
        expected = engine.generate(PROMPTS[:3], plain)
        mixed = engine.generate([*PROMPTS[:3], PROMPTS[3]], [plain, plain, plain, asking])
    for with_mate, without in zip(mixed, expected, strict=False):
        assert with_mate.output_token_ids == without.output_token_ids
        assert with_mate.logprobs == without.logprobs


# -- sampled output: the distribution by enumeration ----------------------------------------------------

PROMPT, NUM_TOKENS, SAMPLES = [2, 0, 1, 1], 3, 4000
DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "penalties": {"presence_penalty": 2.0, "frequency_penalty": 1.0, "repetition_penalty": 1.4},
    "encouraged": {"frequency_penalty": -1.0, "logit_bias": {1: 1.0, 2: -0.5}, "temperature": 0.8},
    "banned": {"logit_bias": {0: -math.inf, 3: 0.5}, "repetition_penalty": 0.7, "frequency_penalty": 0.5},
}


def _output_distribution(target: TableModel, sampling: SamplingParams) -> dict[tuple[int, ...], float]:
    """Exact probability of every output, from the reference above."""
    row = RowContext(sampling, PROMPT, len(PROMPT), frozenset())
    distribution = {}
    for output in itertools.product(range(4), repeat=NUM_TOKENS):
        probability = 1.0
        for index, token in enumerate(output):
            raw_V = target.logits_after([*PROMPT, *output[:index]]).tolist()
            processed_V = torch.tensor(reference(raw_V, row, output[:index]))
            probability *= float(torch.softmax(processed_V / sampling.temperature, -1)[token])
        distribution[output] = probability
    return distribution


def _p_value(asked: str, mode: str) -> float:
    """A draft half the target: rejections and bonus tokens are both frequent."""
    target, draft = TableModel(4, seed=1, sharpness=1.3), TableModel(4, seed=2, sharpness=1.3)
    draft.table.lerp_(target.table, 0.5)
    each = [
        SamplingParams(
            max_tokens=NUM_TOKENS, seed=None if mode == "standard" else seed, **DISTRIBUTIONS[asked]
        )
        for seed in range(SAMPLES)
    ]
    with table_engine(target, draft, num_draft_tokens=2, num_slots=32, prefill_chunk_tokens=96) as engine:
        engine.seed(5)
        generations = engine.generate([PROMPT] * SAMPLES, each)
    outputs = [tuple(generation.output_token_ids) for generation in generations]
    return fit_p_value(outputs, _output_distribution(target, each[0]))


@pytest.mark.parametrize("mode", ["standard", pytest.param("coupled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("asked", DISTRIBUTIONS)
def test_sampled_output_follows_the_processed_distribution(asked: str, mode: str) -> None:
    assert _p_value(asked, mode) > FALSE_ALARM_RATE


# -- negative controls -------------------------------------------------------------------------

Apply = Callable[[LogitsProcessing, Tensor, Tensor, int], Tensor]
_apply: Apply = LogitsProcessing.apply


def _without_the_drafts_before(
    self: LogitsProcessing, logits_BXV: Tensor, drafted_BD: Tensor, first_position: int = 0
) -> Tensor:
    if logits_BXV.shape[1] == 1:
        return _apply(self, logits_BXV, drafted_BD, first_position)
    return torch.cat([_apply(self, part, drafted_BD[:, :0], 0) for part in logits_BXV.split(1, dim=1)], dim=1)


def _raw_bonus(
    self: LogitsProcessing, logits_BXV: Tensor, drafted_BD: Tensor, first_position: int = 0
) -> Tensor:
    processed_BXV = _apply(self, logits_BXV, drafted_BD, first_position)
    if logits_BXV.shape[1] == 1:
        return processed_BXV
    return torch.cat([processed_BXV[:, :-1], logits_BXV[:, -1:]], dim=1)


def _raw_target(
    self: LogitsProcessing, logits_BXV: Tensor, drafted_BD: Tensor, first_position: int = 0
) -> Tensor:
    if logits_BXV.shape[1] == 1:
        return _apply(self, logits_BXV, drafted_BD, first_position)
    return logits_BXV


BUGS = [_without_the_drafts_before, _raw_bonus, _raw_target]
"""Of the target's pass; more than one position tells it from the draft's."""


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("mode", ["standard", pytest.param("coupled", marks=pytest.mark.slow)])
def test_a_distribution_that_misses_a_positions_own_context_is_caught(
    monkeypatch: pytest.MonkeyPatch, bug: Apply, mode: str
) -> None:
    monkeypatch.setattr(LogitsProcessing, "apply", bug)
    assert _p_value("penalties", mode) < FALSE_ALARM_RATE


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("mode", MODES)
def test_a_text_that_misses_a_positions_own_context_is_caught(
    monkeypatch: pytest.MonkeyPatch, bug: Apply, mode: str
) -> None:
    monkeypatch.setattr(LogitsProcessing, "apply", bug)
    assert not _table_texts_agree(SamplingParams(max_tokens=30, frequency_penalty=1.0, **MODES[mode]))


# -- bans --------------------------------------------------------------------------------------


def _draft_that(kind: str) -> TableModel:
    draft = TableModel(VOCAB, seed=2)
    if kind == "says only what is banned":
        draft.table[:, [1, 3, 5]] = 50.0
    elif kind == "cannot say what is allowed":
        draft.table[:, [0, 2, 4]] = -torch.inf
    elif kind == "is NaN":
        draft.table.fill_(torch.nan)
    return draft


@pytest.mark.parametrize(
    "kind", ["is random", "says only what is banned", "cannot say what is allowed", "is NaN"]
)
@pytest.mark.parametrize("mode", [*MODES, "standard"])
@pytest.mark.parametrize("form", ["allowed", "banned"])
def test_what_is_banned_is_never_emitted_whatever_the_draft(kind: str, mode: str, form: str) -> None:
    bans: dict[str, Any] = {
        "allowed": {"allowed_token_ids": (0, 2, 4), "logit_bias": {3: 100.0}},
        "banned": {"logit_bias": dict.fromkeys((1, 3, 5), -math.inf)},
    }[form]
    params = SamplingParams(max_tokens=30, repetition_penalty=0.5, **bans, **MODES.get(mode, {}))
    with table_engine(TableModel(VOCAB, seed=1), _draft_that(kind), num_draft_tokens=3) as engine:
        generations = engine.generate(PROMPTS, params)
        disabled = engine.stats().draft_disabled_reason
    assert {token for g in generations for token in g.output_token_ids} == {0, 2, 4}
    assert all(len(generation.output_token_ids) == 30 for generation in generations)
    assert bool(disabled) == (kind == "is NaN"), "only a broken draft is switched off"


def test_a_request_that_the_target_cannot_answer_ends_with_an_error_alone() -> None:
    target, draft = TableModel(VOCAB, seed=1), TableModel(VOCAB, seed=2)
    target.table[:, 5] = -torch.inf
    with table_engine(target, draft, num_draft_tokens=3) as engine:
        params = [SamplingParams(max_tokens=9, allowed_token_ids=(5,)), SamplingParams(max_tokens=9)]
        hopeless, fine = engine.generate(PROMPTS[:2], params)
        assert not engine.stats().draft_disabled_reason
    assert (hopeless.finish_reason, hopeless.output_token_ids) == ("error", [])
    assert (fine.finish_reason, len(fine.output_token_ids)) == ("length", 9)


# -- what is reported, what is refused ---------------------------------------------------------


def test_logprobs_and_captured_entries_stay_raw_and_the_emitted_distribution_is_the_processed_one() -> None:
    target, draft = TableModel(VOCAB, seed=1), TableModel(VOCAB, seed=2)
    params = SamplingParams(max_tokens=12, logprobs=2, **ASKED["all"])
    with table_engine(target, draft, num_draft_tokens=3) as engine:
        handle = engine.submit(GenerationRequest("r", tuple(PROMPTS[0]), params, capture=True))
        generation: Generation = handle.result(30)
    row = RowContext(params, PROMPTS[0], len(PROMPTS[0]), frozenset(params.stop_token_ids))
    output = generation.output_token_ids
    emitted = [value for trace in generation.captured_rounds for value in trace.emitted_target_logprobs_C]
    for index, token in enumerate(output):
        raw_V = target.logits_after([*PROMPTS[0], *output[:index]])
        assert generation.logprobs[index] == pytest.approx(float(raw_V.log_softmax(-1)[token]), abs=1e-5)
        assert generation.top_logprobs[index][0][0] == int(raw_V.argmax())
        final_V = torch.tensor(reference(raw_V.tolist(), row, output[:index])).log_softmax(-1)
        assert emitted[index] == pytest.approx(float(final_V[token]), abs=1e-4)
    for trace in generation.captured_rounds:
        raw_V = target.logits_after([*PROMPTS[0], *output][: trace.start]).log_softmax(-1)
        assert trace.topk_logprobs_EK[0].tolist() == pytest.approx(
            raw_V.topk(VOCAB).values.tolist(), abs=5e-3
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 100.5}),
        ("allowed_token_ids", ()),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("logit_bias", SamplingParams(logit_bias={VOCAB: 1.0})),
        ("logit_bias", SamplingParams(logit_bias={-1: 1.0})),
        ("allowed_token_ids", SamplingParams(allowed_token_ids=(0, VOCAB))),
        ("logit_bias", SamplingParams(logit_bias=dict.fromkeys(range(VOCAB), -math.inf))),
        (
            "allowed_token_ids",
            SamplingParams(allowed_token_ids=(1, 2), logit_bias={1: -math.inf, 2: -math.inf}),
        ),
        ("min_tokens", SamplingParams(min_tokens=1, allowed_token_ids=(1, 2), stop_token_ids=(1, 2))),
        (
            "min_tokens",
            SamplingParams(min_tokens=1, logit_bias={0: -math.inf}, stop_token_ids=(1, 2, 3, 4, 5)),
        ),
    ],
)
def test_ids_outside_the_vocabulary_and_bans_that_leave_nothing_are_refused_by_name(
    name: str, sampling: SamplingParams
) -> None:
    with (
        table_engine(TableModel(VOCAB, seed=1), None, num_draft_tokens=0) as engine,
        pytest.raises(ValueError, match=f"^{name}"),
    ):
        engine.generate([[1]], sampling)


def test_bias_is_kept_hashable_and_in_one_order() -> None:
    ours = SamplingParams(logit_bias={3: 1, 1: -math.inf}, allowed_token_ids=(2, 1, 2))
    assert ours.logit_bias == ((1, -math.inf), (3, 1.0))
    assert ours.allowed_token_ids == (1, 2)
    assert hash(ours) == hash(SamplingParams(logit_bias=((3, 1.0), (1, -math.inf)), allowed_token_ids=(1, 2)))
