"""Outputs and step messages of one request: what they add up to, and what a lost message costs."""

from dataclasses import replace
from types import SimpleNamespace

from serving.engine.request import Generation, GenerationRequest, SamplingParams, VersionSpan
from serving.engines.async_llm.generation import RunningGeneration
from serving.engines.async_llm.step_messages import StepMessage
from tests.serving.engines.async_llm.test_step_messages import arrays

REQUEST = GenerationRequest(
    "r", (1, 2, 3), SamplingParams(temperature=1.0, seed=7, max_tokens=6), capture=True
)


def step(number: int, version: int, *emitted: int, num_drafted: int = 2) -> StepMessage:
    return StepMessage("r", number, version, num_drafted, list(emitted), 0.01, 1, arrays())


def finished(running: RunningGeneration, *messages: StepMessage, reason: str = "length") -> Generation:
    for message in messages:
        running.add_message(message)
    event = running.finished(running.add_output(()), reason, None, 0)
    assert event.generation is not None
    return event.generation


def test_rounds_versions_and_counts_follow_from_the_messages() -> None:
    running = RunningGeneration(REQUEST)
    for part in ((4,), (5, 6, 7), (8, 9)):
        running.add_output(part)
    generation = finished(running, step(0, 0, 4, num_drafted=0), step(1, 0, 5, 6, 7), step(2, 1, 8, 9))
    assert generation.output_token_ids == [4, 5, 6, 7, 8, 9]
    assert generation.draft_versions == [VersionSpan(0, 0, 4), VersionSpan(1, 4, 6)]
    assert (generation.num_rounds, generation.num_drafted) == (3, 4)
    assert (generation.num_attempted, generation.num_accepted) == (2 + 2, 2 + 1)
    assert generation.accepted_histogram == [1, 1, 1]
    assert [each.start for each in generation.captured_rounds] == [3, 4, 7]


def test_positions_behind_the_cut_were_not_attempted() -> None:
    running = RunningGeneration(REQUEST)
    running.add_output((4,))
    running.add_output((5,))  # vLLM cut the text after the first of three
    generation = finished(running, step(0, 0, 4, num_drafted=0), step(1, 0, 5, 6, 7))
    assert (generation.num_attempted, generation.num_accepted) == (1, 1)
    assert len(generation.captured_rounds[-1].emitted_target_logprobs_C) == 1


def test_a_lost_message_costs_the_record_from_there_on_and_no_token() -> None:
    running = RunningGeneration(REQUEST)
    running.add_output(
        (
            4,
            5,
            6,
            7,
            8,
            9,
        )
    )
    generation = finished(running, step(0, 0, 4, num_drafted=0), step(2, 0, 8, 9))
    assert generation.output_token_ids == [4, 5, 6, 7, 8, 9]
    assert [each.start for each in generation.captured_rounds] == [3]
    assert not running.is_told()


def test_its_noise_is_not_ours() -> None:
    """A record of seeded text would be taken for one drawn with the engine's own shared noise."""
    generation = finished(RunningGeneration(REQUEST))
    assert generation.sampling == replace(REQUEST.sampling, seed=None)
    assert generation.sampling.mode == "standard"


def test_a_stop_names_the_token_that_ended_it() -> None:
    running = RunningGeneration(REQUEST)
    running.add_output(
        (
            4,
            2,
        )
    )
    assert finished(running, reason="stop").stop_token_id == 2


def test_log_probabilities_are_cut_to_what_was_asked() -> None:
    asked = replace(REQUEST, sampling=replace(REQUEST.sampling, logprobs=1))
    entry = {
        4: SimpleNamespace(logprob=-2.0, rank=3),
        9: SimpleNamespace(logprob=-0.1, rank=1),
    }
    event = RunningGeneration(asked).add_output((4,), [entry])
    assert event.logprobs == (-2.0,) and event.top_logprobs == (((9, -0.1),),)


def entry(own: int, logprob: float, rank: int, *top: float) -> dict[int, SimpleNamespace]:
    """As vLLM has it: the prompt's own token, then the likeliest by rank, which are 10, 11, …"""
    found = {own: SimpleNamespace(logprob=logprob, rank=rank)}
    for number, value in enumerate(top):
        found[10 + number] = SimpleNamespace(logprob=value, rank=number + 1)
    return found


def test_the_log_probabilities_of_a_prompt_come_with_the_first_part() -> None:
    asked = replace(REQUEST, sampling=replace(REQUEST.sampling, prompt_logprobs=2))
    running = RunningGeneration(asked)
    told = [None, entry(2, -5.0, 9, -0.5, -1.0), {**entry(3, -7.0, 30, -0.25, -2.0)}]
    first = running.add_output((4,), None, told)
    assert running.add_output((5,), None, []).prompt_logprobs is None
    generation = finished(running)
    found = generation.prompt_logprobs
    assert found is not None and first.prompt_logprobs is found
    assert found.logprobs_T.tolist() == [-5.0, -7.0] and found.ranks_T.tolist() == [9, 30]
    assert found.top_logprobs(2) == [((10, -0.5), (11, -1.0)), ((10, -0.25), (11, -2.0))]
    none = RunningGeneration(replace(asked, prompt_token_ids=(1,))).add_output((4,), None, [None])
    assert none.prompt_logprobs is not None and len(none.prompt_logprobs.logprobs_T) == 0


def test_the_token_that_vllm_draws_for_a_request_for_none_is_dropped() -> None:
    running = RunningGeneration(replace(REQUEST, sampling=replace(REQUEST.sampling, max_tokens=0)))
    assert running.add_output((2,)).token_ids == ()
    generation = finished(running, step(0, 0, 2), reason="stop")
    assert (generation.finish_reason, generation.stop_token_id) == ("length", None)
    assert (generation.output_token_ids, generation.captured_rounds, generation.num_rounds) == ([], [], 0)
