"""What goes to vLLM, what is refused in its place, and what its processes find around them."""

import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.engine.request import GenerationRequest, SamplingParams, ending_ids
from serving.engines.async_llm import plugin
from serving.engines.async_llm.environment import environment_of_vllm, vllm_environment
from serving.engines.async_llm.sampling import check_speculation, from_vllm, vllm_arguments
from serving.models.errors import UnsupportedModelError
from serving.settings import ServingSettings


def asked(**params: Any) -> dict[str, Any]:
    request = GenerationRequest("r", (1, 2), SamplingParams(**params))
    return vllm_arguments(request, ending_ids(request.sampling, (2,), 50), "capture")


def test_end_of_text_stops_unless_it_is_ignored() -> None:
    assert asked(stop_token_ids=(7, 99))["stop_token_ids"] == [2, 7]
    assert asked(stop_token_ids=(7,), ignore_eos=True)["stop_token_ids"] == [7]


def test_what_goes_to_vllm_comes_back() -> None:
    params = SamplingParams(temperature=0.7, top_k=3, top_p=0.9, max_tokens=9, logit_bias={3: 1.0})
    given = {"logprobs": None, **vllm_arguments(GenerationRequest("r", (1,), params), (), "capture")}
    assert from_vllm(SimpleNamespace(**given)) == params


def test_the_log_probabilities_of_a_prompt_are_asked_for_and_one_token_in_any_case() -> None:
    given = asked(max_tokens=0, prompt_logprobs=3)
    assert (given["prompt_logprobs"], given["max_tokens"]) == (3, 1)
    assert asked(max_tokens=7)["prompt_logprobs"] is None


def test_capture_is_asked_for_by_request() -> None:
    request = GenerationRequest("r", (1,), SamplingParams(), capture=True)
    assert vllm_arguments(request, (), "capture")["extra_args"] == {"capture": True}
    assert asked()["extra_args"] is None


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"num_draft_tokens": 2}, "num_draft_tokens=2"),
        ({"min_p": 0.1}, "min_p"),
        ({"logit_bias": {3: 1.0}}, "logit_bias"),
    ],
)
def test_what_vllm_cannot_do_is_refused_by_name(params: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_speculation(SamplingParams(**params))


def test_a_version_that_was_not_tested_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, words in (("", "make setup-vllm"), ("0.99.0", "vLLM 0.99.0")):
        monkeypatch.setattr(plugin, "vllm_version", lambda found=found: found)
        with pytest.raises(UnsupportedModelError, match=words):
            plugin.require_vllm()


def test_a_torchvision_that_does_not_fit_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plugin, "vllm_version", lambda: plugin.TESTED[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(UnsupportedModelError, match=r"torchvision::nms.*pip uninstall torchvision"):
        plugin.require_vllm()
    (tmp_path / "torchvision.py").unlink()
    importlib.invalidate_caches()
    plugin.require_vllm()


def test_an_untested_vllm_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin, "vllm_version", lambda: "0.99.0")
    plugin.register()
    assert "0.99.0 was not tested" in caplog.text


def test_what_the_operator_set_stays() -> None:
    wanted = vllm_environment(2, 3 * 2**30 + 1, {"OMP_NUM_THREADS": "7"})
    assert wanted["VLLM_CPU_KVCACHE_SPACE"] == "4" and "OMP_NUM_THREADS" not in wanted


def test_other_processes_find_nothing_of_it() -> None:
    before = dict(os.environ)
    with environment_of_vllm(1, 1):
        assert os.environ["OMP_NUM_THREADS"] and os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    "changes",
    [{"max_route_drafts": 2}, {"speculation": "ngram"}, {"stopping": "entropy"}, {"untie_draft": True}],
)
def test_settings_that_vllm_cannot_follow_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.*engine='vllm'"):
        ServingSettings(target="t", engine="vllm", **changes)
    assert ServingSettings(target="t", engine="vllm").num_route_drafts == 0
