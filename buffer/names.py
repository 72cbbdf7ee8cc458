"""Names and numbers that mean the same on both sides of the seam. Imports nothing, so any room may use it."""

FLOOR_VERSION = 0
"""`draft_version` of the draft as it was loaded, never adapted; always one step away."""

DEFAULT_ROUTE = "default"

MODEL_DRAFTER = "draft"
"""`drafter_id` of a draft model, whose weights have versions, counted by route."""

NGRAM_DRAFTER = "ngram"
"""`drafter_id` of what copies from the text before it: no weights, no version, no route's."""
