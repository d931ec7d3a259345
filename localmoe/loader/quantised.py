"""Quantised matrices of safetensors folders, their parts brought together under one name; knows no architecture.

8-bit floats stay where they are, with their scales as a second part: a copy would double a model of 671 GB. 4-bit
numbers lie transposed or in an order that no kernel reads: they become GGML's blocks, each matrix when it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.formats import F8_E4M3, FORMATS, Scales, Weight
from localmoe.loader.quantization import WHOLE_ROW, Quantization
from localmoe.loader.safetensors import READABLE, Entry
from localmoe.loader.source import shown

# Names of the scales of "X.weight": DeepSeek's, compressed-tensors', Mistral's.
SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight")
# How activations, keys and values are to be rounded, which they are not here.
ROUNDINGS = re.compile(
    r".*\.(input_scale|activation_scale|qscale_act|[qkv]_scale|input_global_scale|output_scale)"
    r"|.*_activation_scale|.*_fake_quantizer\..*"
)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each nibble in a word
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Quantised:
    """A matrix made of several tensors; to a folder's reader it is as one `Entry`."""

    name: str
    path: Path
    make: Callable[[], Weight]

    @cached_property
    def _made(self) -> Weight:
        return self.make()

    def weight(self, name: str) -> Weight:
        """The matrix under GGUF's name. Raises FileFormatError for parts that do not fit together."""
        return replace(self._made, name=name)


Stored = Entry | Quantised


def joined(entries: Mapping[str, Entry], quantization: Quantization | None) -> dict[str, Stored]:
    """Every tensor as it is, but the parts of a quantised matrix as one, under the name that ends in "weight".

    Raises: UnsupportedError for a dtype that nothing here reads, FileFormatError where a part is missing.
    """
    if not quantization:
        return dict(entries)
    left = {name: entry for name, entry in entries.items() if not ROUNDINGS.fullmatch(name)}
    found: dict[str, Stored] = {}
    for name in list(left):
        if name not in left:
            continue
        head, _, last = name.rpartition(".")
        if left[name].dtype == "F8_E4M3":
            found[name] = _float8(left, name, quantization)
        elif last == "qweight" and quantization.form in ("gptq", "awq"):
            found[f"{head}.weight"] = _words(left, head, quantization)
        elif last == "weight_packed" and quantization.form == "packed":
            found[f"{head}.weight"] = _packed(left, head, quantization)
    if twice := found.keys() & left.keys():
        raise FileFormatError(f"tensor {shown(min(twice))} is there twice: quantised, and as it is")
    return found | left


def quantised_names(names: Iterable[str], quantization: Quantization | None) -> list[str]:
    """The names that `joined` makes of an index's, which says no dtype: parts of a matrix become "weight"."""
    if not quantization:
        return list(names)
    parts = (*SCALES, "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_shape", "weight_zero_point")
    heads = [(name, *name.rpartition(".")) for name in names if not ROUNDINGS.fullmatch(name)]
    return list(dict.fromkeys(f"{head}.weight" if last in parts else name for name, head, _, last in heads))


def _part(left: dict[str, Entry], name: str, owner: str) -> Entry:
    if name not in left:
        raise FileFormatError(f"tensor {shown(owner)} has no {shown(name)} beside it")
    return left.pop(name)


def _float8(left: dict[str, Entry], name: str, quantization: Quantization) -> Quantised:
    entry, head = left.pop(name), name.removesuffix("weight")
    beside = next((f"{head}{scale}" for scale in SCALES if f"{head}{scale}" in left), f"{head}{SCALES[0]}")
    scales = _part(left, beside, name)
    return Quantised(name, entry.path, partial(_scaled, entry, scales, quantization.tile))


def _scaled(entry: Entry, scales: Entry, tile: tuple[int, int] | None) -> Weight:
    """One scale a matrix, a row, or a tile of rows and columns; float32 ones stay where they are."""
    values, shape = floats(scales), entry.shape
    if len(shape) != 2:
        raise UnsupportedError(f"{entry.path}: tensor {shown(entry.name)} has shape {shape}, possible are two axes")
    rows, columns = shape
    if values.size == 1:
        tile = (rows, columns)
    elif scales.shape in ((rows,), (rows, 1)) and (tile is None or tile[0] > 1):
        tile = (1, columns)
    height, width = tile or shape
    grid = (-(-rows // height), -(-columns // width))
    if values.size != grid[0] * grid[1] or (len(values.shape) > 1 and values.shape != grid):
        expected = f"{grid} for {height} × {width} weights each" if tile else f"(1,) or ({rows}, 1)"
        found = f"{scales.path}: tensor {shown(scales.name)} has shape {scales.shape}"
        raise FileFormatError(f"{found}, expected {expected}")
    whole = entry.weight(entry.name)
    return replace(whole, format=F8_E4M3, scales=(Scales(values.reshape(grid), height, width),))


def _words(left: dict[str, Entry], head: str, quantization: Quantization) -> Quantised:
    """GPTQ and AWQ, the matrix transposed: words of eight numbers that lie in one column (GPTQ) or one row (AWQ)."""
    qweight, qzeros, scales = (
        _part(left, f"{head}.{last}", f"{head}.qweight") for last in ("qweight", "qzeros", "scales")
    )
    order = left.pop(f"{head}.g_idx", None)
    make = partial(_from_words, qweight, qzeros, scales, order, quantization)
    return Quantised(f"{head}.weight", qweight.path, make)


def _from_words(qweight: Entry, qzeros: Entry, scales: Entry, order: Entry | None, how: Quantization) -> Weight:
    step, grid = floats(scales), array(scales).shape
    numbers, zeros = _nibbles(qweight, axis=0 if how.form == "gptq" else 1), _nibbles(qzeros, axis=1)
    if how.form == "awq":
        numbers, zeros = (
            x.reshape(len(x), -1, 8)[..., np.argsort(AWQ_ORDER)].reshape(x.shape) for x in (numbers, zeros)
        )
    columns, rows = numbers.shape
    group = columns if how.group == WHOLE_ROW else min(how.group, columns)
    _check_grid(scales, grid, (-(-columns // group), rows))
    _check_grid(qzeros, zeros.shape, grid)
    if order is not None and not np.array_equal(array(order, "I32"), np.arange(columns) // group):
        raise UnsupportedError(
            f"{order.path}: tensor {shown(order.name)} permutes columns (desc_act); possible is none"
        )
    return blocks(qweight.name, numbers.T, step.T, zeros.T + np.uint8(how.zero_added), group)


def _packed(left: dict[str, Entry], head: str, quantization: Quantization) -> Quantised:
    """compressed-tensors: words of eight numbers of one row; zeros are packed along the rows."""
    packed, scales, shape = (
        _part(left, f"{head}.{last}", f"{head}.weight_packed")
        for last in ("weight_packed", "weight_scale", "weight_shape")
    )
    zeros = None if quantization.symmetric else _part(left, f"{head}.weight_zero_point", packed.name)
    return Quantised(f"{head}.weight", packed.path, partial(_from_packed, packed, scales, shape, zeros, quantization))


def _from_packed(packed: Entry, scales: Entry, shape: Entry, zeros: Entry | None, how: Quantization) -> Weight:
    numbers, step = _nibbles(packed, axis=1), floats(scales)
    sizes = array(shape, "I64", "I32").tolist()
    rows, columns = numbers.shape
    if sizes != [rows, columns]:
        found = f"{shape.path}: tensor {shown(shape.name)} says {sizes}"
        raise FileFormatError(f"{found}, but {shown(packed.name)} holds {[rows, columns]}")
    group = columns if how.group == WHOLE_ROW else min(how.group, columns)
    _check_grid(scales, step.shape, (rows, -(-columns // group)))
    stored = np.full(step.shape, 8, np.uint8) if zeros is None else _nibbles(zeros, axis=0)[:rows]
    if zeros is not None:
        _check_grid(zeros, stored.shape, step.shape)
    return blocks(packed.name, numbers, step, stored, group)


def blocks(name: str, numbers: Array, scales: Array, zeros: Array, group: int) -> Weight:
    """scale · (number - zero), numbers 0 to 15 (R, C), scales and zeros (R, groups), as GGML's blocks of 32.

    A zero of 8 everywhere gives Q4_0, exact but for scales that float16 does not hold; else Q4_1, whose minimum
    -scale · zero is rounded to float16, by at most 1/137 of a step.
    """
    rows, columns = numbers.shape
    if columns % 32 or group % 32:
        raise UnsupportedError(
            f"tensor {shown(name)} has rows of {columns} in groups of {group}, possible are whole 32s"
        )
    half = scales.astype(np.float16)
    if not np.isfinite(half).all():
        raise FileFormatError(f"tensor {shown(name)}: a scale of {np.abs(scales).max()} is beyond float16")
    parts = [half] if (zeros == 8).all() else [half, (-scales * zeros).astype(np.float16)]
    per_block = [np.repeat(p, group // 32, axis=1)[:, : columns // 32, None].view(np.uint8) for p in parts]
    low, high = np.moveaxis(numbers.reshape(rows, -1, 2, 16), 2, 0)
    made = np.ascontiguousarray(np.concatenate([*per_block, low | (high << 4)], axis=2))
    format = FORMATS["Q4_0" if len(parts) == 1 else "Q4_1"]
    return Weight(name, (rows, columns), format, (made.reshape(-1),))


def _nibbles(entry: Entry, axis: int) -> Array:
    """Eight numbers of each 32-bit word, the lowest first, side by side along `axis`."""
    words = array(entry, "I32")
    if words.ndim != 2:
        raise FileFormatError(f"{entry.path}: tensor {shown(entry.name)} has shape {entry.shape}, expected two axes")
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    each = ((words.view(np.uint32)[..., None] >> shifts) & 15).astype(np.uint8)  # (a, b, 8)
    if axis == 0:
        each = each.transpose(0, 2, 1)
    return np.ascontiguousarray(each.reshape(-1, words.shape[1]) if axis == 0 else each.reshape(len(words), -1))


def _check_grid(entry: Entry, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        where = f"{entry.path}: tensor {shown(entry.name)}"
        raise FileFormatError(f"{where} has {found} numbers, expected {expected} for the groups of its matrix")


def array(entry: Entry, *dtypes: str) -> Array:
    """The tensor as numpy has it, a view of the file. Raises FileFormatError for another dtype, or not two axes."""
    kinds = {
        "F32": np.float32,
        "F16": np.float16,
        "BF16": np.uint16,
        "F8_E8M0": np.uint8,
        "I32": np.int32,
        "I64": np.int64,
    }
    if entry.dtype not in (dtypes or kinds):
        expected = " or ".join(dtypes or kinds)
        raise FileFormatError(f"{entry.path}: tensor {shown(entry.name)} has dtype {entry.dtype}, expected {expected}")
    piece = np.frombuffer(entry.data, np.uint8, entry.stop - entry.start, entry.start)
    return piece.view(kinds[entry.dtype]).reshape(entry.shape)


def floats(entry: Entry) -> Array:
    """The tensor as float32; a view where it is stored so."""
    found = array(entry, *READABLE, "F8_E8M0")
    if entry.dtype == "BF16":
        return (found.astype(np.uint32) << 16).view(np.float32)
    if entry.dtype == "F8_E8M0":  # powers of two alone
        return (found.astype(np.uint32) << 23).view(np.float32)
    return found.astype(np.float32, copy=False)
