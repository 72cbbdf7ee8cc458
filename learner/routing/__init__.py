"""Which routes have a draft of their own, and how prompts without a tag are told apart."""
