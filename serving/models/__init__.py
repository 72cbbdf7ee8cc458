"""Loads target and draft, and holds the draft's live weights."""
