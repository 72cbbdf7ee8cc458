"""A start for a part of the target: the linear map from its last states to the target's, in closed form.

A ridge regression on a few generic texts, forward passes alone. It is done once for each target and part, and
kept in a cache folder; replicas and learner of one machine find the same map. Knows no records. The map only
decides where learning starts: it is no part of any promise.
"""

import fcntl
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from serving.cache_folders import cache_folder
from serving.models.kept_head import IDS, count_tokens, kept_head, most_used
from serving.models.target_part import map_of

_log = logging.getLogger(__name__)

NUM_TEXTS = 60
TEXT_TOKENS = 256
_TEXT_CHARS = 1600
_EVERY_HELD_OUT = 6
"""Of so many texts one chooses the strength of the ridge."""
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Relative to the mean square of a state's entries."""
_KEY = "map"


def generic_texts(count: int = NUM_TEXTS) -> list[str]:
    """English and code that come with every Python: the language reference, and modules of the standard
    library, in turn."""
    from pydoc_data.topics import topics

    english = [topics[name] for name in sorted(topics)]
    folder = Path(contextmanager.__code__.co_filename).parent
    code = [path.read_text("utf-8", "replace") for path in sorted(folder.glob("[a-z]*.py"))]
    long_enough = [
        [text[:_TEXT_CHARS] for text in texts if len(text) >= _TEXT_CHARS] for texts in (english, code)
    ]
    half = count // 2
    return [*_spread(long_enough[0], count - half), *_spread(long_enough[1], half)]


def fitted(part: nn.Module, target: nn.Module, tokenizer: Any | None, revision: str) -> bool:
    """Set the part's map, and the tokens that its head keeps, from the cache or by a fit. False, and both
    stay as they are, for a target without a tokenizer, which can read no text. `revision`: the part's."""
    if tokenizer is None:
        _log.info(
            "no tokenizer, so no text to fit the draft to: it starts from the target's layers as they are"
        )
        return False
    file = cache_folder("parts") / f"{revision[:32]}.safetensors"
    with _locked(file):
        found = _read(file, part)
        if found is None:
            texts = [
                tokenizer.encode(text, add_special_tokens=False)[:TEXT_TOKENS] for text in generic_texts()
            ]
            found = {_KEY: fit_map(part, target, texts)} | _kept(part, texts)
            aside = file.with_suffix(".part")
            save_file(found, aside)
            aside.replace(file)
    with torch.no_grad():
        map_of(part).weight.copy_(found[_KEY])
    if (head := kept_head(part)) is not None:
        head[1].keep(found[IDS])
    return True


def _kept(part: nn.Module, texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The ids of the tokens that the texts use most, as many as the part's head keeps; empty where that keeps
    all."""
    if (found := kept_head(part)) is None:
        return {}
    _, head = found
    return {IDS: most_used(count_tokens(texts, head.vocab_size), len(head.token_ids))}


@torch.inference_mode()
def fit_map(part: nn.Module, target: nn.Module, texts: Sequence[Sequence[int]]) -> Tensor:
    """The map [H, H], float32 on the CPU, that brings the part's last states nearest to the target's. Of some
    strengths of the ridge, which pulls towards the identity, it takes the one whose greedy choices agree most
    often with the target's on texts left out of the fit."""
    began_s = told_s = time.monotonic()
    pairs: list[tuple[Tensor, Tensor]] = []
    for number, token_ids in enumerate(texts):
        pairs.append((_states(part, token_ids), _states(target, token_ids)))
        if time.monotonic() - told_s > 5.0:
            told_s = time.monotonic()
            _log.info("fitting the draft's start: %d of %d texts", number + 1, len(texts))
    held_out = pairs[::_EVERY_HELD_OUT] if len(pairs) >= _EVERY_HELD_OUT else pairs
    used = [pair for number, pair in enumerate(pairs) if number % _EVERY_HELD_OUT] or pairs
    seen_NH = torch.cat([own_TH for own_TH, _ in used]).double()
    wanted_NH = torch.cat([target_TH for _, target_TH in used]).double()
    square_HH, cross_HH = seen_NH.T @ seen_NH, seen_NH.T @ (wanted_NH - seen_NH)
    identity_HH = torch.eye(len(square_HH), dtype=torch.float64)
    scale = float(square_HH.diagonal().mean()) or 1.0
    head: Any = target.get_output_embeddings()  # type: ignore[operator]
    chosen = [(own_TH, _choices(head, target_TH)) for own_TH, target_TH in held_out]
    best_map_HH = identity_HH.float()
    best = at_first = _agreement(head, best_map_HH, chosen)
    for ridge in _RIDGES:
        change_HH = torch.linalg.solve(square_HH + ridge * scale * identity_HH, cross_HH)
        map_HH = (identity_HH + change_HH.T).float()
        agreement = _agreement(head, map_HH, chosen)
        if agreement > best:
            best, best_map_HH = agreement, map_HH
    _log.info(
        "the draft's start was fitted in %.0f s: it agrees with the target on %.0f %% of %d tokens left out "
        "(%.0f %% before)",
        time.monotonic() - began_s,
        100 * best,
        sum(len(choice_T) for _, choice_T in chosen),
        100 * at_first,
    )
    return best_map_HH


def _states(model: nn.Module, token_ids: Sequence[int]) -> Tensor:
    """What the model's head would get, [T, H] in float32 on the CPU."""
    device = next(model.parameters()).device
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    output = decoder(input_ids=torch.tensor([list(token_ids)], device=device), use_cache=False)
    states_TH: Tensor = output.last_hidden_state[0].float().cpu()
    return states_TH


def _agreement(head: Any, map_HH: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Share of positions at which the mapped state's likeliest token is the target's; `pairs`: states and the
    target's tokens."""
    hits = [_choices(head, own_TH @ map_HH.T) == choice_T for own_TH, choice_T in pairs]
    return float(torch.cat(hits).float().mean()) if hits else 0.0


def _choices(head: Any, states_TH: Tensor) -> Tensor:
    """The likeliest token [T] after each state."""
    choice_T: Tensor = head(states_TH.to(head.weight.device, head.weight.dtype)).argmax(-1)
    return choice_T


def _read(file: Path, part: nn.Module) -> dict[str, Tensor] | None:
    """The start in a cache file; None if there is none that fits."""
    try:
        found = load_file(file)
    except (OSError, SafetensorError):
        return None
    map_HH, kept = found.get(_KEY), kept_head(part)
    has_map = map_HH is not None and map_HH.shape == map_of(part).weight.shape and map_HH.isfinite().all()
    has_ids = kept is None or (IDS in found and not kept[1].fault(found[IDS]))
    if has_map and has_ids:
        return found
    _log.warning("%s holds no start of this part; it is fitted again", file)
    return None


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time: replicas and learner start together, and the others wait for the first."""
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """`count` of them, evenly."""
    return [texts[number * len(texts) // count] for number in range(min(count, len(texts)))]
