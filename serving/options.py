"""The engine's options, in one list from the settings to the memory plan."""

from dataclasses import dataclass
from typing import Literal, Self

from serving.compiling import CompileChoice
from serving.drafters.stopping import StoppingName
from serving.settings import ServingSettings

Speculation = Literal["auto", "model", "ngram", "off"]
"""Who drafts: whatever is fastest by measurement; only the draft model; only n-gram lookup; nobody."""


@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine, for any pair of models."""

    num_slots: int = 8
    """Sequences that run at once."""
    max_seq_len: int = 1024
    """Tokens of a prompt and its output; cut to what both models can hold."""
    num_draft_tokens: int | None = None
    """None lets the controller choose, an int fixes the draft length."""
    speculation: Speculation = "auto"
    stopping: StoppingName = "controller"
    """When drafting stops before the draft length."""
    stopping_threshold: float | None = None
    compile: CompileChoice = "off"
    """on waits for compiled passes, auto starts without them and takes them when they are ready."""
    prefix_cache_mib: float | None = None
    """Size of the prefix cache. 0: none; None: one slot's keys and values for every four slots."""
    export_queue_bytes: int = 0
    """Bytes that a recorder's queue may hold; 0: nothing is recorded."""
    max_route_drafts: int = 0
    """Routes beyond `default` that may be given drafts of their own."""
    plans_route_drafts: bool = True
    """Whether their memory is planned; else a route gets a draft where its memory is free when it opens."""

    @classmethod
    def of(cls, settings: ServingSettings, *, export_queue_bytes: int) -> Self:
        """The options in an operator's settings."""
        return cls(
            num_slots=settings.num_slots,
            max_seq_len=settings.max_seq_len,
            num_draft_tokens=settings.num_draft_tokens,
            speculation=settings.speculation,
            stopping=settings.stopping,
            stopping_threshold=settings.stopping_threshold,
            compile=settings.compile,
            prefix_cache_mib=settings.prefix_cache_mib,
            export_queue_bytes=export_queue_bytes,
            max_route_drafts=settings.num_route_drafts,
            plans_route_drafts=settings.max_route_drafts is not None,
        )

    @property
    def uses_model(self) -> bool:
        """Whether a draft model may draft. If not, it takes no memory."""
        return self.speculation in ("auto", "model")
