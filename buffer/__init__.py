"""The seam between serving and learning: records go forward through it, adapters come back."""
