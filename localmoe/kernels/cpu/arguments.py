"""How tape kernels read their argument block: int64 slots, the first two the control slots' address and a fixed row count."""

from __future__ import annotations

from typing import Any


def slots(v: Any) -> Any:
    """`slot(a, i)` in a kernel: argument i of the block at `a`."""

    def slot(a, i):  # type: ignore[no-untyped-def]
        return v.load(v.int64, a + 8 * i)

    return v.function(slot)


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
