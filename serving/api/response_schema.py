"""The bodies that clients get, in OpenAI's shapes. Plain data; knows no tokenizer and no engine.

Fields that a body must always carry, null ones too, must be set explicitly: bodies are sent without their
unset fields.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from serving.api.tools import ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]


class Body(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())

    def to_json(self) -> str:
        return self.model_dump_json(exclude_unset=True)

    @property
    def event_name(self) -> str | None:
        """In a stream whose events have names."""
        return None


class PromptTokensDetails(Body):
    cached_tokens: int
    """Prompt tokens that were not computed for any choice: an earlier request had the same beginning."""


class Usage(Body):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class SpeculativeDecoding(Body):
    """Field names as vLLM has them, then ours. Sums over all choices of the answer."""

    mean_acceptance_length: float
    """Output tokens of a round that drafted: 1 + accepted / rounds that drafted."""
    draft_acceptance_rate: float
    """Accepted / drafted, which we call draft utilization."""
    acceptance_histogram: list[int]
    """[i]: rounds that accepted exactly i draft tokens."""
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    """Draft length: the cap of the request, or the most a round accepted."""
    num_attempted_draft_tokens: int
    """Accepted, plus one for every rejection."""
    acceptance_rate: float
    """Accepted / attempted."""


class Metrics(Body):
    speculative_decoding: SpeculativeDecoding


class WeightVersion(Body):
    """Draft `version` proposed for output tokens start (inclusive) to end (exclusive)."""

    version: int
    start: int
    end: int


class CompletionLogprobs(Body):
    """With `echo` the prompt's tokens come first; nothing is known of the first of them."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Body):
    """Of a token in one place of the prompt."""

    logprob: float
    rank: int
    """1: no token was more likely."""
    decoded_token: str


PromptLogprobsByToken = list[dict[int, PromptLogprob] | None]
"""One entry a token of the prompt: the token itself and the most likely ones in its place, by id; null first,
because nothing is known of the first token."""


class TokenLogprob(Body):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Body):
    content: list[ChatTokenLogprob]


class Choice(Body):
    """What every kind of choice may carry beside its text."""

    index: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it; null for end of text."""
    token_ids: list[int] | None = None
    weight_versions: list[WeightVersion] | None = None


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: PromptLogprobsByToken | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Body):
    """The whole answer, or a chunk of a stream: OpenAI gives both the same object name."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    metrics: Metrics | None = None
    obfuscation: str | None = None
    """Of chunks that are padded: random characters, to be ignored."""


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Choice):
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Body):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metrics: Metrics
    prompt_logprobs: PromptLogprobsByToken | None = None
    prompt_token_ids: list[int] | None = None


class FunctionChunk(Body):
    name: str | None = None
    arguments: str


class ToolCallChunk(Body):
    """`id`, `type` and the function's name come with the first chunk of a call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionChunk


class ChatDelta(Body):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallChunk] | None = None


class ChatChunkChoice(Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None


class ChatChunk(Body):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    metrics: Metrics | None = None
    prompt_token_ids: list[int] | None = None
    obfuscation: str | None = None
    """Of chunks that are padded: random characters, to be ignored."""


class ModelCard(Body):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    sampling_defaults: dict[str, float]
    """What the model's `generation_config.json` says of fields that a request leaves out."""


class ModelList(Body):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Body):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(Body):
    prompt: str


class TokenizerInfo(Body):
    """Null for what the tokenizer does not have."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
