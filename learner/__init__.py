"""Turns what the target said while verifying into better drafts, and lets only proven ones serve."""
