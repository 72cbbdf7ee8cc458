"""Loading target and draft, and the draft's live weights."""
