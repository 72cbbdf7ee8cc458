"""Shared test material: models of known distribution, tiny pairs, record factories."""
