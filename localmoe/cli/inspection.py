"""`inspect`, `plan` and `doctor`: what is in a model file, what running it would be like, and why it is slow; knows how
that is shown, not how it is found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe.cli.command import MODEL_HELP, AsJson, Context, KeyValueFormat, ModelArgument, Quantize, app, model_path
from localmoe.errors import SettingError
from localmoe.memory import parse_rate, parse_size

if TYPE_CHECKING:
    from localmoe.inspection import Section
    from localmoe.repl.render import Screen

Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory for everything: 8GiB. Without it, what is free now.")
]


@app.command(name="inspect")
def inspect_model(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help=MODEL_HELP + " Settings will do.", parser=model_path)
    ] = None,
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
    show(screen, sections)
    if program:
        screen.rows(rows, header)


@app.command()
def plan(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help=MODEL_HELP + " A config.json will do.", show_default=False, parser=model_path
        ),
    ],
    memory: Memory = None,
    disk_speed: Annotated[
        str | None, typer.Option(metavar="RATE", help="Of the disk: 1.2GB/s. Without it, the file is read for 0.5 s.")
    ] = None,
    context: Context = None,
    kv: KeyValueFormat = "f16",
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """Say how a model would run in so much memory, before it is loaded or downloaded."""
    budget = None if memory is None else parse_size(memory)
    disk = None if disk_speed is None else parse_rate(disk_speed)
    from localmoe import outlook
    from localmoe.inspection import open_network
    from localmoe.repl.render import Screen

    network = open_network(model, quantize)
    shares = outlook.learned_shares(network)
    found = outlook.outlook(network, memory=budget, disk=disk, context=context, kv_format=kv, shares=shares)
    if as_json:
        print(json.dumps(outlook.numbers(found), indent=2, ensure_ascii=False))
    else:
        show(Screen(), outlook.sections(found))
    if found.refusal:
        raise SettingError(f"{model}: {found.refusal}")


@app.command()
def doctor(
    model: ModelArgument,
    memory: Memory = None,
    as_json: AsJson = False,
) -> None:
    """Say why a model is slow here, and what to try next."""
    budget = None if memory is None else parse_size(memory)
    from localmoe.doctor import examine, sections
    from localmoe.inspection import open_network
    from localmoe.repl.render import Screen

    found = sections(examine(open_network(model), memory=budget))
    if as_json:
        print(json.dumps({title: dict(entries) for title, entries in found}, indent=2, ensure_ascii=False))
    else:
        show(Screen(), found)


def show(screen: Screen, sections: list[Section]) -> None:
    for title, entries in sections:
        screen.line(title, "bold")
        screen.rows([("  " + key, value) for key, value in entries])
