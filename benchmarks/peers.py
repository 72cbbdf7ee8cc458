"""What a user of transformers has instead: the same models, on the same prompts, through its own entries.

Assisted generation and prompt lookup take one sequence at a time, so prompts that are asked at once run one
after another there.
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from benchmarks.modes import FIXED_DRAFT_TOKENS, Mode, ModeOutcome, ModeUnavailableError

LOOKUP_TOKENS = 10
"""Of prompt lookup: the default of its candidate generator, as its n-gram size is."""
_SILENT_S = 120.0
_NO_TOKEN = -1
"""What continuous batching takes for "no end of text"."""


def make_peers(
    target: nn.Module, draft: nn.Module | None, *, concurrency: int, prompt_tokens: int, num_tokens: int
) -> dict[str, Callable[[], Mode]]:
    """By mode, makers of it; each has a target of its own. `concurrency`: the most that is asked at once."""
    return {
        "transformers_generate": lambda: Generate(target, batched=True),
        "transformers_assisted": lambda: Generate(target, assistant=_assistant(draft)),
        "transformers_assisted_fixed": lambda: Generate(
            target,
            assistant=_assistant(
                draft,
                num_assistant_tokens=FIXED_DRAFT_TOKENS,
                num_assistant_tokens_schedule="constant",
                assistant_confidence_threshold=0.0,
            ),
        ),
        "transformers_prompt_lookup": lambda: Generate(target, prompt_lookup_num_tokens=LOOKUP_TOKENS),
        "transformers_continuous": lambda: Continuous(target, concurrency, prompt_tokens, num_tokens),
    }


class Generate:
    """`model.generate`, on all prompts as one batch or on one after another."""

    def __init__(
        self, target: nn.Module, *, batched: bool = False, assistant: Any | None = None, **options: Any
    ) -> None:
        self._model = _endless(target)
        self._batched, self._assistant, self._options = batched, assistant, options

    def generate(
        self, prompts: list[list[int]], *, concurrency: int, num_tokens: int, temperature: float
    ) -> ModeOutcome:
        config = generation_config(num_tokens, temperature, **self._options)
        size = concurrency if self._batched else 1
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        began_s = time.perf_counter()
        outputs = [token_ids for batch in batches for token_ids in self._one_call(batch, config)]
        return ModeOutcome(time.perf_counter() - began_s, outputs)

    def _one_call(self, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
        inputs_BT, mask_BT = left_padded(prompts)
        outputs_BT = self._model.generate(
            inputs_BT,
            attention_mask=mask_BT,
            generation_config=config,
            assistant_model=self._assistant,
        )
        outputs: list[list[int]] = outputs_BT[:, inputs_BT.shape[1] :].tolist()
        return outputs

    def close(self) -> None:
        pass


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, as `generate` takes a ragged batch."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    token_ids = [[0] * missing + prompt for missing, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * missing + [1] * (longest - missing) for missing in padding]
    return torch.tensor(token_ids), torch.tensor(mask)


class Continuous:
    """transformers' continuous batching; its manager runs before the clock does, one for each temperature."""

    def __init__(self, target: nn.Module, concurrency: int, prompt_tokens: int, num_tokens: int) -> None:
        self._model = _endless(target)
        self._hints = WorkloadHints(
            max_prompt_length=prompt_tokens, max_generated_length=num_tokens, num_requests=concurrency
        )
        self._manager: Any = None
        self._temperature = -1.0

    def generate(
        self, prompts: list[list[int]], *, concurrency: int, num_tokens: int, temperature: float
    ) -> ModeOutcome:
        self._be_ready(temperature)
        began_s = time.perf_counter()
        request_ids = self._manager.add_requests(prompts[:concurrency], max_new_tokens=num_tokens)
        results: dict[str, list[int]] = {}
        while len(results) < len(prompts):
            result = self._manager.get_result(timeout=_SILENT_S)
            if result is None or result.error is not None:
                raise ModeUnavailableError(
                    f"continuous batching gave no answer: {result.error if result else 'it fell silent'}"
                )
            if result.is_finished():
                results[result.request_id] = list(result.generated_tokens)
                following = prompts[len(request_ids) : len(request_ids) + 1]
                request_ids += self._manager.add_requests(following, max_new_tokens=num_tokens)
        wall_s = time.perf_counter() - began_s
        return ModeOutcome(wall_s, [results[request_id] for request_id in request_ids])

    def _be_ready(self, temperature: float) -> None:
        if self._temperature == temperature:
            return
        self.close()
        config = generation_config(self._hints.max_generated_length, temperature)
        config.eos_token_id = _NO_TOKEN
        self._manager = self._model.init_continuous_batching(config, _room(self._hints), self._hints)
        self._manager.warmup()
        self._manager.start()
        self._temperature = temperature

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=5, hard_stop=True)
            self._manager.destroy()
            self._manager, self._temperature = None, -1.0


def _room(hints: WorkloadHints) -> ContinuousBatchingConfig:
    """A cache for all requests twice over; left alone it would take and clear nearly all memory."""
    room = ContinuousBatchingConfig(max_requests_per_batch=hints.num_requests)
    blocks_each = -(-(hints.max_prompt_length + hints.max_generated_length) // room.page_size)
    room.num_blocks = 2 * hints.num_requests * (blocks_each + 1)
    room.max_batch_tokens = max(512, hints.num_requests * hints.max_prompt_length)
    return room


def generation_config(num_tokens: int, temperature: float, **options: Any) -> GenerationConfig:
    """No end of text; sampling from the whole distribution, as the engine does, or greedy."""
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=num_tokens,
        pad_token_id=0,
        **(sampled if temperature else {"do_sample": False}),
        **options,
    )


def _endless(model: nn.Module) -> Any:
    """A copy that knows no end of text, or it would be filled in from the model's own settings."""
    copied: Any = copy.deepcopy(model)
    copied.generation_config = GenerationConfig()
    copied.config.eos_token_id = None
    return copied


def _assistant(draft: nn.Module | None, **options: Any) -> Any:
    """A copy, because assisted generation keeps state on it."""
    if draft is None:
        raise ModeUnavailableError("there is no adapted draft to assist with")
    assistant = _endless(draft)
    assistant.generation_config = GenerationConfig(pad_token_id=0, **options)
    return assistant
