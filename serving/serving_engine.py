"""What API, recorder, watcher, status and metrics know of an engine, whichever engine it is.

`serving.local.LocalEngine` is ours; `serving.engines.async_llm` has vLLM's. Invariant: nothing above an
engine names its class, so that `tests/serving/test_engine_contract.py` holds every one of them to the same.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

from buffer.records import AdapterManifest
from serving.engine.cost_table import CostTable
from serving.engine.handle import GenerationHandle
from serving.engine.request import EventCallback, GenerationRequest
from serving.engine.stats import EngineStats, SwapReport
from serving.router import PromptRouter

S = TypeVar("S")


class DraftPort(Protocol[S]):
    """What the adapter watcher does to drafts. Used by one thread at a time. `S`: a staged version."""

    @property
    def max_route_drafts(self) -> int:
        """Routes beyond `default` that may have a draft of their own."""
        ...

    @property
    def routes(self) -> list[str]:
        """Routes with a draft of their own, `default` first."""
        ...

    @property
    def versions(self) -> Mapping[str, int]:
        """route -> version that serves now."""
        ...

    def follow(self, wanted: Iterable[str]) -> None:
        """Have drafts for these routes and no others, `default` aside, while there is room."""
        ...

    def stage(self, route: str, manifest: AdapterManifest | None, weights: bytes = b"") -> S:
        """Validate a version, None: the floor, and lay it aside. What serves does not change. Raises
        AdapterRejectedError."""
        ...

    def swap(self, route: str, staged: S) -> SwapReport:
        """Make a staged version live between two rounds, and wait for that. Raises BrokenDraftError,
        EngineClosedError."""
        ...


class ServingEngine(Protocol):
    """One engine in this process. Every method is safe from any thread."""

    @property
    def drafts(self) -> DraftPort[Any] | None:
        """None where no draft model is used."""
        ...

    @property
    def router(self) -> PromptRouter | None:
        """Routes prompts without a route; None where no route can have a draft of its own."""
        ...

    @property
    def tokenizer(self) -> Any | None:
        """The target's, of transformers; None where it has none."""
        ...

    @property
    def target_revision(self) -> str: ...

    @property
    def max_seq_len(self) -> int:
        """Tokens of a prompt and its output together."""
        ...

    @property
    def vocab_size(self) -> int:
        """Of the target's logits."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Each ends the text."""
        ...

    @property
    def is_alive(self) -> bool: ...

    @property
    def draft_version(self) -> int:
        """The default route's version."""
        ...

    @property
    def costs(self) -> CostTable | None:
        """Measured costs of passes; None where the engine does not know them."""
        ...

    @property
    def passes(self) -> str:
        """What runs the models' passes, in words."""
        ...

    def submit(self, request: GenerationRequest, on_event: EventCallback | None = None) -> GenerationHandle:
        """Start a generation. Raises ValueError for one that cannot run, EngineClosedError."""
        ...

    def check(self, request: GenerationRequest) -> None:
        """Raises ValueError if the request cannot run here; the message names the field."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self, timeout_s: float = 10.0) -> None:
        """Cancel what runs and end every thread and process; safe to call twice."""
        ...
