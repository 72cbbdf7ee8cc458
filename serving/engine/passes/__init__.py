"""What runs a forward pass over slots: runner, caches, static and compiled passes. Knows no round."""
