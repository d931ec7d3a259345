"""How many of the chosen experts a cache will have: from the shares in which they are used, known or assumed; knows
neither files nor models.

Letters: L layers that have experts, E experts of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from localmoe.experts.sizes import Routed

Shares = npt.NDArray[np.float64]  # (E,) of one layer, their sum is 1

# Of Kimi-Linear (8 of 256 experts), 40 % of the chosen were in memory where 6 % of all fitted, 62 % at 12 %, 85 % at
# 24 % (issue 5). That is 1 - exp(-x / 3.9) to within two points, x being how many working sets of one token fit, and
# so the sum of shares that fall by exp(-1 / 3.9) from working set to working set.
WORKING_SETS = 3.9
# What was measured reaches no further than 32 working sets; many more experts for each used are not held more skewed.
MOST_WORKING_SETS = 32


@dataclass(frozen=True, slots=True)
class Expected:
    """For one token: the share of chosen experts that are in memory, the bytes of those that are not; and how many
    experts of how many bytes are kept."""

    hit_rate: float
    missed_nbytes: float
    held: int
    held_nbytes: int


def assumed_shares(layer: Routed) -> Shares:
    """Falling shares as they were measured of one model: the fewer of its experts a layer uses, the more uneven."""
    fall = min(layer.count / layer.used, MOST_WORKING_SETS) / WORKING_SETS
    shares = np.exp(-fall * np.arange(layer.count) / layer.count)
    return np.asarray(shares / shares.sum(), np.float64)


def even_shares(layer: Routed) -> Shares:
    """The worst case: a router to which all experts are alike."""
    return np.full(layer.count, 1 / layer.count)


def expected(layers: Sequence[Routed], shares: Sequence[Shares], room_nbytes: int) -> Expected:
    """With a cache that keeps the most used experts of all layers in so many bytes.

    Where not even the experts of one token fit, nothing is found in memory again before it is driven out.
    """
    nbytes = np.concatenate([np.full(layer.count, layer.nbytes, np.int64) for layer in layers])  # (sum of E,)
    uses = np.concatenate([layer.used * share for layer, share in zip(layers, shares, strict=True)])  # of one token
    best = np.argsort(-uses, kind="stable")
    held = best[: int(np.searchsorted(np.cumsum(nbytes[best]), room_nbytes, side="right"))]
    if room_nbytes < sum(layer.used * layer.nbytes for layer in layers):
        return Expected(0.0, float(uses @ nbytes), held.size, int(nbytes[held].sum()))
    left = best[held.size :]
    hit_rate = 1 - float(uses[left].sum() / uses.sum())
    return Expected(hit_rate, float(uses[left] @ nbytes[left]), held.size, int(nbytes[held].sum()))
