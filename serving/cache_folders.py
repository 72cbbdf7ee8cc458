"""Where what can be made again is kept between starts. Native code is loaded from there."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`$XDG_CACHE_HOME/everdraft/<name>`, readable and writable by its owner alone."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "everdraft" / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
