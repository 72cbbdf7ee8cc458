"""An API request ready for the engine: what to generate, where to cut it, what to report. Plain data.

Invariant: choice `prompt * n + c` of the answer is choice_index `c` of that prompt, so that a prompt's seeded
choices do not depend on the prompts beside it.
"""

from dataclasses import dataclass

from serving.api.context import AppContext
from serving.api.errors import ApiError, bad_request, from_value_error
from serving.api.request_schema import GenerationBody
from serving.capture_mode import CaptureMode
from serving.engine.request import GenerationRequest, SamplingParams, TokenConstraint
from serving.tenants import Tenant


@dataclass(frozen=True)
class RequestPlan:
    """One API request. `api_id` is the prefix of every engine request's id; the choices of a prompt share
    theirs."""

    api_id: str
    created: int
    """Unix time, whole seconds."""
    model: str
    body: GenerationBody
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    route: str | None
    capture: CaptureMode
    """As far as is known before the prompt has a route."""
    timeout_s: float | None = None
    """As the request asks; None: the server's own."""
    key_holder: Tenant | None = None
    """None: its key is of no tenant."""

    @property
    def tenant(self) -> str | None:
        """Name of the tenant whose key the request brought."""
        return None if self.key_holder is None else self.key_holder.name

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.body.n

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    def prompt_of(self, index: int) -> tuple[int, ...]:
        return self.prompts[index // self.body.n]

    def requests(self) -> list[GenerationRequest]:
        """The engine's requests, in the order of the answer's choices."""
        return [
            GenerationRequest(
                request_id=f"{self.api_id}-{number}",
                prompt_token_ids=prompt,
                sampling=self.sampling,
                choice_index=choice,
                route=self.route,
                capture=self.capture != "off",
                tenant=self.tenant,
                cache_salt=None if self.key_holder is None else self.key_holder.cache_salt,
            )
            for number, prompt in enumerate(self.prompts)
            for choice in range(self.body.n)
        ]


def sampling_of(
    context: AppContext,
    body: GenerationBody,
    max_tokens: int,
    logprobs: int | None,
    constraint: TokenConstraint | None,
) -> SamplingParams:
    """As the request says; where it says nothing, as the model's own defaults do. A stop string that spells a
    special token stops at that token. Raises ApiError for fields that exclude each other."""
    unset = context.sampling_defaults.keys() - body.model_fields_set
    body = body.model_copy(update={name: context.sampling_defaults[name] for name in unset})
    if body.min_tokens > max_tokens:
        raise bad_request(
            f"min_tokens={body.min_tokens} must be at most max_tokens={max_tokens}", "min_tokens"
        )
    try:
        return SamplingParams(
            temperature=body.temperature,
            top_k=max(body.top_k, 0),
            top_p=body.top_p,
            min_p=body.min_p,
            seed=body.seed,
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            stop_token_ids=(*body.stop_token_ids, *context.codec.special_token_ids(body.stop_strings)),
            ignore_eos=body.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=body.num_prompt_logprobs,
            num_draft_tokens=body.num_draft_tokens,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias={int(token): bias for token, bias in body.logit_bias.items()},
            allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
            constraint=constraint,
        )
    except ValueError as error:
        raise from_value_error(error) from None


def fit_max_tokens(
    asked: int | None, default: int | None, longest_prompt: int, max_seq_len: int, *, prompt_field: str
) -> int:
    """Output tokens allowed: as asked, or the default (None: all that fit) cut to the context.

    Raises ApiError when prompt and output together do not fit."""
    room = max_seq_len - longest_prompt
    if room < (0 if asked == 0 else 1):
        raise _too_long(f"The prompt has {longest_prompt} tokens", max_seq_len, prompt_field)
    if asked is not None and asked > room:
        raise _too_long(
            f"The prompt has {longest_prompt} tokens, max_tokens={asked}", max_seq_len, "max_tokens"
        )
    if asked is not None:
        return asked
    return room if default is None else min(default, room)


def _too_long(what: str, max_seq_len: int, param: str) -> ApiError:
    message = f"{what}; the model's context holds {max_seq_len} tokens, prompt and output together."
    return bad_request(message, param, "context_length_exceeded")
