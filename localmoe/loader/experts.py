"""Experts of safetensors folders that lie otherwise than a GGUF file's, brought to its form; must not know config.json.

Where rows stay together the new tensor is a view. Transposed matrices and MXFP4 are made, expert by expert, when one is
asked for; gate and up of the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.formats import BF16, F16, F32, FORMATS, Bytes, Format, MadeSlabs, Step, Weight
from localmoe.loader.config_json import Keys, Makers
from localmoe.loader.cuts import cuts, rows_of
from localmoe.loader.source import shown

PACKED = FORMATS["MXFP4"]
HALVES = ("gate", "up")
TILE = 128  # rows or columns that are made at a time
LOW = np.uint64(0x0F0F_0F0F_0F0F_0F0F)  # the low nibbles of 8 bytes


def separated_experts(interleaved: bool) -> Callable[[Makers, Keys], None]:
    """transformers' experts that are stored transposed, (E, D, 2 F) and (E, F, D): gate and up in alternate columns, or
    one after the other."""

    def rewrite(makers: Makers, keys: Keys) -> None:
        for name in list(makers):
            if name.endswith("ffn_gate_up_exps.weight"):
                _replace(makers, name, partial(_turned, interleaved))
            elif name.endswith("ffn_gate_up_exps.bias"):
                _replace(makers, name, partial(_columns, interleaved))
            elif name.endswith("ffn_down_exps.weight"):
                makers[name] = partial(_turned, interleaved, makers[name], "down")

    return rewrite


def gpt_oss_tensors(makers: Makers, keys: Keys) -> None:
    """Sinks get a suffix; experts are transposed and interleaved floats, or MXFP4 of which only the rows of gate and up
    are interleaved."""
    for name in [name for name in makers if name.endswith("attn_sinks")]:
        makers[f"{name}.weight"] = makers.pop(name)
    separated_experts(interleaved=True)(makers, keys)
    for name in [name for name in makers if name.endswith("exps.blocks")]:
        scales = name.replace(".blocks", ".scales")
        if scales not in makers:
            raise FileFormatError(f"tensor {shown(name)} has no {shown(scales)} beside it")
        pair, weight = (makers.pop(name), makers.pop(scales)), name.replace(".blocks", ".weight")
        for part in HALVES if "gate_up" in name else ("down",):
            makers[weight.replace("gate_up", part)] = partial(_packed, *pair, part)


def halved_shared_expert(makers: Makers, keys: Keys) -> None:
    """A shared expert's gate and up in one matrix, gate first."""
    width = keys["expert_shared_feed_forward_length"]
    for name in [name for name in makers if name.endswith("ffn_gate_up_shexp.weight")]:
        make = makers.pop(name)
        makers[name.replace("gate_up", "gate")] = partial(_rows, make, 0, width)
        makers[name.replace("gate_up", "up")] = partial(_rows, make, width, 2 * width)


def _replace(makers: Makers, name: str, half: Callable[[Callable[[], Weight], str], Weight]) -> None:
    make = makers.pop(name)
    for part in HALVES:
        makers[name.replace("gate_up", part)] = partial(half, make, part)


def _rows(make: Callable[[], Weight], start: int, stop: int) -> Weight:
    weight = make()
    if len(weight.shape) != 2 or weight.rows != 2 * (stop - start):
        raise _misshapen(weight, f"{2 * (stop - start)} rows")
    return weight.part(start, stop)


def _half(columns: int, interleaved: bool, part: str) -> slice:
    """The columns of gate or up in a fused tensor; all of down's."""
    if part == "down":
        return slice(None)
    if interleaved:
        return slice(HALVES.index(part), None, 2)
    return slice(columns // 2) if part == "gate" else slice(columns // 2, None)


def _turned(interleaved: bool, make: Callable[[], Weight], part: str) -> Weight:
    """A part's columns of every matrix as rows: (E, D, N) -> (E, n, D)."""
    weight = make()
    if len(weight.shape) != 3:
        raise _misshapen(weight, "three axes")
    _require_floats(weight)
    matrices, columns, stored = weight.shape
    kept = _half(stored, interleaved, part)
    shape = (matrices, len(range(stored)[kept]), columns)

    def turn(rows: slice, views: Sequence[Bytes], slab: Bytes) -> None:
        turned = _elements(slab, weight.format, columns)[:, rows]
        found = _elements(views[0], weight.format, stored)[:, kept]
        for start in range(0, shape[1], TILE):  # of which a copy, turned, is three times as quick as the whole
            turned[start : start + TILE] = np.ascontiguousarray(found[:, start : start + TILE]).T

    def steps(matrix: int) -> list[Step]:
        parts = cuts(columns, weight.row_nbytes)
        return [Step((rows_of(weight.slabs[matrix], rows, columns),), partial(turn, rows)) for rows in parts]

    slabs = MadeSlabs(matrices, shape[1] * weight.format.row_nbytes(columns), steps)
    return Weight(weight.name.replace("gate_up", part), shape, weight.format, slabs)


def _columns(interleaved: bool, make: Callable[[], Weight], part: str) -> Weight:
    """A part's columns of a matrix (E, 2 F)."""
    weight = make()
    if len(weight.shape) != 2:
        raise _misshapen(weight, "two axes")
    _require_floats(weight)
    whole = _elements(weight.slabs[0], weight.format, weight.columns)
    kept = np.ascontiguousarray(whole[:, _half(weight.columns, interleaved, part)])
    return Weight(weight.name.replace("gate_up", part), kept.shape, weight.format, (kept.view(np.uint8).reshape(-1),))


def _require_floats(weight: Weight) -> None:
    if weight.format not in (F32, F16, BF16):
        found = f"tensor {shown(weight.name)} is {weight.format.name}"
        raise UnsupportedError(f"{found}; matrices that have to be transposed can be F32, F16 and BF16")


def _elements(slab: Bytes, format: Format, columns: int) -> Any:
    """Bytes of F32, F16 or BF16 as a matrix of elements to be moved, not reckoned with."""
    return slab.view(f"u{format.nbytes}").reshape(-1, columns)


def _packed(blocks: Callable[[], Weight], scales: Callable[[], Weight], part: str) -> Weight:
    """Nibbles (E, N, D / 32, 16) and scales (E, N, D / 32) of OpenAI's MXFP4 as GGML's blocks of 17 bytes, (E, n, D).

    Both hold 32 values as 16 bytes: byte i has the values 2 i and 2 i + 1 there, i and i + 16 here.
    """
    nibbles, powers = blocks(), scales()
    if len(nibbles.shape) != 4 or nibbles.columns != 16 or powers.shape != nibbles.shape[:-1]:
        raise _misshapen(nibbles, f"(experts, rows, blocks, 16) and scales {powers.shape} for them")
    matrices, stored, count, _ = nibbles.shape
    kept = _half(stored, True, part)
    step = kept.step or 1

    def pack(rows: slice, views: Sequence[Bytes], slab: Bytes) -> None:
        stored_blocks, stored_powers = views[0].reshape(-1, count, 2, 8), views[1].reshape(-1, count)
        made = slab.reshape(-1, count, PACKED.nbytes)[rows.start // step : -(-rows.stop // step)]
        for start in range(0, len(stored_blocks), TILE):  # temporary values stay in a cache
            halves = stored_blocks[start : start + TILE][kept].view(np.uint64)  # values 0 to 15, and 16 to 31
            low, high = halves[..., 0, 0], halves[..., 1, 0]
            block = made[start // step : (start + TILE) // step]
            block[..., 0] = stored_powers[start : start + TILE][kept]
            block[..., 1::2] = _bytes((low & LOW) | ((high & LOW) << np.uint64(4)))
            block[..., 2::2] = _bytes(((low >> np.uint64(4)) & LOW) | (high & ~LOW))

    def steps(matrix: int) -> list[Step]:
        both = nibbles.slabs[matrix], powers.slabs[matrix]
        return [
            Step((rows_of(both[0], rows, stored), rows_of(both[1], rows, stored)), partial(pack, rows))
            for rows in cuts(stored, 17 * count, 2)
        ]

    shape = (matrices, len(range(stored)[kept]), count * PACKED.elements)
    name = nibbles.name.replace(".blocks", ".weight").replace("gate_up", part)
    return Weight(name, shape, PACKED, MadeSlabs(matrices, shape[1] * PACKED.row_nbytes(shape[2]), steps))


def _bytes(words: Any) -> Any:
    """(…) words of 8 bytes -> (…, 8)."""
    return words[..., None].view(np.uint8)


def _misshapen(weight: Weight, expected: str) -> FileFormatError:
    return FileFormatError(f"tensor {shown(weight.name)} has shape {weight.shape}, expected {expected}")
