"""Look-ups of words and entries and choices by bits, the vector operations of code books with 512-bit vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernel_calls import function

from localmoe.kernels.cpu import build, isa, matmul  # noqa: F401  (it registers kernels)
from localmoe.kernels.cpu.build import kernel

pytestmark = pytest.mark.skipif("avx512" not in isa.runnable(), reason="this processor has no 512-bit vectors")
SIZES = (64, 128, 256, 512)
BOOK = np.random.default_rng(1).permutation(1 << 16)
ENTRIES = np.random.default_rng(2).integers(0, 256, (1024, 8))


def _register(size: int) -> None:
    @kernel(f"test_words_{size}", arguments=2, isa="avx512")
    def words(v: Any) -> Callable[..., None]:
        look_up = v.words([int(value) for value in BOOK[:size]])

        def run(source, target):  # type: ignore[no-untyped-def]
            v.store(target, look_up(v.load(v.u16x32, source)))

        return run


for _size in SIZES:
    _register(_size)


@kernel("test_entries", arguments=2, isa="avx512")
def entries(v: Any) -> Callable[..., None]:
    book = v.entries(ENTRIES)

    def run(source, target):  # type: ignore[no-untyped-def]
        v.store(target, book(source))

    return run


@kernel("test_choices", arguments=2, isa="avx512")
def choices(v: Any) -> Callable[..., None]:
    def run(source, target):  # type: ignore[no-untyped-def]
        mask, x, y = v.load(v.u16x32, source), v.load(v.u16x32, source + 64), v.load(v.u16x32, source + 128)
        v.store(target, v.merged(mask, x, y))
        v.store(target + 64, v.negative(v.load(v.i8x64, source + 64), v.load(v.int64, source)))

    return run


@pytest.mark.parametrize("size", SIZES)
def test_words_are_found_whatever_the_higher_bits_of_their_indices_are(size: int) -> None:
    for indices in np.random.default_rng(size).integers(0, 1 << 16, (64, 32), dtype=np.uint16):
        found = np.zeros(32, np.uint16)
        function("avx512", f"test_words_{size}", 2)(indices.ctypes.data, found.ctypes.data)
        assert (found == BOOK[indices % size]).all()


def test_entries_are_rows_of_their_table() -> None:
    indices = np.array([0, 1023, 512, 1, 7, 1022, 300, 0], np.uint16)
    found = np.zeros((8, 8), np.uint8)
    function("avx512", "test_entries", 2)(indices.ctypes.data, found.ctypes.data)
    assert (found == ENTRIES[indices]).all()


def test_bits_and_signs_are_chosen_by_a_mask() -> None:
    given = np.random.default_rng(3).integers(0, 1 << 16, (3, 32), dtype=np.uint16)
    found = np.zeros((2, 32), np.uint16)
    function("avx512", "test_choices", 2)(given.ctypes.data, found.ctypes.data)
    mask, x, y = given
    assert (found[0] == ((x & mask) | (y & ~mask))).all()
    values, negative = x.view(np.int8), np.unpackbits(mask.view(np.uint8)[:8], bitorder="little").astype(bool)
    assert (found[1].view(np.int8) == np.where(negative, -values, values)).all()


def test_vectors_that_are_kept_on_the_stack_lie_within_cache_lines() -> None:
    emitted = build.assembly("gemv_iq3_s", isa.named("avx512"))
    assert "(%rsp), %zmm" in emitted and "$-64, %rsp" in emitted
