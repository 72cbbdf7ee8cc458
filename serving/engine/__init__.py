"""The engine: rounds of draft and verify over a batch. Knows no HTTP, no Ray, no Redis."""

from serving.engine.request import (
    Generation,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
    VersionSpan,
)

__all__ = ["Generation", "GenerationRequest", "SamplingParams", "TokenEvent", "VersionSpan"]
