"""The demo: what it shows, the traffic it replays, and the small pair of models that it ships."""
