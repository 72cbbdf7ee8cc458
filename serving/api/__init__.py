"""The OpenAI surface: HTTP bodies to engine requests, token events to text. Knows no Ray and no Redis."""
