"""The demo's domains, one file each: a function from a generator to a `Sample`, and nothing else."""
