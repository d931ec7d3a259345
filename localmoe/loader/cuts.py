"""Stored matrices cut into bands of rows, so that making something of one takes little memory; knows no format."""

from __future__ import annotations

from localmoe.formats import Bytes

BAND_NBYTES = 2 << 20  # a disk is as quick as with larger reads, and what is read stays in a cache until it is used


def cuts(rows: int, row_nbytes: int, multiple: int = 1) -> list[slice]:
    """Rows in bands of about BAND_NBYTES, a multiple of so many rows each but for the last."""
    height = max(BAND_NBYTES // max(row_nbytes * multiple, 1), 1) * multiple
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def rows_of(stored: Bytes, rows: slice, count: int) -> Bytes:
    """Those of a matrix of `count` rows."""
    row_nbytes = stored.size // count
    return stored[rows.start * row_nbytes : rows.stop * row_nbytes]
