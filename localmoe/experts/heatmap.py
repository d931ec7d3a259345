"""How evenly experts are used, as rows of text for a terminal: a heat map of layers and experts, and figures; prints
nothing.

`uses` are counts (L, E): History.uses, or a difference of two. `blocks` are the numbers that layers go by, 0 to L - 1
without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from localmoe.experts.history import Counts, Scores

SHADES, PLAIN = " ·░▒▓█", " .:+#@"
STEPS = (0.0, 0.5, 1.0, 2.0, 4.0)  # a shade is taken up to so many times the mean of its layer; the last one above
HEIGHT, NAMED = 32, 5  # rows at most; experts that are named


@dataclass(frozen=True, slots=True)
class Balance:
    """Of each layer that chose anything, (n,): `peak` is the most used expert over the mean, `variation` the standard
    deviation over the mean, `entropy` in bits, which even use brings to `even_bits`."""

    peak: Scores
    variation: Scores
    entropy: Scores
    even_bits: float


def rows(
    uses: Counts, width: int, height: int = HEIGHT, *, plain: bool = False, blocks: Sequence[int] | None = None
) -> list[str]:
    """The map in at most `height` rows of `width` columns, with the experts' ids above and a legend below; none before
    anything was chosen. Layers, and experts, that find no room of their own share it: a cell shows their mean.

    `plain` takes ASCII characters.
    """
    if not uses.any():
        return []
    layers, experts = uses.shape
    names = [str(name) for name in blocks or range(layers)]
    bands = np.array_split(np.arange(layers), min(layers, max(height - 2, 1)))
    labels = [names[b[0]] if len(b) == 1 else f"{names[b[0]]}-{names[b[-1]]}" for b in bands]
    margin = max(map(len, labels)) + 1
    columns = np.array_split(np.arange(experts), min(experts, max(width - margin, 1)))
    relative = ratios(uses)
    shades = PLAIN if plain else SHADES
    lines = [" " * margin + axis(experts, len(columns))]
    for label, band in zip(labels, bands, strict=True):
        means = relative[band].mean(axis=0)
        cells = np.searchsorted(STEPS, [means[column].mean() for column in columns])
        lines.append(f"{label:>{margin - 1}} " + "".join(shades[cell] for cell in cells))
    return [line[: max(width, 1)] for line in (*lines, legend(shades, width))]


def ratios(uses: Counts) -> Scores:
    """Each count over the mean of its layer; 0 in a layer that chose nothing."""
    means = uses.mean(axis=1, keepdims=True)
    found: Scores = uses / np.where(means > 0, means, 1)
    return found


def axis(experts: int, columns: int) -> str:
    """The first and the last id at their ends."""
    last = str(experts - 1)
    return f"0{last:>{columns - 1}}" if columns > len(last) else "0"[:columns]


def legend(shades: str, width: int) -> str:
    """What the shades mean, in times the mean; as much as there is room for."""
    entries = [f"{shades[i]} <{limit:g}" for i, limit in enumerate(STEPS) if i]
    whole = " ".join((*entries, f"{shades[-1]} more"))
    longer = f"{whole} (times the mean)"
    return longer if len(longer) <= width else whole


def balance(uses: Counts) -> Balance:
    """How far the layers are from using all experts alike."""
    chosen = uses[uses.any(axis=1)]
    relative = ratios(chosen)
    shares = relative / uses.shape[1]
    logarithms = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    entropy = np.maximum(-(shares * logarithms).sum(axis=1), 0.0)
    peak = relative.max(axis=1, initial=0.0)
    return Balance(peak, relative.std(axis=1), entropy, float(np.log2(uses.shape[1])))


def busiest(uses: Counts, count: int = NAMED) -> list[tuple[int, int, float]]:
    """(layer, expert, times the mean of its layer), the most used first."""
    relative = ratios(uses)
    order = np.argsort(-relative, axis=None, kind="stable")[:count]
    found = [divmod(int(place), uses.shape[1]) for place in order]
    return [(layer, expert, float(relative[layer, expert])) for layer, expert in found if relative[layer, expert] > 0]


def idle(uses: Counts) -> npt.NDArray[np.int64]:
    """Experts that were never chosen: how many, layer by layer, (L,)."""
    return np.count_nonzero(uses == 0, axis=1)


def facts(uses: Counts, blocks: Sequence[int] | None = None) -> list[tuple[str, str]]:
    """What the map says, as (name, figures)."""
    if not uses.any():
        return [("experts", "none was chosen yet")]
    names, found, never = blocks or range(len(uses)), balance(uses), idle(uses)
    most = int(never.argmax())
    resting = f"{never.sum()} of {uses.size} never chosen"
    if never.any():
        resting += f"; most in layer {names[most]}: {never[most]} of {uses.shape[1]}"
    return [
        ("busiest", ", ".join(f"{names[layer]}/{expert} {times:.1f}×" for layer, expert, times in busiest(uses))),
        ("idle", resting),
        ("load balance", f"busiest over mean {spread(found.peak)}; variation {spread(found.variation)}"),
        ("entropy", f"{spread(found.entropy)} of {found.even_bits:.2f} bits"),
    ]


def spread(values: Scores) -> str:
    """The mean over layers, and the range where there is one."""
    low, mean, high = (f"{value:.2f}" for value in (values.min(), values.mean(), values.max()))
    return mean if low == high else f"{mean} ({low} to {high})"
