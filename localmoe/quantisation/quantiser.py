"""Weights encoded in another format by several threads, a few pieces of rows at a time; knows no file and no type."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np

from localmoe.errors import FileFormatError
from localmoe.formats import F32, Bytes, Format, Weight
from localmoe.kernels.cpu.cores import default_threads
from localmoe.kernels.program import Floats
from localmoe.kernels.quantise import LARGEST, quantise
from localmoe.kernels.reference import dequantise
from localmoe.loader.source import shown

PIECE = 1 << 18  # weights that a thread encodes at a time, whole rows


class Quantiser:
    """Encodes with `threads` threads; rows are cut into the same pieces and encoded alike whatever their number."""

    def __init__(self, threads: int | None = None) -> None:
        """`threads` None takes the quick physical cores."""
        self.threads = threads or default_threads()
        self._pool = ThreadPoolExecutor(self.threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def pieces(self, weight: Weight, format: Format) -> Iterator[tuple[int, Bytes]]:
        """The weight in another format, piece by piece in order: (weights in the piece, its bytes).

        Raises FileFormatError naming the tensor where a value is not finite, or larger than the format's scales.
        """
        if weight.format is format:
            yield from ((weight.elements // len(weight.slabs), slab) for slab in weight.slabs)
            return
        rows = max(1, PIECE // weight.columns)
        work = (
            (slab[start * weight.row_nbytes : (start + rows) * weight.row_nbytes], matrix * weight.rows + start)
            for matrix, slab in enumerate(weight.slabs)
            for start in range(0, weight.rows, rows)
        )
        for encoded in self._in_order(lambda piece: _encoded(weight, *piece, format), work):
            yield encoded.size // format.nbytes * format.elements, encoded

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

    def _in_order(
        self, encode: Callable[[tuple[Bytes, int]], Bytes], work: Iterable[tuple[Bytes, int]]
    ) -> Iterator[Bytes]:
        """Results in the order of the work, of which only so much is under way that no thread waits."""
        waiting: deque[Future[Bytes]] = deque()
        try:
            for piece in work:
                waiting.append(self._pool.submit(encode, piece))
                if len(waiting) > 2 * self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _encoded(weight: Weight, data: Bytes, first_row: int, format: Format) -> Bytes:
    values = dequantise(data, weight.format).reshape(-1, weight.columns)
    if format is not F32:
        _require_possible(weight, values, first_row, format)
    return quantise(values, format).reshape(-1)


def _require_possible(weight: Weight, values: Floats, first_row: int, format: Format) -> None:
    limit = np.finfo(np.float32).max if format.name == "BF16" else LARGEST
    if -limit <= values.min() and values.max() <= limit:  # false where there is NaN
        return
    row, column = np.argwhere(~(np.abs(values) <= limit))[0].tolist()
    found = f"tensor {shown(weight.name)} holds {values[row, column]:g} in row {first_row + row}"
    raise FileFormatError(f"{found}; {format.name} can hold finite values up to {limit:g}")
