"""Checkpoints that are damaged, foreign or unsafe are refused by name before a weight is read."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    PreTrainedConfig,
    Qwen2AudioConfig,
    ViTConfig,
)

from deploy.errors import ModelPairError
from deploy.settings import Settings
from deploy.wiring import check_models
from serving.engine.passes.runner import Runner
from serving.models.errors import UnsupportedModelError
from serving.models.loading import load_draft, load_model, load_outline, load_pair
from serving.models.refusals import check_device
from serving.runner_check import prepare_runner
from tests.deploy.everdraft_process import ROOT
from tests.support.tiny_models import save_tiny_pair

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4096\n"
UP = "model.layers.1.mlp.up_proj.weight"
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a target and a draft that are as they should be."""
    target, draft = save_tiny_pair(tmp_path_factory.mktemp("pair"))
    return Path(target), Path(draft)


@pytest.fixture
def folder(whole: tuple[Path, Path], tmp_path: Path) -> Path:
    """A target to damage."""
    return Path(shutil.copytree(whole[0], tmp_path / "damaged"))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def pickle_weights(folder: Path, extra: dict[str, Any] | None = None) -> Path:
    """The same weights as torch saves them."""
    file = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors") | (extra or {}), file)
    (folder / "model.safetensors").unlink()
    return file


def shard(folder: Path) -> list[Path]:
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    return sorted(folder.glob("model-*.safetensors"))


def lose_tensors(folder: Path) -> None:
    change_tensors(folder, lambda tensors: (tensors.pop(UP), tensors.pop("lm_head.weight")))


def lose_a_tensor_of_a_pickle(folder: Path) -> None:
    lose_tensors(folder)
    pickle_weights(folder)


def add_layer(folder: Path) -> None:
    change_tensors(
        folder, lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": torch.ones(3)})
    )


def add_bias(folder: Path) -> None:
    change_tensors(
        folder, lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)})
    )


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def leave_gguf(folder: Path) -> None:
    empty(folder)
    (folder / "tiny.gguf").write_bytes(b"GGUF")


def leave_adapter(folder: Path) -> None:
    empty(folder)
    (folder / "adapter_config.json").write_text("{}")


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "tensors are missing": (lose_tensors, ["lacks 2 of its tensors", "'lm_head.weight'", UP, "random"]),
    "tensors of a pickle are missing": (lose_a_tensor_of_a_pickle, ["lacks 2 of its tensors", UP, "random"]),
    "layers too many": (
        add_layer,
        ["'model.layers.7.mlp.up_proj.weight'", "num_hidden_layers=3", "left out"],
    ),
    "a bias the class lacks": (add_bias, ["1 tensors", "q_proj.bias", "LlamaForCausalLM", "silently wrong"]),
    "another shape": (lambda f: change_config(f, vocab_size=400), ["[320, 32], not [400, 32]", "random"]),
    "a shard is absent": (lambda f: shard(f)[1].unlink(), ["lacks 1 of the", "'model-00002-of-", "random"]),
    "a shard is cut": (lambda f: truncate(shard(f)[0]), ["model-00001-of-", "cut short"]),
    "an index without files": (
        lambda f: (shard(f), (f / "model.safetensors.index.json").write_text("{}")),
        ["model.safetensors.index.json without weight_map", "cannot be found"],
    ),
    "an index is lost": (
        lambda f: (shard(f), (f / "model.safetensors.index.json").unlink()),
        ["has none of model.safetensors", "no weights to load", "and "],
    ),
    "weights are cut": (lambda f: truncate(f / "model.safetensors"), ["model.safetensors is cut short"]),
    "a pickle is cut": (lambda f: truncate(pickle_weights(f)), ["pytorch_model.bin is cut short"]),
    "a pickle holds code": (
        lambda f: pickle_weights(f, {"x": eval}),
        ["asks for eval", "never run"],
    ),
    "weights are a pointer": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        ["pointer of git's large-file storage in place of model.safetensors", "git lfs pull"],
    ),
    "weights are absent": (
        lambda f: (f / "model.safetensors").unlink(),
        ["has none of", "no weights to load"],
    ),
    "the folder is empty": (empty, ["without config.json", "it is empty"]),
    "the folder holds GGUF": (leave_gguf, ["'tiny.gguf'", "give the path of one GGUF file"]),
    "the folder holds an adapter": (leave_adapter, ["without config.json", "an adapter is no model"]),
    "no configuration": (lambda f: (f / "config.json").unlink(), ["without config.json", "it holds"]),
    "no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ["config.json is no JSON", "cannot be loaded"],
    ),
    "no object": (lambda f: (f / "config.json").write_text("[1]"), ["config.json is no JSON object"]),
    "a configuration of nonsense": (
        lambda f: change_config(f, hidden_size="wide"),
        ["config.json", "hidden_size"],
    ),
    "an unknown type": (
        lambda f: change_config(f, model_type="mine"),
        ["model_type='mine'", "cannot be loaded"],
    ),
    "code of its own": (
        lambda f: change_config(f, model_type="mine", auto_map={"AutoConfig": "code.Mine"}),
        ["code.Mine", "never run", "could do anything"],
    ),
    "a packing nobody knows": (
        lambda f: change_config(f, quantization_config={"quant_method": "zip"}),
        ["quant_method='zip'", "cannot be loaded here"],
    ),
    "a tokenizer is cut": (
        lambda f: truncate(f / "tokenizer.json"),
        ["tokenizer that cannot be loaded", "cannot be read or written"],
    ),
    "a tokenizer is a pointer": (
        lambda f: (f / "tokenizer.json").write_text(POINTER),
        ["in place of tokenizer.json", "git lfs pull"],
    ),
    "a tokenizer with code of its own": (
        lambda f: (f / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}})
        ),
        ["tokenizer that cannot be loaded", "custom code"],
    ),
}


def refused(folder: Path | str, load: Callable[[str], object], fragments: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        load(str(folder))
    message = str(refusal.value)
    assert "\n" not in message
    assert [part for part in [str(folder), *fragments] if part not in message] == [], message


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_before_weights_are_read(case: str, folder: Path) -> None:
    damage, fragments = DAMAGE[case]
    damage(folder)
    refused(folder, load_pair, fragments)
    if "tokenizer" not in case:
        refused(folder, load_outline, fragments)
    with pytest.raises(ModelPairError, match="nothing was started") as refusal:
        check_models(Settings.model_validate({"serving": {"target": str(folder)}}))
    assert fragments[0] in str(refusal.value)


def test_a_damaged_draft_is_refused_as_a_target_is(whole: tuple[Path, Path], tmp_path: Path) -> None:
    draft = Path(shutil.copytree(whole[1], tmp_path / "draft"))
    change_tensors(draft, lambda tensors: tensors.pop("model.norm.weight"))
    refused(draft, load_draft, ["lacks 1 of its tensors", "'model.norm.weight'"])
    refused(draft, lambda name: load_pair(str(whole[0]), name), ["lacks 1 of its tensors"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_in_target_and_draft(
    value: float, folder: Path, whole: tuple[Path, Path]
) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        for name in (UP, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            tensors[name].view(-1)[-1] = value

    change_tensors(folder, poison)
    fragments = ["4 tensors that are not finite", "dtype='float32'", "'lm_head.weight'", "and 1 more", "says"]
    refused(folder, load_pair, fragments)
    refused(folder, load_draft, fragments)
    refused(folder, lambda name: load_pair(str(whole[0]), name), fragments)


def test_a_dtype_too_narrow_for_the_weights_is_refused_by_name(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors[UP].view(-1)[0].fill_(1e5))
    refused(folder, lambda name: load_model(name, dtype="float16"), ["dtype='float16'", UP, "65504"])
    wide = dict(load_model(str(folder), dtype="bfloat16").named_parameters())[UP]
    assert wide.dtype == torch.bfloat16 and float(wide.view(-1)[0]) == pytest.approx(1e5, rel=0.01)


def test_finite_weights_that_answer_nan_are_refused(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    model = load_model(str(folder))
    refused(
        folder,
        lambda name: prepare_runner(Runner(model, num_slots=1, max_seq_len=64), name),
        ["logits that are not finite", "torch.float32"],
    )


def test_layers_that_cache_another_shape_than_the_configuration_says_are_refused(folder: Path) -> None:
    model = load_model(str(folder))
    model.config.head_dim = 4  # type: ignore[union-attr]
    runner = Runner(model, num_slots=1, max_seq_len=64)
    refused(folder, lambda name: prepare_runner(runner, name), ["cannot run through the slot cache"])


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        (BloomConfig(), ["(bloom)", "ALiBi", "wrong"]),
        (FalconConfig(alibi=True), ["(falcon)", "ALiBi", "wrong"]),
        (MptConfig(), ["(mpt)", "ALiBi", "wrong"]),
        (DeepseekV3Config(), ["key heads of 192", "value heads of 128", "head_dim=64", "cannot be served"]),
        (LlavaConfig(), ["(llava)", "vision_config", "only models of text"]),
        (Gemma3Config(), ["(gemma3)", "vision_config", "only models of text"]),
        (Qwen2AudioConfig(), ["(qwen2_audio)", "audio_config", "only models of text"]),
        (ViTConfig(), ["(vit)", "no causal language model", "no text"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_slot_cache_cannot_hold_is_refused_by_its_configuration(
    config: PreTrainedConfig, fragments: list[str], tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    refused(tmp_path, load_pair, fragments)
    refused(tmp_path, load_outline, fragments)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="the library is there")
def test_packed_weights_whose_library_is_not_installed_are_refused(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    refused(folder, load_pair, ["quant_method='bitsandbytes'", "cannot be loaded here"])


@pytest.mark.parametrize("device", ["gpu", "mps", "meta", "", "cuda:", "cuda:x", "cuda:99"])
def test_a_device_that_is_none_is_refused_before_models_are_read(device: str, tmp_path: Path) -> None:
    fragments = [f"device={device!r}", "nothing can run on it"]
    refused("", lambda _: load_pair(str(tmp_path / "none"), device=device), fragments)
    serving = {"target": str(tmp_path / "none"), "device": device}
    with pytest.raises(ModelPairError, match="nothing was started"):
        check_models(Settings.model_validate({"serving": serving}))


def test_a_device_of_another_machine_is_left_to_that_machine() -> None:
    def refusal(device: str, *, is_here: bool) -> str:
        try:
            check_device(device, is_here=is_here)
        except UnsupportedModelError as error:
            return str(error)
        return ""

    assert "is not on this machine" in refusal("cuda:99", is_here=True)
    assert refusal("cuda:99", is_here=False) == ""
    assert "is none of cpu, cuda and cuda:N" in refusal("gpu", is_here=False), "its name is judged anyway"


@pytest.mark.parametrize("name", ["none", "tiny.gguf", "a/b/c", "./none", "a b", "a--b"])
def test_a_path_that_is_no_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    if name == "none" or name.endswith("gguf"):
        name = str(tmp_path / name)
    refused(name, load_pair, ["everdraft convert" if name.endswith("gguf") else "is no folder"])


def test_a_hub_id_is_refused_at_once_when_the_hub_is_switched_off() -> None:
    refused("someone/no-such-model", load_pair, ["is no folder here", "was not downloaded before"])


@pytest.fixture
def dead_hub() -> Iterator[tuple[str, list[int]]]:
    """An address that hangs up on everyone, and a list with an entry for each who called."""
    calls: list[int] = []
    server = socket.create_server(("127.0.0.1", 0))

    def hang_up() -> None:
        while True:
            try:
                caller, _ = server.accept()
            except OSError:
                return
            calls.append(1)
            caller.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def test_a_hub_that_is_away_is_asked_once_and_what_was_downloaded_before_is_used(
    whole: tuple[Path, Path], dead_hub: tuple[str, list[int]], tmp_path: Path
) -> None:
    address, calls = dead_hub
    model = tmp_path / "hub" / "models--someone--tiny"
    snapshot = model / "snapshots" / ("a" * 40)
    shutil.copytree(whole[0], snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    script = (
        "from serving.models.loading import UnsupportedModelError, load_pair\n"
        "print(load_pair('someone/tiny').target_id)\n"
        "try: load_pair('someone/else')\n"
        "except UnsupportedModelError as error: print(error)"
    )
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, refusal = done.stdout.splitlines()
    assert found == "someone/tiny"
    assert "'someone/else' is no folder here, was not downloaded before" in refusal
    assert len(calls) == 2


@pytest.mark.parametrize("save", ["tied", "experts", "masks", "pickle", "shards", "next tokens", "bare"])
def test_checkpoints_that_are_whole_are_not_refused(save: str, folder: Path, tmp_path: Path) -> None:
    """Tied heads, stacked experts, constants of old classes, and layers that predict further tokens."""
    if save == "tied":
        config = LlamaConfig(**SMALL, intermediate_size=16, tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained(folder)
    elif save == "experts":
        config = MixtralConfig(
            **SMALL, intermediate_size=16, num_key_value_heads=2, num_local_experts=2, sliding_window=None
        )
        MixtralForCausalLM(config).save_pretrained(folder)
    elif save == "masks":
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_head=2, n_layer=2)).save_pretrained(folder)
        mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
        change_tensors(folder, lambda tensors: tensors.update(mask))
    elif save == "pickle":
        pickle_weights(folder)
    elif save == "shards":
        assert len(shard(folder)) > 1
    elif save == "next tokens":
        change_config(folder, num_nextn_predict_layers=1)
        further = {"model.layers.3.eh_proj.weight": torch.ones(3), "mtp.layers.0.norm.weight": torch.ones(3)}
        change_tensors(folder, lambda tensors: tensors.update(further))
    else:
        change_tensors(
            folder,
            lambda tensors: [
                tensors.__setitem__(key.removeprefix("model."), tensors.pop(key)) for key in list(tensors)
            ],
        )
    expected = [tuple(weight.shape) for weight in load_model(str(folder)).parameters()]
    assert [tuple(weight.shape) for weight in load_outline(str(folder)).parameters()] == expected
