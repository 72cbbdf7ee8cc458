"""`everdraft convert`: a GGUF file as a checkpoint that everdraft and every other engine load."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.console import errors, fail, output, plain_faults


def convert(
    file: Annotated[Path, typer.Argument(help="GGUF file of a model.", exists=True, dir_okay=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; default: a cache, and FILE is a model's name from then on."),
    ] = None,
) -> None:
    """Write FILE's model as an ordinary checkpoint, in float32."""
    from serving.models.gguf_checkpoint import SUFFIX, convert_gguf, converted_folder

    if file.suffix != SUFFIX:
        fail(f"{file} is no {SUFFIX} file; nothing was written")
    folder = out or converted_folder(file)
    if out is None and folder.is_dir():
        output().print(f"{folder} is there already")
        return
    errors().print(f"converting {file.name}, about a minute for each hundred million weights")
    with plain_faults():
        try:
            convert_gguf(file, folder)
        except FileExistsError as error:
            fail(f"--out {error}")
    output().print(f"{folder}: the model of {file.name}")
