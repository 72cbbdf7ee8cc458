"""Engines of others behind the ServingEngine Protocol."""
