"""Where a step stops because experts may be missing: which entries are run again for those that come; knows no kernel.

Behind a router the step hears what it chose. If all of it is in memory, everything is listed and nothing stops; else
what does not need experts runs while they are read, and the entries of a wave for each part of them that is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from localmoe.formats import SCALED, Weight
from localmoe.kernels.cpu import scaled
from localmoe.kernels.cpu.arguments import At
from localmoe.kernels.program import Op, Tensor
from localmoe.kernels.residency import Addresses, ExpertLayer, Ids
from localmoe.kernels.rewrites import guess

if TYPE_CHECKING:
    from localmoe.kernels.cpu.lower import Lowering

COUNTERS = 5  # of a chunk: packing in two forms and one product, packing in one form and another product


@dataclass(frozen=True, eq=False, slots=True)
class Pause:
    """One `experts` op: the ids are known before entry `chosen`, a wave is entries first:last; `listed` is what these
    read, (count, choices of a token or experts of a chunk)."""

    layer: ExpertLayer
    ids: Tensor
    guess: Tensor | None
    chosen: int
    first: int
    last: int
    listed: npt.NDArray[np.int64]
    counters: At | None  # of a chunk, cleared before each wave
    records: tuple[npt.NDArray[np.int64] | None, ...]  # of matrices with scales, see `scaled.record`

    def list_all(self) -> None:
        self._renew_records()
        self.listed[:] = [self.listed.size - 1, *range(self.listed.size - 1)]

    def list_ready(self, ready: Ids, ids: Ids) -> None:
        """Those experts of a chunk, or the choices of them of a token."""
        self._renew_records()
        items = ready.tolist()
        if self.counters is None:
            items = [choice for choice, expert in enumerate(ids[0].tolist()) if expert in items]
        self.listed[0], self.listed[1 : len(items) + 1] = len(items), items

    def _renew_records(self) -> None:
        for record, addresses in zip(self.records, self.layer.addresses, strict=True):
            if record is not None:
                record[:, 0] = addresses


class Wave:
    """Gives the entries of an `experts` op their list and tables of addresses, and notes where they begin and end."""

    def __init__(self, lowering: Lowering, op: Op, count: int, counters: At | None = None) -> None:
        self._lowering, self._op, self._counters = lowering, op, counters
        self._list = np.array([count, *range(count)], np.int64)
        self._first = lowering.entry_count
        self._layer = lowering.residency.layer(op) if lowering.residency else None
        lowering.kept.append(self._list)
        self.listed: int = self._list.ctypes.data
        self._records: list[npt.NDArray[np.int64] | None] = []
        self.tables = self._tables(self._layer.addresses) if self._layer else self._mapped()

    def end(self) -> None:
        """Behind the last entry that reads the list."""
        if self._layer is None:
            return
        ids, ahead = self._op.inputs[1], guess(self._op)
        place = (self._lowering.entries_until(ahead or ids), self._first, self._lowering.entry_count)
        before = self._lowering.pauses[-1].last if self._lowering.pauses else 0
        assert before <= place[0], "experts that were chosen are multiplied before the next layer chooses"
        self._lowering.pauses.append(
            Pause(self._layer, ids, ahead, *place, self._list, self._counters, tuple(self._records))
        )

    def _mapped(self) -> tuple[int, ...]:
        return tuple(self._lowering.addresses(weight) for weight in self._op.matrices)

    def _tables(self, addresses: tuple[Addresses, ...]) -> tuple[int, ...]:
        """Of the layer's own addresses, which change; of records that hold them where matrices have scales."""
        tables = []
        for weight, array in zip(self._op.matrices, addresses, strict=True):
            record = self._record(weight) if weight.format.name in SCALED else None
            self._records.append(record)
            self._lowering.kept.append(array)
            places = array.ctypes.data
            if record is not None:
                places = self._lowering.table(record.ctypes.data + record.strides[0] * np.arange(len(record)))
            tables.append(places)
        return tuple(tables)

    def _record(self, weight: Weight) -> npt.NDArray[np.int64]:
        records = [scaled.record(weight, i) for i in range(len(weight.slabs))]
        self._lowering.kept += [values for _, values in records]
        found = np.array([numbers for numbers, _ in records], np.int64)
        self._lowering.kept.append(found)
        return found
