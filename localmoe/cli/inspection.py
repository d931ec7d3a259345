"""`inspect`: what is in a model file; knows how it is shown, not how it is found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from localmoe.cli.command import MODEL_HELP, AsJson, Context, KeyValueFormat, Quantize, app
from localmoe.errors import SettingError


@app.command(name="inspect")
def inspect_model(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help=MODEL_HELP + " Settings will do.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan from a config.json (or Mistral's params.json) alone.")
    ] = None,
    program: Annotated[bool, typer.Option("--program", help="List the operations of one step.")] = False,
    context: Context = None,
    kv: KeyValueFormat = "f16",
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """Say what a model is, what it needs and whether it fits this machine."""
    from localmoe import inspection
    from localmoe.repl.render import Screen

    path = config or model
    if path is None or (config and model):
        raise SettingError("inspect needs one of MODEL and --config FILE")
    screen = Screen()
    sections = inspection.report(path, context=context, kv_format=kv, quantize=quantize)
    header, rows = inspection.program_table(path, quantize) if program else ([], [])
    if as_json:
        found: dict[str, Any] = {title: dict(entries) for title, entries in sections}
        if program:
            found["program"] = [dict(zip(header, row, strict=True)) for row in rows]
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for title, entries in sections:
        screen.line(title, "bold")
        screen.rows([("  " + key, value) for key, value in entries])
    if program:
        screen.rows(rows, header)
