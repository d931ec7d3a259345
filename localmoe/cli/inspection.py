"""`inspect`: what is in a model file; knows how it is shown, not how it is found out."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from localmoe.cli.command import AsJson, Context, KeyValueFormat, ModelArgument, app


@app.command(name="inspect")
def inspect_model(
    model: ModelArgument,
    program: Annotated[bool, typer.Option("--program", help="List the operations of one step.")] = False,
    context: Context = None,
    kv: KeyValueFormat = "f16",
    as_json: AsJson = False,
) -> None:
    """Say what a model is, what it needs and whether it fits this machine."""
    from localmoe import inspection
    from localmoe.repl.render import Screen

    screen = Screen()
    sections = inspection.report(model, context=context, kv_format=kv)
    header, rows = inspection.program_table(model) if program else ([], [])
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
