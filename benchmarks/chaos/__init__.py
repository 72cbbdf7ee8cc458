"""Faults injected for real into a running service, under load, and what came of each."""
