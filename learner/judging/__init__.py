"""Whether a draft may serve, and whether it may go on serving: acceptance, gate, live test, backoff."""
