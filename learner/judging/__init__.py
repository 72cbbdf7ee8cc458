"""Whether a draft may start to serve and may go on serving: acceptance, gate, live test, backoff."""
