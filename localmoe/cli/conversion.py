"""`convert`: a model written as one GGUF file; knows neither formats nor how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from localmoe.cli.command import ModelArgument, Threads, app


@app.command()
def convert(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.", show_default=False)],
    type: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="f32, f16, bf16, q8_0, q6_K, q5_K_M, q4_K_M, q3_K_M, q2_K …")
    ] = "q4_K_M",
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantise once more what is quantised already.")
    ] = False,
) -> None:
    """Write a model as one GGUF file, which llama.cpp opens too.

    Types have llama.cpp's names, and each tensor gets the format that llama-quantize would give it.
    """
    from localmoe.conversion.convert import convert as write
    from localmoe.repl.render import Screen

    screen = Screen()
    with screen.progress(f"reading {model.name}") as bar:
        again = allow_requantize
        written = write(model, out, type, threads=threads, force=force, allow_requantize=again, progress=bar)
    screen.line(written.summary)
