"""Calling kernels from tests: compiled kernels by instruction set, random blocks of any format, quantised rows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quants

from localmoe.formats import FORMATS
from localmoe.kernels.cpu import activations, matmul  # noqa: F401  (with these come all kernels of formats)
from localmoe.kernels.cpu.build import Kernels
from localmoe.kernels.cpu.isa import named

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@cache
def kernels(isa: str, folder: Path | None = None) -> Kernels:
    return Kernels(named(isa), folder)


def function(isa: str, name: str, arguments: int) -> Callable[..., None]:
    """A kernel as a Python function of integers."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(kernels(isa).address(name))


def _halves(rng: np.random.Generator, count: int, size: float) -> Bytes:
    values = size * rng.uniform(0.75, 1.25, count) * rng.choice([-1, 1], count)
    return values.astype(np.float16).view(np.uint8).reshape(count, 2)


# Where a block holds its float16 scales; the other bytes may be anything.
_SCALES: dict[str, tuple[int, ...]] = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,),
    "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "Q8_K": (), "IQ1_M": (),
}  # fmt: skip


def random_rows(name: str, rows: int, columns: int, rng: np.random.Generator) -> Bytes:
    """(rows, row bytes) of valid blocks of any bits, with scales of a sane size."""
    format = FORMATS[name]
    if name in ("F32", "F16", "BF16"):
        values = rng.standard_normal((rows, columns), np.float32)
        return (
            np.ascontiguousarray(quants.quantize(values, GGMLQuantizationType[name])).view(np.uint8).reshape(rows, -1)
        )
    blocks = rng.integers(0, 256, (rows * columns // format.elements, format.nbytes), dtype=np.uint8)
    for place in _SCALES.get(name, (0,)):
        blocks[:, place : place + 2] = _halves(rng, len(blocks), 0.01)
    if name == "IQ1_M":  # its float16 lies in the top nibbles of four words
        bits = np.frombuffer(_halves(rng, len(blocks), 0.01).tobytes(), np.uint16)
        for i in range(4):
            blocks[:, 49 + 2 * i] = (blocks[:, 49 + 2 * i] & 15) | (((bits >> (4 * i)) & 15) << 4)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(115, 125, len(blocks))
    if name == "Q8_K":
        blocks[:, :4] = rng.uniform(0.0005, 0.001, (len(blocks), 1)).astype(np.float32).view(np.uint8)
    return blocks.reshape(rows, -1)


def dequantise(isa: str, name: str, rows: Bytes, out: Floats) -> None:
    """The format's kernel over all of `rows`, as if they were one row."""
    function(isa, f"dequantise_{name.lower()}", 6)(rows.ctypes.data, 0, 0, 0, out.ctypes.data, out.size)


def dequantised(name: str, rows: Bytes) -> Floats:
    """(rows, columns), by the gguf package."""
    return np.asarray(quants.dequantize(rows, GGMLQuantizationType[name]), np.float32).reshape(len(rows), -1)


def emulated(form: str, x: Floats) -> npt.NDArray[np.float64]:
    """What the quantised form of x stands for, from the definition in `activations.py`."""
    if form == "f32":
        return x.astype(np.float64)
    blocks = x.reshape(-1, int(form.split("_")[1]))
    peak = np.abs(blocks).max(1, keepdims=True)
    values = np.rint(blocks * (np.float32(127) / peak))
    return np.asarray((values * (peak / np.float32(127)).astype(np.float64)).reshape(-1))


def activation_row(isa: str, form: str, x: Floats) -> Bytes:
    """One row in the form that a kernel reads, made by the kernel for it; guarded by poison behind its end."""
    nbytes = activations.activation_nbytes(form, x.size)
    row = np.full(nbytes + 64, 0xA5, np.uint8)
    if form == "f32":
        row[: x.nbytes] = x.view(np.uint8)
    else:
        function(isa, activations.QUANTISERS[form], 3)(x.ctypes.data, row.ctypes.data, x.size)
    assert (row[nbytes:] == 0xA5).all(), "the quantiser wrote behind its row"
    return row


def poisoned(*shape: int) -> Floats:
    return np.full(shape, np.nan, np.float32)


def golden(folder: Path, name: str) -> Iterator[tuple[Bytes, Floats]]:
    """(blocks, values) that other software made, of both files that may hold the format."""
    for file, prefix in (("libggml-goldens.npz", ""), ("gguf-0.19.0-goldens.npz", "deq_")):
        data: Any = np.load(folder / "quants" / file)
        if f"{prefix}{name}_bytes" in data:
            yield np.ascontiguousarray(data[f"{prefix}{name}_bytes"]), data[f"{prefix}{name}_f32"]
