"""Runs forward passes over slots: runner, caches, static and compiled passes. Knows nothing of rounds."""
