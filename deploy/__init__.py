"""Settings, wiring, cluster and command line: the one place that chooses concrete parts."""
