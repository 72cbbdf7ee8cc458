"""Serving: answers requests with speculative decoding; knows nothing of how drafts are trained."""
