"""`bench`: how fast a model runs; knows how results are shown, not how they are measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from localmoe.cli.command import AsJson, DeviceName, ModelArgument, Pin, Quantize, app
from localmoe.cli.loading import with_loading_flags
from localmoe.errors import SettingError


@app.command()
@with_loading_flags
def bench(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Prompts to read, in tokens; 0: none.")] = "512",
    generate: Annotated[str, typer.Option("-n", "--generate", help="Tokens to generate; 0: none.")] = "64",
    depth: Annotated[str, typer.Option("-d", "--depth", help="Tokens in the cache before each test.")] = "0",
    repeat: Annotated[int, typer.Option("-r", "--repeat", min=1, help="Rounds: each runs every test once.")] = 5,
    threads: Annotated[
        str, typer.Option("--threads", "-t", help="CPU threads; by default the physical cores that are quick.")
    ] = "",
    pin: Pin = None,
    kv: Annotated[str, typer.Option("--kv", help="Formats of the KV cache: f32, f16, q8_0, q4_0.")] = "f16",
    device: DeviceName = "cpu",
    quantize: Quantize = None,
    ops: Annotated[
        bool, typer.Option("--ops", help="Instead of the tests: where a step's time goes, op by op.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A llama-bench binary to measure in turns with localmoe.")
    ] = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw bars below the table.")] = False,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the bars into an SVG file.")] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Append tables and the machine's description to a file.")
    ] = None,
    *,
    loading: dict[str, Any],
) -> None:
    """Measure speed, in tokens per second and in per cent of what this machine could reach.

    Sizes, depths, threads, formats and loading modes may be lists, such as -p 128,512; every combination is measured.
    """
    from localmoe.benchmark import chart, measure, peer, report, request, roofline
    from localmoe.repl.render import Screen

    how = {"prompt": prompt, "generate": generate, "depth": depth, "threads": threads, "kv": kv, "device": device}
    asked, screen = request.read_request(model, **how, **loading, repeat=repeat, quantize=quantize, pin=pin), Screen()
    if ops and against:
        raise SettingError("--ops looks into localmoe alone; leave --against out")
    with screen.progress("measuring") as bar:
        if ops:
            found = report.report_of_profiles(roofline.run(asked, bar))
        else:
            found = report.report_of_results(measure.run(asked, peer.Peer(against) if against else None, bar))
    if save:
        print(f"saved in {found.save(save)}", file=sys.stderr)
    if svg:
        chart.save_svg(found.bars, svg)
    if as_json:
        print(found.json())
    elif markdown:
        print(found.markdown(), end="")
    else:
        for table in found.tables:
            if table.title:
                screen.line(table.title, "bold")
            screen.rows(table.rows, table.header)
        for remark in found.remarks:
            screen.notice(remark)
        if plot:
            screen.console.print(chart.drawn(found.bars))
