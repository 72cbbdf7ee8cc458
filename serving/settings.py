"""The serving settings of an operator: one frozen model, validated when it is read.

Starts nothing and reads no file. Invariant: a secret is a SecretStr and is never printed.
"""

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator

from buffer.route_table import check_route_name
from buffer.store import Bounds
from serving.api.keys import check_key
from serving.capture_mode import CaptureMode, CapturePolicy
from serving.tenants import Tenant, check_together, digest_of, isolated_routes

ModelName = Annotated[str, Field(min_length=1)]
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$")]
"""As a browser sends it: scheme, host and port, no path."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""`organisation/name`."""
_UNASKED_ROUTE_DRAFTS = 4
"""Where the operator names no number."""


class ServingSettings(BaseModel):
    """Settings of every replica. Only `target` has no default."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True)

    engine: Literal["everdraft", "vllm"] = "everdraft"
    """Who runs the models: this project's engine, or vLLM (in an environment that has it, see `make
    setup-vllm`), which takes a fixed draft length and one draft for all routes."""
    target: str = Field(min_length=1)
    """Path or hub id of the model that is served."""
    draft: str | None = None
    """Path or hub id of the draft, or `self`, `self:E`, `self:E:attention`: the target drafts with its own
    first E layers (2 unless given) and a block on top that learns; `:M` behind it gives it a head over M
    tokens. `self:auto` chooses at start. None serves without speculation."""
    untie_draft: bool = False
    """Give a draft whose head is tied to its embedding a head of its own, so that LoRA can adapt both; it
    takes the head's memory once more. A part of the target needs none: it has a map before the head."""
    model_name: ModelName | Annotated[tuple[ModelName, ...], Field(min_length=1)] | None = None
    """The model's name for clients, or several, which all mean it; None: the last part of `target`, and a hub
    id whole, too. An answer carries the name that was asked for, or the first."""
    generation_config: Literal["auto", "none"] = "auto"
    """Whether `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty` that a request leaves out are
    those of the target's `generation_config.json` (auto), or the API's own defaults (none)."""
    tool_call_parser: Literal["hermes", "llama3_json"] | None = None
    """The form in which the model writes calls of tools; None: the one that its chat template teaches."""
    device: str = "cpu"
    """Where the models run: `cpu`, `cuda`, `cuda:1`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of both models' weights and of their keys and values. Byte-equal greedy text is promised in float32."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads of one forward pass; None leaves torch's own choice."""

    num_slots: int = Field(default=8, ge=1)
    """Sequences that run at once in a replica."""
    max_seq_len: int = Field(default=1024, ge=16)
    """Prompt and output together, tokens."""
    num_draft_tokens: int | None = Field(default=None, ge=0)
    """Fixed draft length; 0 turns speculation off; None lets the controller choose."""
    speculation: Literal["auto", "model", "ngram", "off"] = "auto"
    """Who drafts: `model` the draft alone, `ngram` copying from the text so far alone, `off` nobody; `auto`
    has both and chooses in every round what is fastest by measured costs and acceptance, which may be no
    draft."""
    stopping: Literal["controller", "top_prob", "entropy"] = "controller"
    """When the draft stops within the draft length: not at all; after a token drawn where its likeliest token
    was below the threshold; before a draw whose distribution has more nats of entropy than the threshold."""
    stopping_threshold: float | None = Field(default=None, ge=0)
    """Threshold of `stopping`; None: .4 for `top_prob`, 2 nats for `entropy`."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compiled passes: auto serves without them until they are ready and caches them for the next start; on
    waits for them and fails if they are impossible."""
    prefix_cache_mib: float | None = Field(default=None, ge=0)
    """Size of the prefix cache; 0 turns it off; None: one slot's keys and values for every four slots."""
    max_route_drafts: int | None = Field(default=None, ge=0)
    """Routes beyond `default` that may have a draft of their own, each with weights, keys and values. A
    number: their memory is planned at the start. None: up to 4, each where its memory is free when it is
    opened. 0 serves all routes with one draft, and prompts are not routed."""
    num_replicas: int = Field(default=1, ge=1)
    """Replicas behind the endpoint, each with both models of its own."""

    api_keys: tuple[SecretStr, ...] = ()
    """Bearer keys of clients, 8 characters or more each; none leaves the endpoint open."""
    admin_key: SecretStr | None = None
    """Bearer key of `/admin`, 8 characters or more, which no client key opens; None keeps `/admin` shut."""

    tenants: tuple[Tenant, ...] = ()
    """Holders of keys with routes and limits of their own; where there are any, the endpoint asks for a
    key."""

    allowed_origins: tuple[Origin, ...] = ()
    """Origins of web pages, such as `https://chat.example.org`, whose scripts may call the API from a
    browser; `*` for all of them. None: no page may."""

    max_queued_requests: int = Field(default=256, ge=0)
    """Requests that may wait for a slot in a replica; over it 429. A request counts once for each of its `n`
    choices. The last quarter is kept for requests of one generation."""
    max_queued_prompt_tokens: int = Field(default=262_144, ge=1)
    """Prompt tokens that may wait for a slot in a replica; over it 429. The last quarter is kept for requests
    of one generation; a single request may bring a quarter, or one prompt that fills `max_seq_len`."""
    max_generations_per_request: int | None = Field(default=None, ge=1)
    """Prompts times `n` of one request; over it 400. None: a quarter of `max_queued_requests`."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """A request that takes longer is cancelled with 408."""
    drain_timeout_s: float = Field(default=20.0, ge=0)
    """How long requests under way may go on at shutdown before they are aborted."""

    capture_rate: float = Field(default=1.0, ge=0, le=1)
    """Share of requests that are recorded for learning; 0 records nothing."""
    capture: CaptureMode = "replay"
    """What is kept of a request for learning, unless it says `store: false`: `off` nothing; `memory` a record
    that reaches no disk and lives for `memory_ttl_s`; `replay` a record in Redis (`redis.url`)."""
    capture_by_route: dict[str, CaptureMode] = Field(default_factory=dict)
    """The same by route; the stricter of the two holds, so a route can keep less than the service."""
    memory_ttl_s: float = Field(default=3600.0, gt=0)
    """How long records of capture mode `memory` may be held by anyone; replay and held-out records of the
    learner included."""
    record_ttl_s: float = Field(default=7 * 24 * 3600.0, gt=0)
    """Time after which a record of capture mode `replay` may not be read, and after which the buffer deletes
    a route that got no record."""
    max_records_per_route: int = Field(default=20_000, ge=1)
    """Records kept of a route; the oldest are dropped first."""
    max_record_mib_per_route: float = Field(default=512.0, gt=0)
    """Memory that they may take in Redis."""
    max_record_routes: int = Field(default=64, ge=0)
    """Routes beside `default` with a record stream of their own, over all replicas. Records of further routes
    (clients may send any name) are stored as `default`'s; a route with a draft of its own always has a
    stream."""

    stream_interval: int = Field(default=1, ge=1)
    """Tokens of each chunk of a stream but the last, as in vLLM; more than 1 hides how many tokens a round of
    speculation accepted. 1: as rounds bring them."""
    stream_padding_bytes: int = Field(default=0, ge=0, le=65_536)
    """The events of a stream are as long as a multiple of so many bytes, by OpenAI's field `obfuscation`,
    unless a request's `stream_options.include_obfuscation` is false. 0: only where a request asks for it,
    256."""

    watch_interval_s: float = Field(default=0.2, gt=0)
    """Seconds between two reads of the adapter feed."""
    status_interval_s: float = Field(default=1.0, gt=0)
    """Seconds between two reports to the learner and the operator."""
    boot_timeout_s: float = Field(default=5.0, ge=0)
    """How long a starting replica tries to fetch the latest draft before it serves with the floor."""

    @field_validator("capture_by_route")
    @classmethod
    def _names_routes(cls, modes: dict[str, CaptureMode]) -> dict[str, CaptureMode]:
        for route in modes:
            check_route_name(route)
        return modes

    @field_validator("api_keys", mode="before")
    @classmethod
    def _is_a_list_of_keys(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(
                'is no list of keys; write ["KEY"] (in the environment as JSON), or unset it to leave the '
                "endpoint open"
            )
        return value

    @field_validator("api_keys", "admin_key")
    @classmethod
    def _guards_something(
        cls, value: tuple[SecretStr, ...] | SecretStr | None, info: ValidationInfo
    ) -> tuple[SecretStr, ...] | SecretStr | None:
        remedy = "unset it to keep /admin shut" if info.field_name == "admin_key" else "take it out"
        for key in value if isinstance(value, tuple) else (value,):
            try:
                if key is not None:
                    check_key(key.get_secret_value())
            except ValueError as error:
                raise ValueError(f"a key {error}; {remedy}, or give another") from None
        return value

    @model_validator(mode="after")
    def _no_client_key_opens_admin(self) -> Self:
        if self.admin_key is not None and self.admin_key in self.api_keys:
            raise ValueError("admin_key is one of api_keys, so that every client could open /admin")
        return self

    @model_validator(mode="after")
    def _tenants_are_apart(self) -> Self:
        check_together(self.tenants)
        others = {"api_keys": self.revealed_api_keys(), "admin_key": (self.revealed_admin_key() or "",)}
        for field, keys in others.items():
            digests = {digest_of(key) for key in keys}
            if found := next((t.name for t in self.tenants if digests.intersection(t.keys)), None):
                raise ValueError(
                    f"a key of the tenant {found!r} is in {field} too; a key belongs to one of them"
                )
        return self

    @model_validator(mode="after")
    def _vllm_can_do_it(self) -> Self:
        if self.engine != "vllm":
            return self
        for field, asked in (
            ("max_route_drafts", bool(self.max_route_drafts)),
            ("speculation", self.speculation == "ngram"),
            ("stopping", self.stopping != "controller"),
            ("untie_draft", self.untie_draft),
        ):
            if asked:
                raise ValueError(f"{field}={getattr(self, field)!r} is not possible with engine='vllm'")
        for tenant in self.tenants:
            if tenant.isolated and tenant.capture != "off":
                raise ValueError(
                    f"the tenant {tenant.name!r} is isolated, and engine='vllm' has one draft for all "
                    "routes, which its records would train; give it capture='off'"
                )
        return self

    @model_validator(mode="after")
    def _one_request_fits_the_queue(self) -> Self:
        asked, bound = self.max_generations_per_request, max(1, self.max_queued_requests)
        if asked is not None and asked > bound:
            raise ValueError(
                f"max_generations_per_request={asked} is more than max_queued_requests="
                f"{self.max_queued_requests}: such a request could never be queued"
            )
        return self

    @property
    def generations_per_request(self) -> int:
        """Most generations of one request."""
        return self.max_generations_per_request or max(1, self.max_queued_requests // 4)

    @property
    def prompt_tokens_per_request(self) -> int:
        """Most prompt tokens of one request; a single prompt that fits the context is always allowed."""
        return max(self.max_seq_len, self.max_queued_prompt_tokens // 4)

    @property
    def served_names(self) -> tuple[str, ...]:
        """The model's names for clients."""
        if self.model_name is not None:
            given = (self.model_name,) if isinstance(self.model_name, str) else self.model_name
            return tuple(dict.fromkeys(given))
        last = PurePath(self.target).name or self.target
        return (last, self.target) if _HUB_ID.fullmatch(self.target) else (last,)

    @property
    def served_name(self) -> str:
        """The first of them."""
        return self.served_names[0]

    @property
    def num_route_drafts(self) -> int:
        """Most routes beyond `default` that the engine may have drafts for."""
        if self.engine != "everdraft":
            return 0
        return _UNASKED_ROUTE_DRAFTS if self.max_route_drafts is None else self.max_route_drafts

    @property
    def isolated_routes(self) -> frozenset[str]:
        """Routes that one tenant alone may use."""
        return isolated_routes(self.tenants)

    @property
    def records(self) -> bool:
        """Whether records are useful: there is a draft to train, and some requests are captured."""
        return self.draft is not None and self.capture_rate > 0.0 and bool(self.capture_modes)

    @property
    def capture_policy(self) -> CapturePolicy:
        return CapturePolicy(self.capture, self.capture_by_route)

    @property
    def capture_modes(self) -> frozenset[CaptureMode]:
        """Those that can come up, without `off`."""
        policy, routes = self.capture_policy, (None, *self.capture_by_route)
        tenants = (None, *(tenant.capture for tenant in self.tenants))
        modes = (policy.mode(route=route, tenant=tenant) for route in routes for tenant in tenants)
        return frozenset(modes) - {"off"}

    def record_bounds(self, mode: CaptureMode = "replay") -> Bounds:
        """Limits of the buffer of a mode's records for this target."""
        return Bounds(
            max_records=self.max_records_per_route,
            max_bytes=int(self.max_record_mib_per_route * 2**20),
            max_age_s=self.ttl_s(mode),
            max_routes=self.max_record_routes,
        )

    def ttl_s(self, mode: CaptureMode) -> float:
        """How long a mode's records live."""
        return self.memory_ttl_s if mode == "memory" else self.record_ttl_s

    def revealed_api_keys(self) -> tuple[str, ...]:
        return tuple(key.get_secret_value() for key in self.api_keys)

    def revealed_admin_key(self) -> str | None:
        return None if self.admin_key is None else self.admin_key.get_secret_value()
