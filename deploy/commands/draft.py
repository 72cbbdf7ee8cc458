"""`everdraft draft init`: a draft model from the target itself, for everdraft or any other engine."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.console import errors, fail, output, plain_faults

app = typer.Typer(help="Draft models: make one.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Draft models: make one."""


@app.command()
def init(
    target: Annotated[str, typer.Option(help="Path or hub id of the model that the draft is for.")],
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
    layers: Annotated[int, typer.Option(min=1, help="How many of the target's first layers.")] = 2,
    vocab: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows of its head, for the tokens that the texts use most; such a draft runs in everdraft. "
            "Default: all tokens, as any engine needs.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Text file, a text a line; default: texts that come with Python."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Write TARGET's first layers as a draft model, fitted to the target by forward passes alone."""
    import logging

    from serving.models.part_checkpoint import write_draft

    logging.getLogger("serving.models.part_fit").setLevel(logging.INFO)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    texts = None if data is None else _lines(data)
    with plain_faults():
        errors().print("loading the target")
        try:
            draft = write_draft(
                target,
                out,
                num_layers=layers,
                num_tokens=vocab,
                texts=texts,
                device=device,
                dtype=dtype,
            )
        except FileExistsError as error:
            fail(f"--out {error}")
    size = sum(weight.numel() for weight in draft.parameters())
    output().print(f"{out}: a draft of {layers} layers, {size / 1e6:.1f} M parameters")


def _lines(data: Path) -> list[str]:
    try:
        texts = [line for line in data.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--data {data} cannot be read as text: {error}; nothing was written")
    if not texts:
        fail(f"--data {data} holds no text; nothing was written")
    return texts
