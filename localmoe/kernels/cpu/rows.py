"""What is prefetched while rows of a matrix are read; knows no format and no instruction set.

Rows that are read at once, one or four, lie in one piece, and prefetched is what follows them, line after line, up to
the last row and not beyond. Measured on Zen 4: a distance of its own for each of four rows leaves the beginnings of
three unfetched or runs at a half of the speed; the first level in place of the second loses a quarter at rows of 2 KB
and more, 2 KB in place of 8 another one at rows under 2 KB. Where the threads together saturate memory, prefetches are
dropped: the second one of each line, for which most are there already, takes Q6_K from 87 to 97 % of a plain read. And
where a mapped file lies in pages of 4 KB, one line of each page is wanted earlier still, so that the page's address is
known by then: whole models in one thread, Q6_K +6 %, Q4_K_M +3 %, Q8_0 +1 %.
"""

from __future__ import annotations

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
            v.prefetch_second(begin + line)

    def places(p, end, nbytes):
        for page in range(p + nbytes + PAGES, min(p + 2 * nbytes + PAGES, end), PAGE):
            v.prefetch_second(page)
        return min(p + nbytes + FAR, end - nbytes), min(p + nbytes + NEAR, end - nbytes)

    def follow(far, near, start, stop):
        for line in range(start, stop, 64):
            v.prefetch_second(far + line)
            v.prefetch_second(near + line)

    return v.function(first), v.function(places), v.function(follow)
