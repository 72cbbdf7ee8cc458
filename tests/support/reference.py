"""What the target alone would say, token by token, without engine, cache or batch.

Greedy and coupled output is one text; sampled output is a distribution, enumerated. Independent of the engine
but for the distribution's own code and the noise, which have plain references of their own in test_sampling.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from serving.engine import GenerationRequest
from serving.engine.noise import gumbel_noise, noise_key
from serving.engine.sampling import SamplingMetadata, processed_logprobs
from tests.support.automaton import Automaton
from tests.support.table_model import TableModel


def next_distribution(
    model: TableModel, request: GenerationRequest, stop_ids: Collection[int], output: Sequence[int]
) -> Tensor:
    """Log-probabilities [V] of the token after `output` under the request's final distribution."""
    params = request.sampling
    logits_V = _processed(model.logits_after([*request.prompt_token_ids, *output]), request, output)
    if len(output) < params.min_tokens:
        logits_V[list(stop_ids)] = -torch.inf
    if isinstance(params.constraint, Automaton):
        allowed = set(params.constraint.allows(output))
        logits_V[[token for token in range(len(logits_V)) if token not in allowed]] = -torch.inf
    row = (params.temperature, params.top_k, params.top_p, params.min_p)
    return processed_logprobs(logits_V[None, None], SamplingMetadata.stack([row]))[0, 0]


def _processed(raw_logits_V: Tensor, request: GenerationRequest, output: Sequence[int]) -> Tensor:
    """Bias and penalties, one token at a time."""
    params, logits_V = request.sampling, raw_logits_V.clone()
    for token, bias in params.bias_pairs:
        logits_V[token] += bias
    if params.allowed_token_ids is not None:
        logits_V[
            [token for token in range(len(logits_V)) if token not in params.allowed_token_ids]
        ] = -torch.inf
    for token in {*request.prompt_token_ids, *output}:
        factor = params.repetition_penalty
        logits_V[token] = logits_V[token] / factor if logits_V[token] > 0 else logits_V[token] * factor
    for token, count in Counter(output).items():
        # One subtraction, as in the engine: another order could round a near tie the other way.
        logits_V[token] -= torch.tensor(params.frequency_penalty) * count + params.presence_penalty
    return logits_V


def ends(request: GenerationRequest, stop_ids: Collection[int], output: Sequence[int]) -> bool:
    """Whether nothing follows `output`."""
    return bool(output) and (output[-1] in stop_ids or len(output) == request.sampling.max_tokens)


def only_output(model: TableModel, request: GenerationRequest, stop_ids: Collection[int]) -> list[int]:
    """The text of a greedy or coupled request."""
    assert request.sampling.mode != "standard"
    output: list[int] = []
    while not ends(request, stop_ids, output):
        probs_V = next_distribution(model, request, stop_ids, output)
        if request.sampling.mode == "coupled":
            probs_V = probs_V + coupled_noise(request, len(output), len(probs_V))
        output.append(int(probs_V.argmax()))
    return output


def output_distribution(
    model: TableModel, request: GenerationRequest, stop_ids: Collection[int]
) -> dict[tuple[int, ...], float]:
    """Exact probability of every whole output of a sampled request."""
    return dict(_branches(model, request, stop_ids, (), 0.0))


def _branches(
    model: TableModel,
    request: GenerationRequest,
    stop_ids: Collection[int],
    output: tuple[int, ...],
    logprob: float,
) -> Iterator[tuple[tuple[int, ...], float]]:
    if ends(request, stop_ids, output):
        yield output, float(torch.tensor(logprob, dtype=torch.float64).exp())
        return
    for token, step in enumerate(next_distribution(model, request, stop_ids, output).tolist()):
        if step > -torch.inf:
            yield from _branches(model, request, stop_ids, (*output, token), logprob + step)


def coupled_noise(request: GenerationRequest, position: int, vocab_size: int) -> Tensor:
    """Gumbel noise [V] of one output position."""
    assert request.sampling.seed is not None
    key = noise_key(request.sampling.seed, request.choice_index)
    return gumbel_noise(torch.tensor([key]), torch.tensor([[position]]), vocab_size)[0, 0]
