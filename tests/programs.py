"""Programs for tests: random weights, inputs that quantise without loss, and runs over poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from localmoe.formats import FORMATS, Format, Weight
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.ops import Ops, trace
from localmoe.kernels.program import Program, Tensor, cache_row
from localmoe.kernels.reference import ReferenceDevice
from localmoe.kernels.reference_weights import dequantise

Array = npt.NDArray[np.generic]
Random = np.random.Generator
Forward = Callable[[Ops, Random], Tensor]
Step = tuple[int, int]  # tokens, position

HADAMARD = reduce(np.kron, [np.array([[1, 1], [1, -1]])] * 5)  # Sylvester's, (32, 32)
VOCABULARY = 64
CONTEXT = 512
SCALES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}  # where a block's float16 factors stand


def weight(random: Random, shape: tuple[int, ...], format: str = "F32") -> Weight:
    """Random values of about 1 / sqrt(columns), or random whole blocks of a quantised format."""
    kind = FORMATS[format]
    count = int(np.prod(shape))
    if format in ("F32", "F16", "BF16"):
        plain = (random.standard_normal(count) / np.sqrt(shape[-1])).astype(np.float32)
        if format == "BF16":
            data = (plain.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            data = plain.astype(np.float32 if format == "F32" else np.float16).view(np.uint8)
        return Weight.whole("w", shape, kind, data)
    blocks = random.integers(0, 256, (count // kind.elements, kind.nbytes), np.uint8)
    for place in SCALES[format]:
        factors = random.uniform(0.5e-3, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = factors.view(np.uint8).reshape(-1, 2)
    return Weight.whole("w", shape, kind, blocks.reshape(-1))


def exactly(values: npt.ArrayLike) -> Weight:
    """An F32 weight of these numbers."""
    array = np.ascontiguousarray(values, np.float32)
    return Weight.whole("w", array.shape, FORMATS["F32"], array.reshape(-1).view(np.uint8))


def rows(ops: Ops, random: Random, width: int) -> Tensor:
    """A row for each token, (T, width): multiples of 1/64 with a peak of 127/64 in every block of 32, so that rounding
    to 8 bits is exact."""
    table = random.integers(-127, 128, (VOCABULARY, width))
    table[:, ::32] = 127
    return ops.embed(exactly(table / 64), ops.input)


def given(ops: Ops, table: npt.ArrayLike) -> Tensor:
    """Row t of the table for token t."""
    return ops.embed(exactly(table), ops.input)


def side_by_side(ops: Ops, tensors: Sequence[Tensor]) -> Tensor:
    """(T, a), (T, b), … -> (T, a + b + …)."""
    joined = tensors[0].heads(1)
    for tensor in tensors[1:]:
        joined = ops.concat(joined, tensor.heads(1))
    return joined.flat()


def traced(forward: Forward, capacity: int, *, all_rows: bool = True) -> Program:
    """`forward` with weights that are the same for every capacity."""
    return trace(lambda ops: forward(ops, np.random.default_rng(7)), capacity, all_rows=all_rows)


def ids(count: int, position: int = 0) -> npt.NDArray[np.int32]:
    """Token ids of the positions position…: each position has its own, whatever the step it comes in."""
    return (np.arange(position, position + count) * 5 % VOCABULARY).astype(np.int32)


def reference_runs(forward: Forward, steps: Sequence[Step], kv_format: str = "f32", **how: bool) -> list[Array]:
    """What the numpy twins answer to steps one after another."""
    device = ReferenceDevice(CONTEXT, kv_format)
    answers: list[Array] = []
    for count, position in steps:
        program = traced(forward, count, **how)
        answer = device.compile(program).run(ids(count, position), position)
        answers.append(answer.astype(np.int32) if program.output.dtype == "i32" else answer)
    return answers


def cpu_runs(device: CpuDevice, forward: Forward, steps: Sequence[tuple[int, int, int]], **how: bool) -> list[Array]:
    """What the cpu answers to steps of (capacity, tokens, position); every place that a step writes held NaN before."""
    device._caches.clear()
    programs = {capacity: traced(forward, capacity, **how) for capacity, _, _ in steps}
    plans = {capacity: device.compile(program) for capacity, program in programs.items()}
    for layer in next(iter(programs.values())).cache:
        for array, width in zip(device.cache(layer), (layer.key_width, layer.value_width), strict=True):
            if array is not None and width:
                array[...] = cache_rows(np.full((layer.heads, 1, width), np.nan), device.kv)
    answers: list[Array] = []
    for capacity, count, position in steps:
        plan = plans[capacity]
        plan._arena.view(np.float32).fill(np.nan)
        answer = plan.run(ids(count, position), position)
        answers.append(answer.view(np.int32) if programs[capacity].output.dtype == "i32" else answer)
    return answers


def cache_rows(values: npt.ArrayLike, format: Format) -> Array:
    """Float32 (…, d) as rows of a cache, (…, bytes), padded with zeros, turned where they are quantised; what is NaN is
    NaN in every format."""
    rows = np.asarray(values, np.float32)
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, cache_row(rows.shape[-1], format) - rows.shape[-1])]
    padded = np.pad(rows, padding)
    with np.errstate(invalid="ignore"):
        if format.elements > 1:
            padded = (padded.reshape(-1, 32) @ HADAMARD / 4).reshape(padded.shape).astype(np.float32)
        stored = quantize(padded, GGMLQuantizationType(format.id))
    return np.ascontiguousarray(stored).view(np.uint8)


def cache_values(rows: Array, format: Format, width: int) -> Array:
    """The first `width` values of rows of a cache, (…, bytes) -> float64 (…, d)."""
    flat = dequantise(np.ascontiguousarray(rows).reshape(-1), format).astype(np.float64)
    if format.elements > 1:
        flat = flat.reshape(-1, 32) @ HADAMARD / 8
    return flat.reshape(*rows.shape[:-1], -1)[..., :width]


def distance(found: Array, expected: Array) -> float:
    """The largest difference, in parts of the largest expected value; infinite for NaN or another shape."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / (np.abs(expected).max() or 1))
