"""Which experts were chosen, how often and how long ago; knows neither memory nor files.

Letters: L layers that have experts, E experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from localmoe.kernels.residency import Ids

Scores = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

HALF_LIFE = (
    32  # steps after which a use counts half: of 8 to 4096 the best, or within 1 % of it, in replays of three traces
)
EARLIER = 64  # uses of each layer that earlier sessions count as: 16 to 256 differ by less than 1 %


class History:
    """What one session chose, as arrays (L, E)."""

    def __init__(self, layers: int, experts: int, prior: Scores | None = None) -> None:
        """`prior`: each expert's share of its layer's choices in earlier sessions, zeros without any."""
        shape = layers, experts
        assert prior is None or prior.shape == shape
        self.clock = 0  # steps: decoded tokens, and chunks of a prompt
        self.uses: Counts = np.zeros(shape, np.int64)  # tokens that chose it
        self.last: Counts = np.full(shape, -1, np.int64)  # the clock when it was last chosen, -1: never
        self.prior: Scores = np.zeros(shape) if prior is None else prior
        # log2 of the decayed count, plus clock / HALF_LIFE: so only what is chosen has to be touched.
        with np.errstate(divide="ignore"):
            self.frequency: Scores = np.log2(self.prior * EARLIER)

    def tick(self) -> None:
        """A step begins."""
        self.clock += 1

    def used(self, layer: int, ids: Ids, counts: npt.NDArray[np.integer]) -> None:
        """Distinct experts `ids` of a layer were chosen, by so many tokens each."""
        self.uses[layer][ids] += counts
        self.last[layer][ids] = self.clock
        frequency = self.frequency[layer]
        frequency[ids] = np.logaddexp2(frequency[ids], np.log2(counts) + self.clock / HALF_LIFE)
