"""Rows of a matrix, read one or four at a time, and what is prefetched meanwhile; knows no format and no instruction
set.

Rows that are read at once, one or four, lie in one piece, and prefetched is what follows them, line after line, up to
the last row and not beyond, into the level of caches that `Isa.stream_level` names. Measured on Zen 4: a distance of
its own for each of four rows leaves the beginnings of three unfetched or runs at a half of the speed; the first level
in place of the second loses a quarter at rows of 2 KB and more, 2 KB in place of 8 another one at rows under 2 KB.
Where the threads together saturate memory, prefetches are dropped: the second one of each line, for which most are
there already, takes Q6_K from 87 to 97 % of a plain read. And where a mapped file lies in pages of 4 KB, one line of
each page is wanted earlier still, so that the page's address is known by then: whole models in one thread, Q6_K +6 %,
Q4_K_M +3 %, Q8_0 +1 %.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FAR, NEAR = 8192, 512  # bytes beyond the next rows at which a line is prefetched, and prefetched once more
PAGE, PAGES = 4096, 16384  # the smallest page; bytes beyond the next rows at which a line of each page is prefetched


def stream(v: Any) -> tuple[Any, Any, Any]:
    """Three kernel functions for rows up to the address `end`, of which `nbytes` are read at once.

    `first(begin, end, nbytes)` prefetches what comes before the others begin; `places(p, end, nbytes)` -> (far, near)
    while rows are read from p on; `follow(far, near, start, stop)` prefetches bytes `start` to `stop` of what follows.
    """

    def first(begin, end, nbytes):
        for page in range(begin, min(begin + nbytes + PAGES, end), PAGE):
            v.prefetch_second(page)
        for line in range(0, min(nbytes + FAR, end - begin), 64):
            v.prefetch_stream(begin + line)

    def places(p, end, nbytes):
        for page in range(p + nbytes + PAGES, min(p + 2 * nbytes + PAGES, end), PAGE):
            v.prefetch_second(page)
        return min(p + nbytes + FAR, end - nbytes), min(p + nbytes + NEAR, end - nbytes)

    def follow(far, near, start, stop):
        for line in range(start, stop, 64):
            v.prefetch_stream(far + line)
            v.prefetch_stream(near + line)

    return v.function(first), v.function(places), v.function(follow)


def row_totals(v: Any) -> Any:
    """(five vectors) -> four results: each the total of its own vector and of its quarter of the fifth."""
    quarter = v.lanes // 4
    q0, q1, q2, q3 = (v.shuffle([*range(quarter * i, quarter * (i + 1))]) for i in range(4))

    def totals(sums):
        a, b, c, d, fifth = sums
        first, second = v.total(a) + v.total(q0(fifth, fifth)), v.total(b) + v.total(q1(fifth, fifth))
        return first, second, v.total(c) + v.total(q2(fifth, fifth)), v.total(d) + v.total(q3(fifth, fifth))

    return v.function(totals)


def four_rows(
    v: Any, step: Any, step_nbytes: int, elements: int, rest: Any = None, near: int = 0, totals: Any = None
) -> Callable[..., None]:
    """The kernel whose contract is `matmul.py`'s, of `step(p, q, r, s, activations, columns, first, sums)` -> sums.

    A step multiplies `elements` columns from column `first` on, in four rows whose blocks lie at p, q, r and s. sums
    are five vectors of float32, of which `totals` makes the rows' results, as `row_totals` unless given. `rest` does
    the same for 32 columns, where `elements` do not divide the columns. Rows behind the last are the last once more, so
    that a row's bits depend on no other row.

    With `near`, each row's lines come into the first level too, that many bytes ahead: Q8_0, which has instructions to
    spare, gains a tenth.
    """
    rest_nbytes, others, lines = step_nbytes * 32 // elements, rest is not None, 4 * step_nbytes & -64
    rest = rest or step
    first_lines, places, follow = stream(v)
    totals = totals or row_totals(v)

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
            a, b, c, d = totals(sums)
            v.store(out + row * 4, a)
            v.store(out + row1 * 4, b)
            v.store(out + row2 * 4, c)
            v.store(out + row3 * 4, d)

    return gemv
