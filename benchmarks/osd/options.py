"""What `everdraft bench osd` asks for, by name."""

from pathlib import Path
from typing import Annotated, Literal

import typer

DataOption = Annotated[
    Path | None,
    typer.Option(help="Folder of gsm8k, spider, mbpp, gpteacher and tldr rows; default: $EVERDRAFT_DATA."),
]
ExperimentOption = Annotated[
    Literal["domain", "shift", "mixture", "ablations", "parts", "cost", "deployed", "privacy"],
    typer.Option(
        help="What is measured; deployed: through REST, Ray and Redis; privacy: with records for an hour."
    ),
]
DomainsOption = Annotated[
    list[str] | None, typer.Option(help="gsm8k, spider, python, chat; may be given again; default: all.")
]
TemperaturesOption = Annotated[
    list[float] | None, typer.Option(help="0 or 1; may be given again; default: both.")
]
PromptTokensOption = Annotated[
    int, typer.Option(help="The longest prompt; a longer question loses its beginning.", min=16)
]
DraftOrPartOption = Annotated[
    str | None,
    typer.Option(
        help="Path or hub id; default: trained here, once. self, self:E …: a part of --target for the "
        "arm `self`, and for the others its first two layers, fitted to it, as a model of its own."
    ),
]
ArmsOption = Annotated[
    list[str] | None,
    typer.Option(help="Of the experiment, such as ours and self; again for more; default: all."),
]
BlocksOption = Annotated[
    list[str] | None,
    typer.Option(help="Of the experiment `parts`: whole or attention; default: both."),
]
AblationsOption = Annotated[
    list[str] | None,
    typer.Option(help="Of the experiment `ablations`: a setting, or self/ and a setting; default: all."),
]
EngineOption = Annotated[
    Literal["everdraft", "vllm"],
    typer.Option(help="Of the experiment `deployed`: who runs the models; vllm in its environment."),
]
