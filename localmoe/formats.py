"""Block formats of GGML tensors and the `Weight` record; knows sizes only, not how to decode a block.

Source of the table: the GGUF specification and ggml.h's `ggml_type` (ids), ggml-common.h (block sizes); checked in
tests against the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Format:
    """One block format: `elements` values are stored in `nbytes` bytes."""

    name: str
    id: int
    elements: int
    nbytes: int

    def row_nbytes(self, elements: int) -> int:
        """Bytes of a row; the row must be a whole number of blocks (checked where a file is read)."""
        return elements // self.elements * self.nbytes


_TABLE = (
    ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 36), ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292),
    ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136),
    ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4), ("I64", 27, 1, 8), ("F64", 28, 1, 8),
    ("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2), ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17),
    ("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18), ("Q2_0", 42, 64, 18),
)  # fmt: skip
FORMATS: dict[str, Format] = {name: Format(name, *numbers) for name, *numbers in _TABLE}
FORMAT_BY_ID: dict[int, Format] = {f.id: f for f in FORMATS.values()}
F32, F16, BF16 = FORMATS["F32"], FORMATS["F16"], FORMATS["BF16"]
# Eight-bit floats of safetensors files (OCP 8-bit floating point 1.0; the byte for "not a number" is read as 480).
F8_E4M3 = Format("F8_E4M3", -1, 1, 1)
# Formats of which a matrix may be multiplied by numbers that lie beside it, see `Scales`.
SCALED = ("F8_E4M3", "NVFP4")
# What a row of keys or values may be kept as.
KV_FORMATS = {"f32": F32, "f16": F16, "q8_0": FORMATS["Q8_0"], "q4_0": FORMATS["Q4_0"]}


@dataclass(frozen=True, eq=False, slots=True)
class Scales:
    """What one matrix is multiplied by: `values` (rows of scales, columns of scales) float32, each for a tile of `rows`
    times `columns` weights of the matrix that they were made for; the one here begins at its row `first`."""

    values: npt.NDArray[np.float32]
    rows: int
    columns: int
    first: int = 0

    def of_rows(self, start: int, stop: int, columns: int) -> npt.NDArray[np.float32]:
        """(stop - start, columns): the number for each weight of these rows."""
        rows = np.arange(self.first + start, self.first + stop)[:, None] // self.rows
        return self.values[rows, np.arange(columns) // self.columns]

    def moved(self, rows: int) -> Scales:
        """Those of the same matrix from a later row on."""
        return replace(self, first=self.first + rows)


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """A part of the making of a slab: `make` takes what `views` of files hold, and the slab, of which it fills a part.

    Together the steps of a slab fill it; they may be taken in any order, and at the same time.
    """

    views: tuple[Bytes, ...]
    make: Callable[[Sequence[Bytes], Bytes], None]


class MadeSlabs:
    """Slabs of `nbytes` that no file has as they are: each is made by `steps` when it is asked for. Nothing is kept
    here: a slab lives as long as somebody holds it, and is made once for all who do."""

    def __init__(self, count: int, nbytes: int, steps: Callable[[int], Sequence[Step]]) -> None:
        self.count, self.nbytes, self.steps = count, nbytes, steps
        self._made: WeakValueDictionary[int, Bytes] = WeakValueDictionary()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Bytes:
        if not 0 <= index < self.count:
            raise IndexError(index)
        found = self._made.get(index)
        if found is None:
            found = np.empty(self.nbytes, np.uint8)
            for step in self.steps(index):
                step.make(step.views, found)
            self._made[index] = found
        return found

    def __iter__(self) -> Iterator[Bytes]:
        return (self[index] for index in range(self.count))

    @property
    def missing_nbytes(self) -> int:
        """Bytes of memory that making all of them would take now."""
        return (self.count - len(self._made)) * self.nbytes


@dataclass(frozen=True, eq=False)
class Weight:
    """A named tensor over bytes it does not own (usually views of an mmap), row-major, last axis contiguous.

    `shape` is numpy's order: (n,), (rows, columns) or (matrices, rows, columns). `slabs` holds one contiguous piece per
    leading matrix for three axes (experts, heads), else exactly one; `scales` one for each slab, or none. Nothing here
    reads the bytes, or has a slab made. Whoever takes the address of a slab holds it, as it may live no longer.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    slabs: tuple[Bytes, ...] | MadeSlabs
    scales: tuple[Scales, ...] = ()

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...], format: Format, data: Bytes) -> Weight:
        """A tensor stored in one piece; three axes are cut into one slab per matrix, without a copy."""
        if len(shape) < 3:
            return cls(name, shape, format, (data,))
        step = data.size // shape[0]
        return cls(name, shape, format, tuple(data[i * step : (i + 1) * step] for i in range(shape[0])))

    @property
    def rows(self) -> int:
        """Rows of one matrix (1 for a vector)."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def row_nbytes(self) -> int:
        return self.format.row_nbytes(self.columns)

    @cached_property
    def nbytes(self) -> int:
        return len(self.slabs) * self.slab_nbytes + sum(s.values.nbytes for s in self.scales)

    @property
    def slab_nbytes(self) -> int:
        """Bytes of one matrix."""
        return self.slabs.nbytes if isinstance(self.slabs, MadeSlabs) else self.slabs[0].size

    def views(self, matrix: int) -> tuple[Bytes, ...]:
        """What a matrix is made of; where it is not made, the matrix."""
        if isinstance(self.slabs, MadeSlabs):
            return tuple(view for step in self.slabs.steps(matrix) for view in step.views)
        return (self.slabs[matrix],)

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def matrices(self, count: int) -> Weight:
        """(count · rows, columns) seen as (count, rows, columns): heads of one projection."""
        (data,) = self.slabs
        height = self.shape[0] // count
        whole = Weight.whole(self.name, (count, height, self.columns), self.format, data)
        return replace(whole, scales=tuple(s.moved(i * height) for s in self.scales for i in range(count)))

    def part(self, start: int, stop: int) -> Weight:
        """Rows start:stop of every matrix, as views."""
        a, b = start * self.row_nbytes, stop * self.row_nbytes
        shape, slabs = (*self.shape[:-2], stop - start, self.columns), tuple(s[a:b] for s in self.slabs)
        return Weight(self.name, shape, self.format, slabs, tuple(s.moved(start) for s in self.scales))
