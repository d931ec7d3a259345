"""Pieces that kernels of four rows share with 512-bit vectors, of which one holds the scales of four blocks, a row in
each 128-bit piece; knows no format."""

from __future__ import annotations

from typing import Any


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
