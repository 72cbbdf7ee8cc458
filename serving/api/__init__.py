"""The OpenAI-compatible API: HTTP bodies to engine requests, token events to text. Knows no Ray or Redis."""
