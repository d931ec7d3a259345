"""Experts that are made of what files hold: which bytes are read for which parts of which slabs, and the memory that
they are read into; knows neither layers nor policies."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from localmoe.experts.reading import BLOCK, FileReader
from localmoe.formats import Bytes, MadeSlabs, Step, Weight

NEAR = 1 << 16  # bytes between two places that are read together: less than a read of their own would cost
TEMPORARY = 8  # times the bytes read: they, and what making needs beside them, at most
Place = tuple[FileReader, int, int]  # where bytes lie: a file's reader, offset, size


class Spare:
    """Memory of one reader's own, as large as was needed so far, beginning at a whole block."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, BLOCK)

    def take(self, nbytes: int) -> memoryview:
        if nbytes > len(self._memory):
            self._memory = mmap.mmap(-1, nbytes)  # views of the old one may live on
        return memoryview(self._memory)[:nbytes]


@dataclass(frozen=True, eq=False, slots=True)
class Making:
    """Bytes from some places that are read together, once, and what is made of them: steps and the slabs that each
    fills a part of."""

    places: tuple[Place, ...]
    made: list[tuple[Step, Bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(end - first for _, first, end in self._spans())

    def fill(self, spare: Spare) -> None:
        """Raises what reading and making raise."""
        memory, at, starts = spare.take(self.nbytes), 0, []
        for reader, first, end in (spans := self._spans()):
            reader.read(memory[at : at + end - first], first)
            starts.append(at - first)
            at += end - first
        views = []
        for reader, offset, nbytes in self.places:
            index = next(i for i, (by, first, end) in enumerate(spans) if by is reader and first <= offset < end)
            views.append(np.frombuffer(memory, np.uint8, nbytes, starts[index] + offset))
        for step, slab in self.made:
            step.make(views, slab)

    def _spans(self) -> list[tuple[FileReader, int, int]]:
        """Whole blocks that hold all places, those that lie close together in one: (reader, offset, end)."""
        found: list[tuple[FileReader, int, int]] = []
        for reader, offset, nbytes in sorted(self.places, key=lambda place: (id(place[0]), place[1])):
            first, end = offset // BLOCK * BLOCK, -(-(offset + nbytes) // BLOCK) * BLOCK
            if found and found[-1][0] is reader and first <= found[-1][2] + NEAR:
                _, first, before = found.pop()
                end = max(end, before)
            found.append((reader, first, end))
        return found


def makings(wanted: Iterable[tuple[Weight, int, Bytes]], find: Callable[[Weight, Bytes], Place]) -> Iterable[Making]:
    """Of matrices (weight, matrix, where it goes): steps that are about the same bytes, as gate and up often are, read
    them once."""
    found: dict[tuple[Place, ...], Making] = {}
    for weight, matrix, slab in wanted:
        assert isinstance(weight.slabs, MadeSlabs)
        for step in weight.slabs.steps(matrix):
            places = tuple(find(weight, view) for view in step.views)
            found.setdefault(places, Making(places, [])).made.append((step, slab))
    return found.values()


def spare_nbytes(weights: Iterable[Weight], threads: int) -> int:
    """Memory that so many readers need beside the slots."""
    slabs = [weight.slabs for weight in weights if isinstance(weight.slabs, MadeSlabs)]
    steps = (_nbytes(step.views) for each in slabs for step in each.steps(0))
    return threads * TEMPORARY * max(steps, default=0)


def _nbytes(views: Sequence[Bytes]) -> int:
    return sum(view.size for view in views)
