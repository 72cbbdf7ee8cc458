"""A runner's logits are the model's own, whichever slot, chunk or code of the pass they come from."""

import pytest
import torch
from torch import Tensor, nn

from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_pass import SlotPass
from serving.engine.passes.static_check import static_pass_of
from tests.support.pass_shapes import shaped
from tests.support.tiny_models import tiny_model

VOCAB, MAX_LEN = 32, 24
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_model("llama", 2, VOCAB).eval()


@pytest.fixture
def runner(model: nn.Module) -> Runner:
    return Runner(model, num_slots=3, max_seq_len=MAX_LEN)


@torch.inference_mode()
def logits_of(model: nn.Module, text: list[int]) -> Tensor:
    """[T, V], without any cache."""
    found: Tensor = model(input_ids=torch.tensor([text])).logits[0].float()
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_prompt_in_chunks_has_the_logits_of_the_whole(model: nn.Module, runner: Runner) -> None:
    whole = logits_of(model, TEXT)
    first = runner.prefill(1, TEXT[:4], 0, logits_to_keep=0)
    second = runner.prefill(1, TEXT[4:], 4, logits_to_keep=0)
    close(torch.cat([first[0], second[0]]), whole)
    assert first.dtype == torch.float32
    last = runner.prefill(2, TEXT, 0)
    assert last.shape == (1, 1, VOCAB)
    close(last[0, 0], whole[-1])


def test_rows_of_a_batch_stand_at_their_own_positions_and_see_their_own_slots(
    model: nn.Module, runner: Runner
) -> None:
    texts = [TEXT[:7], TEXT[2:5]]
    for row, text in enumerate(texts):
        runner.prefill(1 + row, text[:-1], 0)
    tokens_BT = torch.tensor([[text[-1]] for text in texts])
    positions_BT = torch.tensor([[len(text) - 1] for text in texts])
    logits_BTV = runner.forward(tokens_BT, positions_BT, kv_len=7, first_slot=1)
    for row, text in enumerate(texts):
        close(logits_BTV[row, 0], logits_of(model, text)[-1])
    assert not runner.cache.columns(0, 0, MAX_LEN).any(), "a slot outside the pass was written to"


def test_a_token_sees_no_column_after_its_own(model: nn.Module, runner: Runner) -> None:
    """What was drafted and rejected still lies there."""
    runner.prefill(0, TEXT, 0)
    again = torch.tensor([[7]])
    logits_BTV = runner.forward(again, torch.tensor([[4]]), kv_len=len(TEXT))
    close(logits_BTV[0, 0], logits_of(model, [*TEXT[:4], 7])[-1])


def test_padding_changes_no_logits_and_no_column_but_the_trash(model: nn.Module, runner: Runner) -> None:
    runner.prefill(0, TEXT[:5], 0)
    before = runner.cache.columns(0, 0, MAX_LEN).clone()
    trash = runner.cache.trash_column
    tokens_BT, positions_BT = torch.tensor([[0, 0, TEXT[5]]]), torch.tensor([[trash, trash, 5]])
    logits_BTV = runner.forward(tokens_BT, positions_BT, kv_len=6, logits_to_keep=1)
    assert logits_BTV.shape == (1, 1, VOCAB)
    close(logits_BTV[0, 0], logits_of(model, TEXT[:6])[-1])
    after = runner.cache.columns(0, 0, MAX_LEN)
    assert torch.equal(after[:, :, :, :5], before[:, :, :, :5])
    assert after[:, :, :, 5].any() and not after[:, :, :, 6:].any()


def test_a_wider_vocabulary_of_the_pair_is_impossible_tokens_and_a_narrower_one_is_cut(
    model: nn.Module,
) -> None:
    whole = logits_of(model, TEXT)[-1]
    wide = Runner(model, num_slots=1, max_seq_len=MAX_LEN, vocab_size=VOCAB + 3)
    logits_V = wide.prefill(0, TEXT, 0)[0, 0]
    close(logits_V[:VOCAB], whole)
    assert logits_V[VOCAB:].tolist() == [-torch.inf] * 3
    narrow = Runner(model, num_slots=1, max_seq_len=MAX_LEN, vocab_size=VOCAB - 2)
    close(narrow.prefill(0, TEXT, 0)[0, 0], whole[:-2])


def test_an_id_that_only_the_partner_has_is_read_as_the_last_embedding(model: nn.Module) -> None:
    wide = Runner(model, num_slots=1, max_seq_len=MAX_LEN, vocab_size=VOCAB + 3)
    logits_V = wide.prefill(0, [*TEXT, VOCAB + 2], 0)[0, 0]
    close(logits_V[:VOCAB], logits_of(model, [*TEXT, VOCAB - 1])[-1])


def test_runners_that_share_a_cache_continue_each_other_and_a_twin_does_not(
    model: nn.Module, runner: Runner
) -> None:
    other = Runner(model, num_slots=3, max_seq_len=MAX_LEN, cache=runner.cache)
    runner.prefill(0, TEXT[:6], 0)
    close(other.prefill(0, TEXT[6:], 6)[0, 0], logits_of(model, TEXT)[-1])
    wide = Runner(model, num_slots=3, max_seq_len=MAX_LEN, vocab_size=VOCAB + 3)
    wide.compiled = SlotPass(model, MAX_LEN)
    twin = wide.twin()
    assert (twin.model, twin.num_slots, twin.max_seq_len) == (model, 3, MAX_LEN)
    assert (twin.vocab_size, twin.compiled) == (VOCAB + 3, None)
    twin.prefill(0, TEXT, 0)
    assert twin.cache.columns(0, 0, len(TEXT)).any() and not wide.cache.columns(0, 0, len(TEXT)).any()


@pytest.mark.parametrize("code", ["compiled", "static"])
def test_whatever_runs_a_pass_its_logits_are_the_models(model: nn.Module, runner: Runner, code: str) -> None:
    runner.prefill(0, TEXT[:6], 0)
    runner.prefill(1, TEXT[1:4], 0)
    if code == "compiled":
        runner.compiled = SlotPass(model, MAX_LEN)
    else:
        runner.static = static_pass_of(runner)
    trash = runner.cache.trash_column
    tokens_BT = torch.tensor([[TEXT[6], TEXT[7]], [0, TEXT[4]]])
    positions_BT = torch.tensor([[6, 7], [trash, 3]])
    logits_BTV = runner.forward(tokens_BT, positions_BT, kv_len=8).clone()
    close(logits_BTV[0], logits_of(model, TEXT[:8])[-2:])
    close(logits_BTV[1, 1], logits_of(model, TEXT[1:5])[-1])
    kept_BTV = runner.forward(tokens_BT, positions_BT, kv_len=8, logits_to_keep=1)
    close(kept_BTV, logits_BTV[:, 1:])


def test_a_static_pass_runs_what_it_holds_and_leaves_the_rest_to_the_model(
    model: nn.Module, runner: Runner
) -> None:
    runner.static = static_pass_of(runner)
    assert not runner.static.can_run(shaped(2, 1, 1))
    assert not runner.static.can_run(shaped(0, 1, len(TEXT)))
    close(runner.prefill(2, TEXT[:1], 0)[0], logits_of(model, TEXT[:1]))
    close(runner.prefill(0, TEXT, 0)[0, 0], logits_of(model, TEXT)[-1])
