"""`experts`: what can be learned from traces of routing decisions; knows how it is shown, not how it is found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from localmoe.cli.command import AsJson, app
from localmoe.errors import SettingError
from localmoe.memory import parse_size, readable_size

experts_app = typer.Typer(help="What is known about the experts of a model.", no_args_is_help=True)
app.add_typer(experts_app, name="experts")


def read_sizes(text: str, experts_nbytes: int) -> list[float]:
    """Per cent, or bytes where there is a unit, of all experts: "6, 12.5 %, 4GiB" -> [0.06, 0.125, …], ascending.
    Raises SettingError."""
    sizes = {_share(word.strip(), experts_nbytes) for word in text.split(",")}
    if not all(0 < size <= 1 for size in sizes):
        raise SettingError(
            f"--sizes {text[:40]!r}: a size is more than 0 and at most 100 per cent of all experts, "
            f"{readable_size(experts_nbytes)}"
        )
    return sorted(sizes)


def _share(word: str, experts_nbytes: int) -> float:
    try:
        return float(word.removesuffix("%")) / 100
    except ValueError:
        pass
    try:
        return parse_size(word) / experts_nbytes
    except SettingError:
        raise SettingError(
            f"--sizes {word[:40]!r}: expected numbers, per cent, or sizes such as 4GiB, with commas between"
        ) from None


@experts_app.command()
def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A file that --trace wrote.", show_default=False)],
    sizes: Annotated[
        str, typer.Option(metavar="LIST", help="How much is kept in memory: per cent of all experts, or 4GiB.")
    ] = "3,6,12,25,50,75",
    as_json: AsJson = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the curves into a .png or .svg file (extra: plot)."),
    ] = None,
) -> None:
    """Compare policies of keeping experts with each other, and with the best that is possible (Belady's bound).

    They are replayed on the second half of the trace, from an empty cache. The first half is their earlier session.
    """
    from localmoe.benchmark import chart
    from localmoe.benchmark.report import Bar
    from localmoe.experts import curve
    from localmoe.experts.replay import replay as replayed
    from localmoe.experts.trace import read_trace
    from localmoe.repl.render import Screen

    if plot:
        curve.can_draw(plot)
    screen, found = Screen(), read_trace(trace)
    fractions = read_sizes(sizes, curve.experts_nbytes(found.header))
    with screen.progress("replaying") as bar:
        results = replayed(found, fractions, progress=bar)
    if plot:
        curve.save_curve(found.header, results, plot)
    if as_json:
        print(json.dumps(curve.records(found.header, results), indent=2))
        return
    for title, header, rows in curve.tables(found.header, results):
        screen.line(title, "bold")
        screen.rows(rows, header)
    screen.console.print(
        chart.drawn(
            [
                Bar(f"{curve.kept(found.header, r.nbytes)} kept", r.policy, r.counts.hit_rate, curve.share(r.counts))
                for r in sorted(results, key=lambda result: result.nbytes)
            ]
        )
    )
