"""Trains the demo's pair from text that any machine has: `python -m deploy.demo.train_pair --help`."""
