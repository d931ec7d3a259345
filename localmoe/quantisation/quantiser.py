"""Weights encoded in another format by several threads, a few pieces of rows at a time; knows no file and no type.

Kernels do it where there are some, and the numpy twins elsewhere, with the same bits.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from localmoe.errors import FileFormatError, SettingError
from localmoe.formats import F32, SCALED, Bytes, Format, Weight
from localmoe.interrupt import Pool
from localmoe.kernels.cpu import dequantise, quantise
from localmoe.kernels.cpu.build import Kernels
from localmoe.kernels.cpu.cores import default_threads
from localmoe.kernels.cpu.isa import host_isa
from localmoe.kernels.program import Floats, Progress
from localmoe.kernels.quantise import LARGEST
from localmoe.kernels.quantise import quantise as encoded_by_twin
from localmoe.kernels.reference_weights import rows as rows_by_twin
from localmoe.loader.source import shown

if TYPE_CHECKING:
    from concurrent.futures import Future

PIECE = 1 << 17  # weights that a thread encodes at a time, whole rows: they and their float32 stay in its cache
_DECODED = frozenset({"F16", "BF16", *dequantise.BLOCKS}.difference(SCALED))
_ENCODED = frozenset(quantise.NAMES)
Piece = tuple[int, int, int, Bytes]  # matrix of a weight, its first row, the row behind the last, and all its bytes
Decode = Callable[[Weight, Piece], Floats]
Encode = Callable[[Floats], Bytes]


class Quantiser:
    """Encodes with `threads` threads; rows are cut into the same pieces and encoded alike whatever their number."""

    def __init__(self, threads: int | None = None, progress: Progress | None = None) -> None:
        """`threads` None takes the quick physical cores; `progress` hears of kernels that must be compiled. Raises
        SettingError for a number of threads that is not possible."""
        if threads is not None and not 1 <= threads <= 256:
            raise SettingError(f"{threads} threads are not possible; 1 to 256 are")
        self.threads = threads or default_threads()
        self._progress = progress
        self._kernels = Kernels(host_isa())
        self._pool = Pool(self.threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._pool.close()

    def pieces(self, weight: Weight, format: Format) -> Iterator[tuple[int, Bytes]]:
        """The weight in another format, piece by piece in order: (weights in the piece, its bytes).

        Raises FileFormatError naming the tensor where a value is not finite, or larger than the format's scales.
        """
        if weight.format is format:
            assert not weight.scales, "scales are multiplied in, not written"
            yield from ((weight.elements // len(weight.slabs), slab) for slab in weight.slabs)
            return
        decode, encode = self._decoder(weight.format), self._encoder(format)

        def encoded(piece: Piece) -> Bytes:
            values = decode(weight, piece)
            if format is not F32:
                _require_possible(weight, values, piece[0] * weight.rows + piece[1], format)
            return encode(values)

        rows = max(1, PIECE // weight.columns)
        work = (
            (matrix, start, min(start + rows, weight.rows), slab)
            for matrix, slab in enumerate(weight.slabs)
            for start in range(0, weight.rows, rows)
        )
        for done in self._in_order(encoded, work):
            yield done.size // format.nbytes * format.elements, done

    def weight(self, weight: Weight, format: Format, report: Callable[[int], None] = lambda done: None) -> Weight:
        """The weight in another format, in memory of its own; `report` hears how many weights of it are done."""
        if weight.format is format:
            report(weight.elements)
            return weight
        data = np.empty(weight.elements // format.elements * format.nbytes, np.uint8)
        at = done = 0
        for count, piece in self.pieces(weight, format):
            data[at : at + piece.size] = piece
            at, done = at + piece.size, done + count
            report(done)
        return Weight.whole(weight.name, weight.shape, format, data)

    def _decoder(self, format: Format) -> Decode:
        if format.name not in _DECODED:
            return lambda weight, piece: rows_by_twin(weight, piece[1], piece[2], piece[0])
        kernel = self._kernel(f"dequantise_{format.name.lower()}", 6)

        def decode(weight: Weight, piece: Piece) -> Floats:
            _, start, stop, slab = piece
            values = np.empty((stop - start, weight.columns), np.float32)
            kernel(slab.ctypes.data, weight.row_nbytes, start, 0, values.ctypes.data, values.size)
            return values

        return decode

    def _encoder(self, format: Format) -> Encode:
        if format.name not in _ENCODED:
            return lambda values: encoded_by_twin(values, format).reshape(-1)
        kernel = self._kernel(f"quantise_{format.name.lower()}", 3)

        def encode(values: Floats) -> Bytes:
            blocks = np.empty(values.size // format.elements * format.nbytes, np.uint8)
            kernel(values.ctypes.data, blocks.ctypes.data, values.size)
            return blocks

        return encode

    def _kernel(self, name: str, arguments: int) -> Callable[..., None]:
        """A kernel of so many arguments as a function, which lets go of the interpreter's lock while it runs."""
        self._kernels.prepare((name,), self._report)
        return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(self._kernels.address(name))

    def _report(self, done: int, total: int, name: str) -> None:
        if self._progress:
            self._progress("compiling kernels (first start only)", done, total)

    def _in_order(self, encode: Callable[[Piece], Bytes], work: Iterable[Piece]) -> Iterator[Bytes]:
        """Results in the order of the work, of which only so much is under way that no thread waits."""
        waiting: deque[Future[Bytes]] = deque()
        try:
            for piece in work:
                waiting.append(self._pool.submit(encode, piece))
                if len(waiting) > 2 * self.threads:
                    yield self._pool.result(waiting.popleft())
            while waiting:
                yield self._pool.result(waiting.popleft())
        finally:
            self._pool.cancel(waiting)


def _require_possible(weight: Weight, values: Floats, first_row: int, format: Format) -> None:
    limit = np.finfo(np.float32).max if format.name == "BF16" else LARGEST
    if -limit <= values.min() and values.max() <= limit:  # false where there is NaN
        return
    row, column = np.argwhere(~(np.abs(values) <= limit))[0].tolist()
    found = f"tensor {shown(weight.name)} holds {values[row, column]:g} in row {first_row + row}"
    raise FileFormatError(f"{found}; {format.name} can hold finite values up to {limit:g}")
