"""One choice of an answer, from the engine's events."""

import dataclasses

import pytest

from serving.api.choices import ChoiceDelta, ChoiceState
from serving.api.errors import ApiError
from serving.api.text_stream import TextStream
from serving.api.token_codec import TokenCodec
from serving.engine import Generation, SamplingParams, TokenEvent
from serving.engine.request import FinishReason
from tests.support.tiny_models import tiny_tokenizer

CODEC = TokenCodec(tiny_tokenizer())


def generation(finish_reason: FinishReason, stop_token_id: int | None = None) -> Generation:
    return Generation(
        request_id="r",
        choice_index=0,
        route="default",
        sampling=SamplingParams(),
        prompt_token_ids=(1,),
        output_token_ids=[],
        finish_reason=finish_reason,
        logprobs=[],
        top_logprobs=[],
        num_rounds=1,
        num_drafted=0,
        num_attempted=0,
        num_accepted=0,
        draft_versions=[],
        accepted_histogram=[1],
        stop_token_id=stop_token_id,
    )


def event(text: str, ended: Generation | None = None, *extra: int) -> TokenEvent:
    token_ids = (*CODEC.encode(text, add_special_tokens=False), *extra)
    return TokenEvent("r", token_ids, (-1.0,) * len(token_ids), (), ended)


def test_a_stop_string_asks_for_an_end_and_what_comes_after_it_is_no_answer() -> None:
    state = ChoiceState(0, TextStream(CODEC, ["!"]))
    first = state.push(event("ab!cd"))
    assert (first.text, len(first.token_ids), first.finish_reason, state.wants_cancel) == (
        "ab",
        3,
        None,
        True,
    )
    last = state.push(event("ef", generation("cancelled")))
    assert (last.text, last.token_ids, last.finish_reason, last.stop_reason) == ("", (), "stop", "!")
    assert (state.num_tokens, state.done, state.wants_cancel) == (3, True, False)


def test_a_stop_token_counts_but_is_not_shown() -> None:
    token = CODEC.encode("z", add_special_tokens=False)[0]
    for include, text in ((False, "ab"), (True, "abz")):
        state = ChoiceState(0, TextStream(CODEC), include_stop=include)
        delta = state.push(event("ab", generation("stop", token), token))
        assert (delta.text, len(delta.token_ids), len(delta.text_offsets)) == (text, 3, 3)
        assert (delta.finish_reason, delta.stop_reason) == ("stop", None)


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("cancelled", 503)])
def test_a_generation_that_broke_off_is_an_error(reason: FinishReason, status: int) -> None:
    state = ChoiceState(0, TextStream(CODEC))
    broken = dataclasses.replace(generation(reason), error="inner detail")
    with pytest.raises(ApiError) as failed:
        state.push(event("a", broken))
    assert failed.value.status == status
    assert "inner detail" not in str(failed.value)
    assert state.done


def test_joined_deltas_say_what_the_single_ones_say() -> None:
    state = ChoiceState(2, TextStream(CODEC))
    deltas = [state.push(event("é")), state.push(event("x", generation("length")))]
    joined = ChoiceDelta.join(deltas)
    assert (joined.index, joined.text, joined.finish_reason) == (2, "éx", "length")
    assert joined.token_ids == deltas[0].token_ids + deltas[1].token_ids
    assert len(joined.logprobs) == len(joined.text_offsets) == len(joined.token_ids)
