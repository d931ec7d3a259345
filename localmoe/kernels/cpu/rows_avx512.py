"""Four rows of a matrix at once with 512-bit vectors: the loop over rows and blocks, and pieces its users share; knows
no format.

Rows side by side share what the activations decide, and one vector holds the scales of four blocks, a row in each
128-bit piece. One row alone keeps the processor's vector units busier than the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from localmoe.kernels.cpu.rows import stream


def four_rows(
    v: Any, step: Any, step_nbytes: int, elements: int, rest: Any = None, near: int = 0
) -> Callable[..., None]:
    """The kernel whose contract is `matmul.py`'s, of `step(p, q, r, s, activations, columns, first, sums)` -> sums.

    A step multiplies `elements` columns from column `first` on, in four rows whose blocks lie at p, q, r and s. sums
    are five f32x16: a row's result is the total of its own vector and of its quarter of the fifth. `rest` does the same
    for 32 columns, where `elements` do not divide the columns. Rows behind the last are the last once more, so that a
    row's bits depend on no other row.

    With `near`, each row's lines come into the first level too, that many bytes ahead: Q8_0, which has instructions to
    spare, gains a tenth.
    """
    rest_nbytes, others, lines = step_nbytes * 32 // elements, rest is not None, 4 * step_nbytes & -64
    rest = rest or step
    first_lines, places, follow = stream(v)
    q0, q1, q2, q3 = (v.shuffle([*range(4 * i, 4 * i + 4)]) for i in range(4))

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        last, steps = row_stop - 1, columns // elements
        four, end = 4 * row_nbytes, weights + row_stop * row_nbytes
        first_lines(weights + row_start * row_nbytes, end, four)
        for row in range(row_start, row_stop, 4):
            row1, row2, row3 = min(row + 1, last), min(row + 2, last), min(row + 3, last)
            p, q = weights + row * row_nbytes, weights + row1 * row_nbytes
            r, s = weights + row2 * row_nbytes, weights + row3 * row_nbytes
            far, close = places(p, end, four)
            sums = v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32)
            for i in range(steps):
                o = i * step_nbytes
                follow(far, close, i * lines, (i + 1) * lines)
                if near:
                    for line in range(o + near, o + near + step_nbytes, 64):
                        v.prefetch(p + line)
                        v.prefetch(q + line)
                        v.prefetch(r + line)
                        v.prefetch(s + line)
                sums = step(p + o, q + o, r + o, s + o, activations, columns, i * elements, sums)
            follow(far, close, steps * lines, four)
            if others:
                for first in range(steps * elements, columns, 32):
                    o = (first >> 5) * rest_nbytes
                    sums = rest(p + o, q + o, r + o, s + o, activations, columns, first, sums)
            a, b, c, d, fifth = sums
            v.store(out + row * 4, v.total(a) + v.total(q0(fifth, fifth)))
            v.store(out + row1 * 4, v.total(b) + v.total(q1(fifth, fifth)))
            v.store(out + row2 * 4, v.total(c) + v.total(q2(fifth, fifth)))
            v.store(out + row3 * 4, v.total(d) + v.total(q3(fifth, fifth)))

    return gemv


def joined(v: Any, kind: Any) -> Any:
    """(p, q, r, s) -> 64 bytes of `kind`: what lies at four addresses, 16 bytes of each."""
    two, four = v.shuffle([*range(32)]), v.shuffle([*range(64)])

    def join(p, q, r, s):
        return four(two(v.load(kind, p), v.load(kind, q)), two(v.load(kind, r), v.load(kind, s)))

    return v.function(join)


def alternating(v: Any) -> tuple[Any, Any]:
    """Shuffles of two vectors of 64 bytes: the pieces of 16 of even number, and those of odd number."""
    even, odd = ([i for i in range(128) if i // 16 % 2 == side] for side in (0, 1))
    return v.shuffle(even), v.shuffle(odd)


def each_row(v: Any) -> list[Any]:
    """Four shuffles: the four lanes of piece i, each of them spread over a piece."""
    return [v.shuffle([4 * i + lane for lane in range(4) for _ in range(4)]) for i in range(4)]


def in_pieces(v: Any, places: list[int]) -> Any:
    """Shuffle 16 bytes in every piece alike; place 16 is the first byte of the second operand's piece (a zero)."""
    return v.shuffle([16 * i + (place if place < 16 else 64) for i in range(4) for place in places])


def two_halves(v: Any) -> Any:
    """(p, q, r, s) -> u16x8: the first two words at each address."""
    two, four = v.shuffle([*range(4)]), v.shuffle([*range(8)])

    def words(p, q, r, s):
        a, b = v.bits(v.u16x2, v.load(v.uint32, p)), v.bits(v.u16x2, v.load(v.uint32, q))
        c, d = v.bits(v.u16x2, v.load(v.uint32, r)), v.bits(v.u16x2, v.load(v.uint32, s))
        return four(two(a, b), two(c, d))

    return v.function(words)
