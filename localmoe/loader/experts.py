"""Experts of safetensors folders that lie otherwise than a GGUF file's, brought to its form; must not know config.json.

Where rows stay together the new tensor is a view. Transposed matrices and MXFP4 are copied, each when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.formats import BF16, F16, F32, FORMATS, Bytes, Weight
from localmoe.loader.config_json import Keys, Makers
from localmoe.loader.source import shown

PACKED = FORMATS["MXFP4"]
HALVES = ("gate", "up")


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
    kept = _half(weight.columns, interleaved, part)
    slabs = [np.ascontiguousarray(_elements(s, weight)[:, kept].T) for s in weight.slabs]
    name, shape = weight.name.replace("gate_up", part), (len(slabs), *slabs[0].shape)
    return Weight(name, shape, weight.format, tuple(s.view(np.uint8).reshape(-1) for s in slabs))


def _columns(interleaved: bool, make: Callable[[], Weight], part: str) -> Weight:
    """A part's columns of a matrix (E, 2 F)."""
    weight = make()
    if len(weight.shape) != 2:
        raise _misshapen(weight, "two axes")
    kept = np.ascontiguousarray(_elements(weight.slabs[0], weight)[:, _half(weight.columns, interleaved, part)])
    return Weight(weight.name.replace("gate_up", part), kept.shape, weight.format, (kept.view(np.uint8).reshape(-1),))


def _elements(slab: Bytes, weight: Weight) -> Any:
    """Bytes of F32, F16 or BF16 as a matrix of elements to be moved, not reckoned with."""
    if weight.format not in (F32, F16, BF16):
        found = f"tensor {shown(weight.name)} is {weight.format.name}"
        raise UnsupportedError(f"{found}; matrices that have to be transposed can be F32, F16 and BF16")
    return slab.view(f"u{weight.format.nbytes}").reshape(-1, weight.columns)


def _packed(blocks: Callable[[], Weight], scales: Callable[[], Weight], part: str) -> Weight:
    """Nibbles (E, N, D / 32, 16) and scales (E, N, D / 32) of OpenAI's MXFP4 as GGML's blocks of 17 bytes, (E, n, D).

    Both hold 32 values as 16 bytes: byte i has the values 2 i and 2 i + 1 there, i and i + 16 here.
    """
    nibbles, powers = blocks(), scales()
    if len(nibbles.shape) != 4 or nibbles.columns != 16 or powers.shape != nibbles.shape[:-1]:
        raise _misshapen(nibbles, f"(experts, rows, blocks, 16) and scales {powers.shape} for them")
    _, rows, count, _ = nibbles.shape
    kept = _half(rows, True, part)
    made = []
    for data, powers_of_one in zip(nibbles.slabs, powers.slabs, strict=True):
        low, high = np.split(data.reshape(rows, count, 16)[kept], 2, axis=2)  # values 0 to 15, and 16 to 31
        block = np.empty((*low.shape[:2], PACKED.nbytes), np.uint8)
        block[..., 0] = powers_of_one.reshape(rows, count)[kept]
        block[..., 1::2] = (low & 15) | (high << 4)
        block[..., 2::2] = (low >> 4) | (high & 240)
        made.append(block)
    name = nibbles.name.replace(".blocks", ".weight").replace("gate_up", part)
    shape = (len(made), made[0].shape[0], count * PACKED.elements)
    return Weight(name, shape, PACKED, tuple(block.reshape(-1) for block in made))


def _misshapen(weight: Weight, expected: str) -> FileFormatError:
    return FileFormatError(f"tensor {shown(weight.name)} has shape {weight.shape}, expected {expected}")
