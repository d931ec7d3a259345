"""What a plan asks of whoever keeps experts in memory; knows neither files nor policies.

A step stops behind each router, hears which of the chosen experts are there, and computes them wave by wave.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from localmoe.kernels.program import Op

Ids = npt.NDArray[np.int32]
Addresses = npt.NDArray[np.int64]


class ExpertLayer(Protocol):
    """The experts of one `experts` op."""

    @property
    def addresses(self) -> tuple[Addresses, Addresses, Addresses]:
        """Where each expert's gate, up and down matrix begins, (E,) each; true of an expert while a wave holds it."""
        ...

    def choose(self, ids: Ids, guess: Ids | None = None) -> bool:
        """Hears what the router chose, (T, k), and what the next layer's may choose; what is missing begins to be read.
        Whether all of it is there: then it stays until the next call, and there are no waves."""
        ...

    def waves(self) -> Iterator[Ids]:
        """Distinct experts of the last choice that are in memory, each once, those that are there first; a wave stays
        until the next one is asked for. Raises LocalMoeError when one cannot be read."""
        ...


class Residency(Protocol):
    """Keeps the experts of one model."""

    @property
    def lookahead(self) -> bool:
        """Whether steps are to guess what the next layer will choose."""
        ...

    def layer(self, op: Op) -> ExpertLayer:
        """The experts of an op of the Program; two Programs of a model share them, weight by weight."""
        ...
