"""Names and numbers that serving and learner share. Imports nothing, so that any module may use it."""

FLOOR_VERSION = 0
"""`draft_version` of the draft as it was loaded, without an adapter; a rollback can always go to it."""

DEFAULT_ROUTE = "default"

AUTO_PREFIX = "auto-"
"""Prefix of the names of routes that were found by clustering and not named by a request."""

MODEL_DRAFTER = "draft"
"""`drafter_id` of a draft model; its weights have versions, which are counted by route."""

NGRAM_DRAFTER = "ngram"
"""`drafter_id` of n-gram lookup, which copies from earlier text; it has no weights, version or route."""
