"""Experts where the files are mapped, kept by the system's page cache: whole experts are asked for before they are
touched, and choices are counted; see `residency.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from localmoe.experts.history import History
from localmoe.experts.telemetry import Counts
from localmoe.experts.trace import TraceWriter
from localmoe.kernels.program import Op
from localmoe.kernels.residency import Addresses, Ids
from localmoe.pages import WILL_NEED, advising

AT_ONCE = 16  # experts of a prompt's chunk that are asked for while as many are multiplied


class MappedExperts:
    """A Residency that has everything at once. `advise`: experts may be on the disk alone."""

    lookahead = False

    def __init__(self, ops: Sequence[Op], history: History, *, advise: bool, trace: TraceWriter | None = None) -> None:
        self.history, self.trace, self.counts = history, trace, Counts()
        self.advise = advising(WILL_NEED) if advise else None
        self._layers = {id(op.weights[0]): MappedLayer(self, i, op) for i, op in enumerate(ops)}

    def count(self, *, seconds: float) -> None:
        self.counts = replace(self.counts, seconds=self.counts.seconds + seconds)

    def layer(self, op: Op) -> MappedLayer:
        return self._layers[id(op.weights[0])]


class MappedLayer:
    """The experts of one op."""

    def __init__(self, store: MappedExperts, index: int, op: Op) -> None:
        self.store, self.index, self.op = store, index, op
        self._chosen: Ids = np.empty(0, np.int32)
        self._slabs = [[*w.slabs] for w in op.matrices]  # held: some are made and live no longer
        places = [np.array([slab.ctypes.data for slab in slabs], np.int64) for slabs in self._slabs]
        self._addresses: tuple[Addresses, Addresses, Addresses] = (places[0], places[1], places[2])

    @property
    def addresses(self) -> tuple[Addresses, Addresses, Addresses]:
        return self._addresses

    def choose(self, ids: Ids, guess: Ids | None = None) -> bool:
        history = self.store.history
        if self.index == 0:
            history.tick()
            counts = self.store.counts
            self.store.counts = replace(counts, steps=counts.steps + 1, tokens=counts.tokens + len(ids))
        experts, times = np.unique(ids, return_counts=True)
        history.used(self.index, experts, times)
        if self.store.trace:
            self.store.trace.chose(history.clock, self.index, ids)
        self._chosen = experts
        if self.store.advise is None:
            return True
        self._advise(experts[:AT_ONCE])
        return experts.size <= AT_ONCE

    def waves(self) -> Iterator[Ids]:
        for start in range(0, self._chosen.size, AT_ONCE):
            self._advise(self._chosen[start + AT_ONCE : start + 2 * AT_ONCE])
            yield self._chosen[start : start + AT_ONCE]

    def _advise(self, experts: Ids) -> None:
        assert self.store.advise is not None
        for weight, table in zip(self.op.matrices, self._addresses, strict=True):
            for expert in experts:
                self.store.advise(int(table[expert]), weight.slab_nbytes)
