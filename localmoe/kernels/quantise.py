"""Rows of float32 as GGUF blocks, in numpy: the specification of the kernels in `cpu/quantise.py`, which give its bits.

F16, BF16 and the blocks of 32 are those of ggml's reference quantisers, bit by bit (ggml-quants.c, quantize_row_*_ref).
For the blocks of 256 the format (ggml-common.h) leaves open how scales are found. Here:

1. Each part of 16 or 32 values tries several widths of its range. For each, the values are rounded, and scale and
   offset are fitted to them by least squares; the best fit is kept.
2. The scales of a block become small multiples of one float16. Each part tries the multiples below and above its own
   scale and offset, and then those that fit the rounded values again, and keeps what leaves the smallest error.

Errors are sums of squares without weights. Sums run over a part's values in order, for all parts at a time, so that a
kernel whose lanes are parts computes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.errors import UnsupportedError
from localmoe.formats import FORMATS, Bytes, Format
from localmoe.kernels.program import Floats

Array = npt.NDArray[Any]

LARGEST = 65504.0  # of a value that blocks can hold: float16's
SMALLEST = np.float32(1e-30)  # a range or scale below it counts as none; ggml divides by it, to no one's gain
PARTS_OF_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Scaled:
    """How a block of 256 is made: parts of so many values, quants in `least` … `most`, scales in -limit … limit - 1 or,
    with offsets, 0 … limit. A range is tried as if it had `most` (or `-least`) + each of `widths` steps."""

    part: int
    least: int
    most: int
    limit: int
    widths: tuple[float, ...]
    refits: int

    @property
    def parts(self) -> int:
        return PARTS_OF_BLOCK // self.part

    @property
    def offsets(self) -> bool:
        return self.least == 0


_ELEVEN = tuple(round(0.2 * i - 1, 1) for i in range(11))
_TEN = tuple(round(0.2 * i - 0.9, 1) for i in range(10))
SCALED = {
    "Q2_K": Scaled(16, 0, 3, 15, _ELEVEN, 2),
    "Q3_K": Scaled(16, -4, 3, 32, _TEN, 1),
    "Q4_K": Scaled(32, 0, 15, 63, _ELEVEN, 2),
    "Q5_K": Scaled(32, 0, 31, 63, _ELEVEN, 2),
    "Q6_K": Scaled(16, -32, 31, 128, _TEN, 1),
}


@dataclass(frozen=True, slots=True)
class Quantised:
    """Blocks of 256 before they are packed: scales and offsets as whole numbers (blocks, parts), quants (blocks, 256)
    counted from 0, and the float16 that scales and offsets are multiples of (blocks,)."""

    quants: Bytes
    scales: Floats
    offsets: Floats
    scale_unit: Floats
    offset_unit: Floats


def quantise(rows: Floats, format: Format) -> Bytes:
    """Rows (n, columns) -> blocks (n, bytes of a row); columns must be whole blocks, values finite and up to LARGEST.

    Raises UnsupportedError for a format that cannot be written here.
    """
    if format.name not in _QUANTISERS:
        raise UnsupportedError(f"{format.name} cannot be written; possible are {', '.join(QUANTISABLE)}")
    assert rows.dtype == np.float32 and rows.shape[1] % format.elements == 0, (rows.dtype, rows.shape)
    blocks = _QUANTISERS[format.name](rows.reshape(-1, format.elements))
    result: Bytes = np.ascontiguousarray(blocks).view(np.uint8).reshape(len(rows), -1)
    return result


def fitted(x: Floats, how: Scaled) -> tuple[Floats, Floats]:
    """Parts (values, n) -> scale and offset (n,) of each: x is about scale · quant - offset, the offset not below 0."""
    count, most = np.float32(how.part), np.float32(how.most)
    low = np.minimum(x.min(axis=0), np.float32(0))
    span = x.max(axis=0) - low
    inverse = _inverse(span, span > SMALLEST)
    y = x - low
    total = _sum(y)
    best, scale, offset = np.full_like(low, -1), np.zeros_like(low), -low
    for width in how.widths:
        quants = np.rint(np.minimum(y * (inverse * np.float32(how.most + width)), most))
        ones, squares, products = _sum(quants), _sum(quants * quants), _sum(quants * y)
        determinant = count * squares - ones * ones
        shift = (squares * total - ones * products) * _inverse(determinant, determinant > 0)
        shift = np.minimum(shift, -low)
        rest = products - shift * ones
        slope = rest * _inverse(squares, squares > 0)
        gain = shift * (total + total - count * shift) + slope * rest
        better = gain > best
        best = np.where(better, gain, best)
        scale = np.where(better, slope, scale)
        offset = np.where(better, -low - shift, offset)
    return scale, offset


def fitted_evenly(x: Floats, how: Scaled) -> Floats:
    """Parts (values, n) -> the scale of each (n,), which has the sign that the largest value needs to get `least`."""
    least, most = np.float32(how.least), np.float32(how.most)
    low, high = x.min(axis=0), x.max(axis=0)
    peak = np.where(high > -low, high, low)
    inverse = _inverse(peak, np.abs(peak) > SMALLEST)
    best, scale = np.full_like(peak, -1), np.zeros_like(peak)
    for width in how.widths:
        quants = np.rint(np.clip(x * (inverse * np.float32(how.least - width)), least, most))
        squares, products = _sum(quants * quants), _sum(quants * x)
        slope = products * _inverse(squares, squares > 0)
        gain = slope * products
        better = gain > best
        best = np.where(better, gain, best)
        scale = np.where(better, slope, scale)
    result: Floats = scale
    return result


def scaled_blocks(x: Floats, how: Scaled) -> Quantised:
    """Blocks (n, 256) with the scales and offsets that leave the smallest error."""
    n = len(x)
    parts = np.ascontiguousarray(x.reshape(-1, how.part).T)  # (values, n · parts)
    scale, offset = fitted(parts, how) if how.offsets else (fitted_evenly(parts, how), np.zeros(n * how.parts, "f4"))
    by_block = scale.reshape(n, -1)
    if how.offsets:
        widest, divisor = by_block.max(axis=1), np.float32(how.limit)
    else:
        lowest, highest = by_block.min(axis=1), by_block.max(axis=1)
        widest, divisor = np.where(highest > -lowest, highest, lowest), np.float32(-how.limit)
    scale_unit = _as_half(widest / divisor)
    offset_unit = _as_half(offset.reshape(n, -1).max(axis=1) / np.float32(how.limit))
    d, m = np.repeat(scale_unit, how.parts), np.repeat(offset_unit, how.parts)
    scales, offsets = _best_multiples(parts, how, scale, offset, d, m)
    quants = _rounded(parts, how, d * scales, m * offsets) - np.float32(how.least)
    return Quantised(
        np.ascontiguousarray(quants.T).astype(np.uint8).reshape(n, -1),
        scales.reshape(n, -1),
        offsets.reshape(n, -1),
        scale_unit,
        offset_unit,
    )


def _best_multiples(
    x: Floats, how: Scaled, scale: Floats, offset: Floats, d: Floats, m: Floats
) -> tuple[Floats, Floats]:
    """Of each part, the multiples of d and m (n,) that leave the smallest error."""
    inverse_d, inverse_m = _inverse(d, d != 0), _inverse(m, m != 0)
    least, most = np.float32(0 if how.offsets else -how.limit), np.float32(how.limit - (not how.offsets))
    error = np.full_like(scale, np.inf)
    scales, offsets = np.zeros_like(scale), np.zeros_like(scale)

    def attempt(a: Floats, b: Floats) -> None:
        nonlocal error, scales, offsets
        a, b = np.clip(a, least, most), np.clip(b, np.float32(0), most)
        step, start = d * a, m * b
        left = _rounded(x, how, step, start) * step - start - x
        found = _sum(left * left)
        better = found < error
        error, scales, offsets = (np.where(better, *pair) for pair in ((found, error), (a, scales), (b, offsets)))

    below, under, one = np.floor(scale * inverse_d), np.floor(offset * inverse_m), np.float32(1)
    for b in (under, under + one) if how.offsets else (under,):
        for a in (below, below + one):
            attempt(a, b)
    for _ in range(how.refits):
        start = m * offsets
        quants = _rounded(x, how, d * scales, start)
        squares = _sum(quants * quants)
        slope = _sum(quants * (x + start)) * _inverse(squares, squares > 0)
        a = np.clip(np.rint(slope * inverse_d), least, most)
        shift = _sum(quants * (d * a) - x) * np.float32(1 / how.part)
        attempt(a, np.rint(shift * inverse_m))
    return scales, offsets


def _rounded(x: Floats, how: Scaled, step: Floats, start: Floats) -> Floats:
    """The quants of parts (values, n) by the scale and offset of each (n,)."""
    found: Floats = np.rint(
        np.clip((x + start) * _inverse(step, step != 0), np.float32(how.least), np.float32(how.most))
    )
    return found


def _sum(x: Floats) -> Floats:
    """Over the first axis, in order: numpy's own sum adds in pairs where there is but one column."""
    result: Floats = x[0].copy()
    for row in x[1:]:
        result += row
    return result


def _inverse(x: Floats, possible: Array) -> Floats:
    found: Floats = np.divide(np.float32(1), x, out=np.zeros_like(x), where=possible)
    return found


def _as_half(x: Floats) -> Floats:
    """Rounded to float16; a zero is +0."""
    return x.astype(np.float16).astype(np.float32) + np.float32(0)


def _half_bytes(x: Floats) -> Bytes:
    return x.astype(np.float16).reshape(-1, 1).view(np.uint8)


def _nibbles(quants: Array) -> Array:
    """(…, 2, n) -> (…, n): the first half low, the second high."""
    packed: Array = quants[..., 0, :] | quants[..., 1, :] << 4
    return packed


def _f16(x: Floats) -> Bytes:
    return x.astype(np.float16).view(np.uint8)


def _bf16(x: Floats) -> Bytes:
    """To nearest even, of finite values."""
    bits = x.view(np.uint32)
    return (((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)).view(np.uint8)


def _q8_0(x: Floats) -> Bytes:
    scale = np.abs(x).max(axis=1) / np.float32(127)
    y = x * _inverse(scale, scale > SMALLEST)[:, None]
    size = np.abs(y)
    whole = np.floor(size)
    quants = np.copysign(whole + np.floor(np.float32(2) * (size - whole)), y).astype(np.int8)  # half away from zero
    return np.concatenate([_half_bytes(scale), quants.view(np.uint8)], axis=1)


def _even(x: Floats, most: int) -> tuple[Bytes, Bytes]:
    """Scale and quants 0 … most of blocks whose largest value, with its sign, becomes 0."""
    middle = (most + 1) // 2
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    scale = peak / np.float32(-middle)
    quants = np.trunc(x * _inverse(scale, np.abs(scale) > SMALLEST)[:, None] + np.float32(middle + 0.5))
    return _half_bytes(scale), np.minimum(quants, most).astype(np.uint8)


def _ranged(x: Floats, most: int) -> tuple[Bytes, Bytes]:
    """Scale, minimum and quants 0 … most of blocks from their minimum to their maximum."""
    low = x.min(axis=1)
    scale = (x.max(axis=1) - low) / np.float32(most)
    quants = np.trunc((x - low[:, None]) * _inverse(scale, scale > SMALLEST)[:, None] + np.float32(0.5))
    return np.concatenate([_half_bytes(scale), _half_bytes(low)], axis=1), np.minimum(quants, most).astype(np.uint8)


def _four_bits(head: Bytes, quants: Bytes) -> Bytes:
    return np.concatenate([head, _nibbles(quants.reshape(-1, 2, 16))], axis=1)


def _five_bits(head: Bytes, quants: Bytes) -> Bytes:
    fifth = np.packbits(quants >> 4, axis=1, bitorder="little")
    return np.concatenate([head, fifth, _nibbles((quants & 15).reshape(-1, 2, 16))], axis=1)


def _six_bit_pairs(q: Quantised) -> Bytes:
    """Eight scales and eight minima of six bits in 12 bytes, behind their units (get_scale_min_k4)."""
    a, b = q.scales.astype(np.uint8), q.offsets.astype(np.uint8)
    low = (a[:, 4:] & 15) | (b[:, 4:] & 15) << 4
    packed = [a[:, :4] | a[:, 4:] >> 4 << 6, b[:, :4] | b[:, 4:] >> 4 << 6, low]
    return np.concatenate([_half_bytes(q.scale_unit), _half_bytes(q.offset_unit), *packed], axis=1)


def _quarters(two: Array) -> Array:
    """Two bits each, of 256: byte i of 32 has the values i, i + 32, i + 64 and i + 96 of its half."""
    q = two.reshape(-1, 2, 4, 32)
    packed: Array = (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).reshape(-1, 64)
    return packed


def _q2_k(x: Floats) -> Bytes:
    q = scaled_blocks(x, SCALED["Q2_K"])
    scales = q.scales.astype(np.uint8) | q.offsets.astype(np.uint8) << 4
    return np.concatenate([scales, _quarters(q.quants), _half_bytes(q.scale_unit), _half_bytes(q.offset_unit)], axis=1)


def _q3_k(x: Floats) -> Bytes:
    q = scaled_blocks(x, SCALED["Q3_K"])
    six = (q.scales + np.float32(32)).astype(np.uint8)
    high = (six >> 4).reshape(-1, 4, 4)
    upper = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    third = np.packbits((q.quants >> 2).reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]
    scales = [_nibbles((six & 15).reshape(-1, 2, 8)), upper]
    return np.concatenate([third, _quarters(q.quants & 3), *scales, _half_bytes(q.scale_unit)], axis=1)


def _q4_k(x: Floats) -> Bytes:
    q = scaled_blocks(x, SCALED["Q4_K"])
    return np.concatenate([_six_bit_pairs(q), _nibbles(q.quants.reshape(-1, 4, 2, 32)).reshape(-1, 128)], axis=1)


def _q5_k(x: Floats) -> Bytes:
    q = scaled_blocks(x, SCALED["Q5_K"])
    fifth = np.packbits((q.quants >> 4).reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]
    four = _nibbles((q.quants & 15).reshape(-1, 4, 2, 32)).reshape(-1, 128)
    return np.concatenate([_six_bit_pairs(q), fifth, four], axis=1)


def _q6_k(x: Floats) -> Bytes:
    q = scaled_blocks(x, SCALED["Q6_K"])
    low = _nibbles((q.quants & 15).reshape(-1, 2, 2, 2, 32).reshape(-1, 2, 2, 64)).reshape(-1, 128)
    scales = q.scales.astype(np.int8).view(np.uint8)
    return np.concatenate([low, _quarters(q.quants >> 4), scales, _half_bytes(q.scale_unit)], axis=1)


_QUANTISERS: dict[str, Callable[[Floats], Bytes]] = {
    "F32": lambda x: x.view(np.uint8),
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": lambda x: _four_bits(*_even(x, 15)),
    "Q4_1": lambda x: _four_bits(*_ranged(x, 15)),
    "Q5_0": lambda x: _five_bits(*_even(x, 31)),
    "Q5_1": lambda x: _five_bits(*_ranged(x, 31)),
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
QUANTISABLE = tuple(_QUANTISERS)
assert set(QUANTISABLE) <= FORMATS.keys()
