"""Which routes have a draft of their own, and how untagged prompts are assigned to routes."""
