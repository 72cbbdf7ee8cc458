"""The checks of losslessness. Each runs the real engine and raises AssertionError where it lied.

The property tests call them with what hypothesis draws; the negative controls call the same ones with a bug
put into the engine, and expect the error.
"""

from typing import Any

import torch

from serving.engine import Generation, GenerationRequest, SamplingParams
from serving.local import LocalEngine
from tests.support.reference import coupled_noise, ends, next_distribution, only_output
from tests.support.scheduled_engine import ScheduledEngine, play
from tests.support.schedules import Schedule
from tests.support.table_model import TableModel

_NEAR_TIE = 2**-5
"""Of the largest logit: four units in bfloat16's last place. Three passes of different shapes round here, in
every layer: both engines', and the one that measures the gap."""


def target_of(schedule: Schedule, model_class: type[TableModel] = TableModel) -> TableModel:
    target = model_class(schedule.vocab_size, seed=schedule.seed, sharpness=1.5)
    if schedule.rounded:
        target.table.round_()
    return target


def check_schedule(schedule: Schedule, *, model_class: type[TableModel] = TableModel, **options: Any) -> None:
    """Every text of a schedule is the one that the target alone gives, or could give."""
    target = target_of(schedule, model_class)
    generations = play(schedule, target, _near(target, schedule.seed + 1), **options)
    for request in schedule.requests:
        generation = generations[request.request_id]
        assert not generation.error, generation.error
        check_generation(target, schedule.stop_ids(request), request, generation)


def _near(target: TableModel, seed: int) -> TableModel:
    """A draft that is right often, and wrong often."""
    draft = TableModel(target.table.shape[1], seed=seed, sharpness=0.7)
    draft.table.add_(target.table)
    return draft


def check_generation(
    target: TableModel, stop_ids: frozenset[int], request: GenerationRequest, generation: Generation
) -> None:
    """Text, end and log-probabilities of one request against the reference."""
    output = generation.output_token_ids
    cancelled = generation.finish_reason == "cancelled"
    if request.sampling.mode != "standard":
        expected = only_output(target, request, stop_ids)
        assert output == (expected[: len(output)] if cancelled else expected), "another text"
    for index, token in enumerate(output):
        assert not ends(request, stop_ids, output[:index]), "text after its end"
        probs_V = next_distribution(target, request, stop_ids, output[:index])
        assert probs_V[token] > -torch.inf, f"token {token} is excluded at output position {index}"
        raw_V = target.logits_after([*request.prompt_token_ids, *output[:index]]).log_softmax(-1)
        assert abs(generation.logprobs[index] - float(raw_V[token])) < 1e-4, "another context's logprob"
    if not cancelled:
        assert ends(request, stop_ids, output), "the text ended too soon"
        assert generation.finish_reason == ("stop" if output[-1] in stop_ids else "length")


def check_twin(schedule: Schedule, **options: Any) -> None:
    """A draft equal to the target accepts everything."""
    target = target_of(schedule)
    engine = ScheduledEngine(schedule, target, target_of(schedule), **options)
    generations = engine.play()
    assert not engine.stats().draft_disabled_reason, "a twin was switched off"
    for generation in generations.values():
        assert generation.num_accepted == generation.num_attempted, "a twin's draft was rejected"


@torch.inference_mode()
def check_up_to_near_ties(
    engine: LocalEngine, alone: LocalEngine, prompts: list[list[int]], params: SamplingParams
) -> None:
    """Greedy or coupled text equals that of the same engine without speculation, or departs at a near tie."""
    for drafted, plain in zip(engine.generate(prompts, params), alone.generate(prompts, params), strict=True):
        got, expected = drafted.output_token_ids, plain.output_token_ids
        differs = [token != other for token, other in zip(got, expected, strict=False)]
        if True not in differs:
            assert got == expected, "a text was cut short"
            continue
        at = differs.index(True)
        context = [*drafted.prompt_token_ids, *expected[:at]]
        logits_V = alone.pair.target(torch.tensor([context]), use_cache=False).logits[0, -1].float()
        score_V = logits_V
        if params.mode == "coupled":
            request = GenerationRequest("", drafted.prompt_token_ids, params)
            score_V = logits_V / params.temperature + coupled_noise(request, at, len(logits_V))
        gap = float(score_V.max() - score_V[[got[at], expected[at]]].min())
        tie = _NEAR_TIE * float(logits_V.abs().max()) / (params.temperature or 1.0)
        assert gap <= tie, f"the texts part at position {at}, where no tie is near: {gap:.3g} over {tie:.3g}"
