"""Trains drafts on what the target computed while verifying, and publishes those that pass the gate."""
