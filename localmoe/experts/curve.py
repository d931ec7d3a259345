"""What a replay found, as tables, as records and as a curve in a file; replays and prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from localmoe.errors import SettingError
from localmoe.experts.replay import BOUND, Result
from localmoe.experts.telemetry import Counts
from localmoe.experts.trace import Header
from localmoe.memory import readable_size

FORMATS = (".png", ".svg")
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, header, rows


def experts_nbytes(header: Header) -> int:
    """Of all experts of the model."""
    return header.experts * sum(header.expert_nbytes)


def policies(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.policy for result in results))


def kept(header: Header, nbytes: int) -> str:
    return f"{100 * nbytes / experts_nbytes(header):.1f} %"


def share(counts: Counts) -> str:
    return f"{100 * counts.hit_rate:.1f} %"


def per_token(counts: Counts) -> str:
    return readable_size(counts.nbytes_read / counts.tokens)


def tables(header: Header, results: Sequence[Result]) -> Iterator[Table]:
    """A column for each policy, a row for each size; of decoded tokens and of prompts, as far as there are any."""
    shown: list[tuple[str, Callable[[Result], Counts]]] = [
        ("decoded tokens", lambda result: result.decoded),
        ("prompts", lambda result: result.prompts),
    ]
    names = policies(results)
    for what, counts_of in shown:
        if not counts_of(results[0]).tokens:
            continue
        for title, cell in ((f"hits, {what}", share), (f"read for each token, {what}", per_token)):
            rows = [
                (
                    kept(header, nbytes),
                    readable_size(nbytes),
                    *(cell(counts_of(r)) for r in results if r.nbytes == nbytes),
                )
                for nbytes in sizes(results)
            ]
            yield title, ("experts kept", "", *names), rows


def sizes(results: Sequence[Result]) -> list[int]:
    """Bytes of the caches, each once, in their order."""
    return list(dict.fromkeys(result.nbytes for result in results))


def records(header: Header, results: Sequence[Result]) -> list[dict[str, Any]]:
    """For machines: bytes, counts and hit rates."""
    total = experts_nbytes(header)
    return [
        {
            "model": header.model,
            "policy": result.policy,
            "cache_nbytes": result.nbytes,
            "experts_nbytes": total,
            **{
                name: asdict(counts) | {"hit_rate": counts.hit_rate}
                for name, counts in (("decoded", result.decoded), ("prompts", result.prompts))
            },
        }
        for result in results
    ]


def can_draw(file: Path) -> None:
    """Raises SettingError for an ending other than PNG's and SVG's, and where matplotlib is missing."""
    if file.suffix.lower() not in FORMATS:
        raise SettingError(f"--plot {file}: a curve can be drawn as {' or '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise SettingError("--plot needs matplotlib, which comes with: pip install 'localmoe[plot]'")


def save_curve(header: Header, results: Sequence[Result], file: Path) -> None:
    """Hits over the size of the cache. Raises SettingError as `can_draw` does, and where the file cannot be written."""
    can_draw(file)
    from matplotlib.figure import Figure  # an extra

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in policies(results):
        points = [(r.nbytes, 100 * r.counts.hit_rate) for r in results if r.policy == name]
        style = {"color": "grey", "linestyle": "--"} if name == BOUND else {"marker": "o"}
        axes.plot(
            [100 * n / experts_nbytes(header) for n, _ in points], [hit for _, hit in points], label=name, **style
        )
    marks = [100 * nbytes / experts_nbytes(header) for nbytes in sizes(results)]
    axes.set_xscale("log")
    axes.set_xticks(marks, [f"{mark:.3g}" for mark in marks])
    axes.minorticks_off()
    axes.set(xlabel=f"experts kept, per cent of {readable_size(experts_nbytes(header))}", ylabel="hits, per cent")
    axes.set(ylim=(0, 100), title=header.model.replace("$", r"\$"))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(file)
    except OSError as error:
        raise SettingError(f"--plot {file}: {error.strerror or error}") from error
