"""Quantised matrices of safetensors folders, their parts brought together under one name; knows no architecture.

8-bit floats stay where they are, with their scales as a second part: a copy would double a model of 671 GB. 4-bit
numbers lie transposed or in an order that no kernel reads: they become GGML's blocks, each matrix when it is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.formats import F8_E4M3, FORMATS, Bytes, Format, MadeSlabs, Scales, Step, Weight
from localmoe.loader.cuts import cuts, rows_of
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
Q4_0, Q4_1 = FORMATS["Q4_0"], FORMATS["Q4_1"]
FLOATS = (*READABLE, "F8_E8M0")
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


@dataclass(frozen=True, eq=False)
class Integers:
    """A matrix of 4-bit numbers, whose parts become GGML's blocks band by band when it is asked for.

    `parts` come with how many rows of the matrix (columns, where it is stored transposed) a stored row of theirs is
    about, 0 where it is about all. `find` reads the zeros, which the format depends on.
    """

    name: str
    path: Path
    shape: tuple[int, int]
    parts: Sequence[tuple[Entry, int]]
    bands: Sequence[slice]
    find: Callable[[], Format]
    make: Callable[[Format, slice, Sequence[Bytes], Bytes], None]

    def weight(self, name: str, format: Format | None = None) -> Weight:
        """The matrix under GGUF's name, in the format that is found, or that of another expert of its layer."""
        chosen = format or self.find()
        nbytes = self.shape[0] * chosen.row_nbytes(self.shape[1])
        return Weight(name, self.shape, chosen, MadeSlabs(1, nbytes, lambda _: self._steps(chosen)))

    def _steps(self, format: Format) -> list[Step]:
        return [Step(self._views(band), partial(self.make, format, band)) for band in self.bands]

    def _views(self, band: slice) -> tuple[Bytes, ...]:
        return tuple(
            rows_of(entry.bytes, slice(band.start // per, -(-band.stop // per)), entry.shape[0]) if per else entry.bytes
            for entry, per in self.parts
        )


Stored = Entry | Quantised | Integers


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
    values, shape = floats(scales, array(scales, *FLOATS)), entry.shape
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


def _words(left: dict[str, Entry], head: str, how: Quantization) -> Integers:
    """GPTQ and AWQ, the matrix transposed: words of eight numbers that lie in one column (GPTQ) or one row (AWQ)."""
    qweight, qzeros, scales = (
        _part(left, f"{head}.{last}", f"{head}.qweight") for last in ("qweight", "qzeros", "scales")
    )
    order, gptq = left.pop(f"{head}.g_idx", None), how.form == "gptq"
    rows, columns = _unpacked_shape(qweight, axis=0 if gptq else 1)[::-1]
    group = _group_of(how, columns, qweight)
    require(scales, *FLOATS)
    _check_grid(scales, scales.shape, (-(-columns // group), rows))
    _check_grid(qzeros, _unpacked_shape(qzeros, axis=1), scales.shape)
    if order:
        require(order, "I32")
        _check_grid(order, order.shape, (columns,))

    def unpacked(words: Array, axis: int) -> Array:
        numbers = _nibbles(words, axis)
        return (
            numbers if gptq else numbers.reshape(len(numbers), -1, 8)[..., np.argsort(AWQ_ORDER)].reshape(numbers.shape)
        )

    def zeros_of(words: Array) -> Array:
        return unpacked(words, axis=1).T + np.uint8(how.zero_added)

    def check_order(band: slice, found: Bytes) -> None:
        if order and not np.array_equal(typed(found, order), np.arange(band.start, band.stop) // group):
            raise UnsupportedError(
                f"{order.path}: tensor {shown(order.name)} permutes columns (desc_act); possible is none"
            )

    def format() -> Format:
        if order:
            check_order(slice(0, columns), order.bytes)
        return Q4_0 if (zeros_of(array(qzeros, "I32")) == 8).all() else Q4_1

    def make(format: Format, band: slice, views: Sequence[Bytes], slab: Bytes) -> None:
        words, zeros, step = (typed(data, entry) for data, (entry, _) in zip(views[:3], parts, strict=False))
        check_order(band, views[-1])
        numbers = unpacked(words, axis=0 if gptq else 1)
        made = blocks(qweight.name, numbers.T, floats(scales, step).T, zeros_of(zeros), group, format)
        slab.reshape(rows, columns // 32, -1)[:, band.start // 32 : band.stop // 32] = made

    parts = [(qweight, 8 if gptq else 1), (qzeros, group), (scales, group), *([(order, 1)] if order else [])]
    bands = cuts(columns, rows // 2, group)
    return Integers(f"{head}.weight", qweight.path, (rows, columns), parts, bands, format, make)


def _packed(left: dict[str, Entry], head: str, how: Quantization) -> Integers:
    """compressed-tensors: words of eight numbers of one row; zeros are packed along the rows."""
    packed, scales, shape = (
        _part(left, f"{head}.{last}", f"{head}.weight_packed")
        for last in ("weight_packed", "weight_scale", "weight_shape")
    )
    zeros = None if how.symmetric else _part(left, f"{head}.weight_zero_point", packed.name)
    rows, columns = _unpacked_shape(packed, axis=1)
    group = _group_of(how, columns, packed)
    require(scales, *FLOATS)
    require(shape, "I64", "I32")
    _check_grid(shape, shape.shape, (2,))
    _check_grid(scales, scales.shape, (rows, -(-columns // group)))
    if zeros is not None:
        height, groups = _unpacked_shape(zeros, axis=0)
        _check_grid(zeros, (rows if 0 <= height - rows < 8 else height, groups), scales.shape)

    def format() -> Format:
        return Q4_0 if zeros is None or (_nibbles(array(zeros, "I32"), 0)[:rows] == 8).all() else Q4_1

    def make(format: Format, band: slice, views: Sequence[Bytes], slab: Bytes) -> None:
        words, step, sizes = (typed(data, entry) for data, (entry, _) in zip(views[:3], parts, strict=False))
        if sizes.tolist() != [rows, columns]:
            found = f"{shape.path}: tensor {shown(shape.name)} says {sizes.tolist()}"
            raise FileFormatError(f"{found}, but {shown(packed.name)} holds {[rows, columns]}")
        zero = _nibbles(typed(views[-1], zeros), 0)[: len(words)] if zeros else np.full(step.shape, 8, np.uint8)
        made = blocks(packed.name, _nibbles(words, axis=1), floats(scales, step), zero, group, format)
        slab.reshape(rows, columns // 32, -1)[band] = made

    parts = [(packed, 1), (scales, 1), (shape, 0), *([(zeros, 8)] if zeros else [])]
    return Integers(f"{head}.weight", packed.path, (rows, columns), parts, cuts(rows, columns // 2, 8), format, make)


def _group_of(how: Quantization, columns: int, entry: Entry) -> int:
    """Columns that share a scale. Raises UnsupportedError unless GGML's blocks of 32 have one each."""
    group = columns if how.group == WHOLE_ROW else min(how.group, columns)
    if columns % 32 or group % 32 or not columns:
        found = f"tensor {shown(entry.name)} has rows of {columns} in groups of {group}"
        raise UnsupportedError(f"{found}, possible are whole 32s")
    return group


def blocks(name: str, numbers: Array, scales: Array, zeros: Array, group: int, format: Format) -> Array:
    """scale · (number - zero), numbers 0 to 15 (R, C), scales and zeros (R, groups), as GGML's blocks of 32:
    (R, C / 32, bytes).

    Q4_0 is for zeros of 8 everywhere, exact but for scales that float16 does not hold. The minimum of Q4_1,
    -scale · zero, is rounded to float16, by at most 1/137 of a step.
    """
    half = scales.astype(np.float16)
    if not np.isfinite(half).all():
        raise FileFormatError(f"tensor {shown(name)}: a scale of {np.abs(scales).max()} is beyond float16")
    if format is Q4_0 and not (zeros == 8).all():
        raise UnsupportedError(f"tensor {shown(name)} has other zeros than 8, unlike the first expert of its layer")
    rows, columns = numbers.shape
    parts = [half] if format is Q4_0 else [half, (-scales * zeros).astype(np.float16)]
    per_block = [np.repeat(p, group // 32, axis=1)[:, : columns // 32, None].view(np.uint8) for p in parts]
    low, high = np.moveaxis(numbers.reshape(rows, -1, 2, 16), 2, 0)
    return np.concatenate([*per_block, low | (high << 4)], axis=2)


def _unpacked_shape(entry: Entry, axis: int) -> tuple[int, int]:
    """Of the numbers in 32-bit words, eight each, side by side along `axis`."""
    require(entry, "I32")
    if len(entry.shape) != 2 or 0 in entry.shape:
        raise FileFormatError(f"{entry.path}: tensor {shown(entry.name)} has shape {entry.shape}, expected two axes")
    height, width = entry.shape
    return (8 * height, width) if axis == 0 else (height, 8 * width)


def _nibbles(words: Array, axis: int) -> Array:
    """Eight numbers of each 32-bit word, the lowest first, side by side along `axis`."""
    height, width = words.shape
    found = np.empty((height, 8, width) if axis == 0 else (height, width, 8), np.uint8)
    for i, place in enumerate(np.moveaxis(found, 1 if axis == 0 else 2, 0)):
        place[:] = (words.view(np.uint32) >> np.uint32(4 * i)) & np.uint32(15)
    return found.reshape((-1, width) if axis == 0 else (height, -1))


def _check_grid(entry: Entry, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        where = f"{entry.path}: tensor {shown(entry.name)}"
        raise FileFormatError(f"{where} has {found} numbers, expected {expected} for the groups of its matrix")


KINDS = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F8_E8M0": np.uint8, "I32": np.int32, "I64": np.int64,
}  # fmt: skip


def array(entry: Entry, *dtypes: str) -> Array:
    """The tensor as numpy has it, a view of the file. Raises FileFormatError for another dtype."""
    require(entry, *dtypes)
    return typed(entry.bytes, entry)


def require(entry: Entry, *dtypes: str) -> None:
    """Raises FileFormatError for another dtype."""
    if entry.dtype not in dtypes:
        expected = " or ".join(dtypes)
        raise FileFormatError(f"{entry.path}: tensor {shown(entry.name)} has dtype {entry.dtype}, expected {expected}")


def typed(data: Bytes, entry: Entry) -> Array:
    """Whole rows of the tensor as numpy has them."""
    return data.view(KINDS[entry.dtype]).reshape(-1, *entry.shape[1:])


def floats(entry: Entry, found: Array) -> Array:
    """Rows of the tensor as float32; a view where they are stored so."""
    if entry.dtype == "BF16":
        return (found.astype(np.uint32) << 16).view(np.float32)
    if entry.dtype == "F8_E8M0":  # powers of two alone
        return (found.astype(np.uint32) << 23).view(np.float32)
    return found.astype(np.float32, copy=False)
