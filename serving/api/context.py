"""The parts that the routes of one app use, and whether the app takes requests now."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from buffer.administration import Administration
from buffer.audit import Caller
from buffer.controls import Controls
from buffer.records import ServingStatus
from serving.api.admission import Admission
from serving.api.errors import ApiError
from serving.api.keys import KeyRing
from serving.api.limits import RequestLimits
from serving.api.rate_limits import RateLimits
from serving.api.refused_calls import RefusedCalls
from serving.api.token_codec import TokenCodec
from serving.api.tool_parsing import ToolParserName
from serving.metrics import ServingMetrics
from serving.recorder import Recorder
from serving.serving_engine import ServingEngine
from serving.structured_output import GrammarCompiler

if TYPE_CHECKING:
    from serving.tracing import RequestTracing


@dataclass
class AppContext:
    """One replica's parts. `recorder` None: nothing is recorded. Its creator owns and closes it."""

    engine: ServingEngine
    codec: TokenCodec
    model_names: tuple[str, ...]
    """What clients may call the model, its first name first."""
    sampling_defaults: Mapping[str, Any]
    """Fields that a request leaves out: what the model's own configuration says of them."""
    version: str
    """Version of the software."""
    started_at: int
    """Unix time."""
    admission: Admission
    limits: RequestLimits
    rate_limits: RateLimits
    isolated_routes: frozenset[str]
    """Routes that one tenant alone may use."""
    keys: KeyRing
    allowed_origins: tuple[str, ...]
    """Origins of web pages whose scripts may call the API."""
    metrics: ServingMetrics
    recorder: Recorder | None
    status: Callable[[], ServingStatus]
    replica_id: str
    controls: Callable[[], Controls]
    """What operators ordered, as this replica follows it."""
    administration: Callable[[Caller], Administration] | None
    """None: the replica has no Redis, so there is nothing that replicas share."""
    refused_calls: RefusedCalls
    request_timeout_s: float
    grammars: GrammarCompiler
    tool_parser: ToolParserName | None
    """The form in which the model calls tools; None: none that is known."""
    stream_interval: int = 1
    """Tokens of each chunk of a stream; 1: as rounds bring them."""
    stream_padding_bytes: int = 0
    """Of which the events of a stream are as long as a multiple; 0: unless a request asks for it."""
    tracing: "RequestTracing | None" = None
    """None: nobody collects traces."""
    draining: bool = field(default=False)
    """It shuts down. An operator's order to drain is in `controls`."""
    num_open: int = field(default=0)
    """Generation requests that it took and has not answered whole."""

    @property
    def is_ready(self) -> bool:
        """Whether it takes new requests."""
        return self.engine.is_alive and not self.draining and not self.controls().drains(self.replica_id)

    def require_ready(self) -> None:
        """Raises ApiError while it takes no new requests."""
        if not self.is_ready:
            message = "The server is not ready: it is loading, draining or shutting down."
            leave = {"Connection": "close"} if self.draining else {}
            raise ApiError(503, message, headers={"Retry-After": "1", **leave})

    def drain(self) -> int:
        """Take no new requests from now on. Returns how many are under way."""
        self.draining = True
        return self.num_open
