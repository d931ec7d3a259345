"""Rows of the KV cache as bytes and back, in numpy: the specification of `cpu/cache_rows.py`; knows no device.

A row is padded with zeros to whole blocks and at least whole vectors (`program.cache_row`). Blocks that are quantised
are turned first: multiplied by the Walsh-Hadamard matrix of 32 columns, so that one large column becomes 32 of middling
size and the others lose less (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456). Kept is H x / 4, and H · kept / 8 is x
again, as H · H = 32: powers of two, so that nothing is rounded but sums. Queries are turned like what is kept, and sums
of values are turned back.

Q8_0: a float16 scale, max|x| / 127 of 32 values, then their int8, x / scale to the nearest, ties to even. Q4_0: a
float16 scale, the value of largest magnitude (the first of equal ones) with its sign / -8, then 16 bytes, value i of 32
in the low half of byte i, value i + 16 in the high half: x / scale + 8, halves upwards, at most 15 (ggml-quants.c,
quantize_row_q8_0 and quantize_row_q4_0_ref). Both divide by the scale before it is rounded; one below 1e-30 makes the
values zero; NaN or infinity in a block makes its scale NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.formats import F16, F32, Bytes, Format
from localmoe.kernels.program import Floats, cache_row

Array = npt.NDArray[Any]
BLOCK = 32  # columns that share a scale, and that are turned together
SCALE_NBYTES = 2  # before the quants of a block
KEPT, TAKEN = np.float32(1 / 4), np.float32(1 / 8)  # what a row is multiplied by when it is turned, and turned back
SMALLEST = np.float32(1e-30)


def turned(rows: Floats, factor: np.float32) -> Floats:
    """Rows (…, whole blocks) times a factor and, block by block, the Walsh-Hadamard matrix in Sylvester's order."""
    x, step = (rows.reshape(-1, BLOCK) * factor).T.copy(), 1  # (BLOCK, blocks): long additions
    while step < BLOCK:
        pairs = x.reshape(-1, 2, step, x.shape[1])
        x = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(BLOCK, -1)
        step *= 2
    return np.ascontiguousarray(x.T).reshape(rows.shape)


def encoded(rows: Array, format: Format) -> Bytes:
    """Float rows (…, d) as a cache keeps them, (…, bytes)."""
    width = rows.shape[-1]
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, cache_row(width, format) - width)]
    padded = np.pad(rows.astype(np.float32), padding)
    with np.errstate(invalid="ignore", over="ignore"):
        if format in (F16, F32):
            stored = padded.astype(np.float16 if format is F16 else np.float32)
        else:
            stored = _ENCODERS[format.name](turned(padded, KEPT).reshape(-1, BLOCK))
    return np.ascontiguousarray(stored).view(np.uint8).reshape(*rows.shape[:-1], -1)


def decoded(data: Bytes, format: Format, width: int) -> Floats:
    """Rows of a cache (…, bytes) -> the first `width` values of each, (…, width)."""
    rows = np.ascontiguousarray(data)
    if format in (F16, F32):
        values: Floats = rows.view(np.float16 if format is F16 else np.float32).astype(np.float32)
    else:
        quantised = _DECODERS[format.name](rows.reshape(-1, format.nbytes)).reshape(*data.shape[:-1], -1)
        with np.errstate(invalid="ignore"):
            values = turned(quantised, TAKEN)
    return values[..., :width]


def _scaled(blocks: Floats, scale: Floats) -> tuple[Floats, Bytes]:
    """Blocks divided by their scale, and its float16 as bytes."""
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) > SMALLEST)
    finite: Array = np.all(np.isfinite(blocks), axis=1)
    head = np.where(finite, scale, np.float32(np.nan)).astype(np.float16).reshape(-1, 1).view(np.uint8)
    return np.where(finite[:, None], blocks * inverse[:, None], np.float32(0)), head


def _q8_0(blocks: Floats) -> Bytes:
    quants, head = _scaled(blocks, np.abs(blocks).max(axis=1) / np.float32(127))
    return np.concatenate([head, np.rint(quants).astype(np.int8).view(np.uint8)], axis=1)


def _q4_0(blocks: Floats) -> Bytes:
    peaks = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    quants, head = _scaled(blocks, peaks / np.float32(-8))
    four = np.minimum(quants + np.float32(8.5), np.float32(15)).astype(np.uint8)
    return np.concatenate([head, four[:, :16] | four[:, 16:] << 4], axis=1)


def _scales(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)


def _of_q8_0(blocks: Bytes) -> Floats:
    values: Floats = _scales(blocks) * blocks[:, 2:].view(np.int8)
    return values


def _of_q4_0(blocks: Bytes) -> Floats:
    quants = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    values: Floats = _scales(blocks) * (quants.astype(np.float32) - 8)
    return values


_ENCODERS = {"Q8_0": _q8_0, "Q4_0": _q4_0}
_DECODERS = {"Q8_0": _of_q8_0, "Q4_0": _of_q4_0}
