"""Ways to propose tokens, each behind the engine's Drafter Protocol."""
