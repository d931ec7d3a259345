"""Argument blocks of tape kernels: int64 slots, the first two the control slots' address and a fixed row count; what
lowering puts into them, and how kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class At:
    """A place in the arena, in bytes; becomes an address when the tape is linked."""

    offset: int


@dataclass(frozen=True, slots=True)
class Function:
    """A kernel by name; becomes its address when the tape is linked."""

    name: str


Argument = int | float | At | Function


def slots(v: Any) -> Any:
    """`slot(a, i)` in a kernel: argument i of the block at `a`."""

    def slot(a, i):  # type: ignore[no-untyped-def]
        return v.load(v.int64, a + 8 * i)

    return v.function(slot)


def share(v: Any) -> Any:
    """`share(count, thread, threads)` in a kernel: (start, stop) of a thread's part of `count` floats, by whole lines
    of 16, so that every op shares the same array in the same way."""

    def part(count, thread, threads):  # type: ignore[no-untyped-def]
        lines = (count + 15) // 16
        return min(lines * thread // threads * 16, count), min(lines * (thread + 1) // threads * 16, count)

    return v.function(part)


def row_count(v: Any) -> Any:
    """`rows(a)` in a kernel: the fixed row count, or the tokens of this step where it is 0."""

    def rows(a):  # type: ignore[no-untyped-def]
        fixed = v.load(v.int64, a + 8)
        return fixed if fixed > 0 else v.load(v.int64, v.load(v.int64, a))

    return v.function(rows)


def step_position(v: Any) -> Any:
    """`position(a)` in a kernel: the cache position of the step's first token."""

    def position(a):  # type: ignore[no-untyped-def]
        return v.load(v.int64, v.load(v.int64, a) + 8)

    return v.function(position)


def first_visible(v: Any) -> Any:
    """`first(position, window, chunk)` in a kernel: the first position that a query sees (`Ops.attention`)."""

    def first(position, window, chunk):  # type: ignore[no-untyped-def]
        if chunk > 0:
            return position - position % chunk
        return position + 1 - window if window > 0 and position + 1 > window else 0

    return v.function(first)


def soft_capped(v: Any) -> Any:
    """`capped(x, cap)` in a kernel: cap · tanh(x / cap); tanh(z) is 1 - 2 / (exp(2 z) + 1)."""

    def capped(x, cap):  # type: ignore[no-untyped-def]
        one = v.splat(v.f32, np.float32(1))
        two = one + one
        return cap * (one - two / (v.exp(two * x / cap) + one))

    return v.function(capped)
