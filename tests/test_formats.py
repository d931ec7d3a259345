"""The block format table against the gguf package, and weights as views of bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from localmoe.formats import FORMAT_BY_ID, FORMATS, Weight


def test_every_format_of_the_gguf_package_is_known_with_its_id_elements_and_bytes() -> None:
    theirs = {t.name: (int(t), *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    ours = {f.name: (f.id, f.elements, f.nbytes) for f in FORMATS.values()}
    theirs["Q8_1"] = (9, 32, 36)  # the package (0.19) has 40: ggml-common.h's block holds two float16, not two float32
    assert {name: ours.get(name) for name in theirs} == theirs


def test_ids_are_unique() -> None:
    assert len(FORMAT_BY_ID) == len(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_of_blocks_has_the_bytes_of_its_blocks(name: str) -> None:
    kind = FORMATS[name]
    assert kind.row_nbytes(3 * kind.elements) == 3 * kind.nbytes


def test_a_stack_is_cut_into_one_view_per_matrix() -> None:
    data = np.arange(2 * 3 * 4 * 4, dtype=np.uint8)
    stack = Weight.whole("w", (2, 3, 4), FORMATS["F32"], data)
    assert [slab.tolist() for slab in stack.slabs] == [data[:48].tolist(), data[48:].tolist()]
    assert all(np.shares_memory(slab, data) for slab in stack.slabs)
    assert (stack.rows, stack.columns, stack.row_nbytes, stack.nbytes, stack.elements) == (3, 4, 16, 96, 24)


def test_part_takes_the_same_rows_of_every_matrix() -> None:
    data = np.arange(2 * 4 * 2 * 4, dtype=np.uint8)
    half = Weight.whole("w", (2, 4, 2), FORMATS["F32"], data).part(1, 3)
    assert half.shape == (2, 2, 2)
    assert [slab.tolist() for slab in half.slabs] == [data[8:24].tolist(), data[40:56].tolist()]


def test_matrices_sees_heads_in_one_projection() -> None:
    data = np.arange(6 * 32 // 32 * 34, dtype=np.uint8)
    heads = Weight.whole("w", (6, 32), FORMATS["Q8_0"], data).matrices(2)
    assert heads.shape == (2, 3, 32)
    assert [slab.size for slab in heads.slabs] == [102, 102]
