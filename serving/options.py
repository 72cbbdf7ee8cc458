"""How an engine runs, whoever starts it: the one list of its options, from settings to memory plan."""

from dataclasses import dataclass
from typing import Literal, Self

from serving.compiling import CompileChoice
from serving.drafters.stopping import StoppingName
from serving.settings import ServingSettings

Speculation = Literal["auto", "model", "ngram", "off"]
"""Who drafts: whatever pays, by measurement; the draft model alone; n-gram lookup alone; nobody."""


@dataclass(frozen=True)
class EngineOptions:
    """Of any pair of models. What memory they take is planned before anything is allocated."""

    num_slots: int = 8
    """Sequences that run at once."""
    max_seq_len: int = 1024
    """Tokens of a prompt and its output; cut to what both models can hold."""
    num_draft_tokens: int | None = None
    """None lets the controller choose, an int fixes the draft length."""
    speculation: Speculation = "auto"
    stopping: StoppingName = "controller"
    """When a draft ends before its length."""
    stopping_threshold: float | None = None
    compile: CompileChoice = "off"
    """on waits for compiled passes, auto starts without them and takes them when they are ready."""
    prefix_cache_mib: float | None = None
    """Of keys and values kept of earlier prompts. 0: none; None: one slot's for every four."""
    export_queue_bytes: int = 0
    """What a recorder may hold; 0: nothing is recorded."""
    max_route_drafts: int = 0
    """Routes beyond `default` that may be given drafts of their own."""

    @classmethod
    def of(cls, settings: ServingSettings, *, export_queue_bytes: int) -> Self:
        """As an operator chose them."""
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
            max_route_drafts=settings.max_route_drafts,
        )

    @property
    def uses_model(self) -> bool:
        """May a draft model speak? If not, it takes no memory."""
        return self.speculation in ("auto", "model")
