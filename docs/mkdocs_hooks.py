"""Makes links from a page to files outside `docs/`, which are right on GitHub, right on the site too.

Pictures of `benchmarks/results` are copied into the site. Other files of the repository are no part of the
site: a link to one is shown as its text alone.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path("benchmarks/results")
_PICTURE = re.compile(r"\]\(\.\./benchmarks/results/([\w.-]+\.png)\)")
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """The pictures, as if they lay in `docs/results`."""
    root = Path(config.config_file_path).parent
    for picture in sorted((root / RESULTS).glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _OUTSIDE.sub(r"\1", _PICTURE.sub(r"](results/\1)", markdown))
