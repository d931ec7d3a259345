"""The least a test or an op must move and compute, and how long that takes at given rates; measures nothing."""

from __future__ import annotations

from dataclasses import dataclass

from localmoe.benchmark.request import Test
from localmoe.formats import KV_FORMATS
from localmoe.kernels.cpu.limits import Rates
from localmoe.kernels.program import CacheLayer, Op, Program

FLOAT_FORMATS = ("F32", "F16", "BF16", "F8_E4M3", "NVFP4")


@dataclass(frozen=True, slots=True)
class Bound:
    """The limit that binds: its name (memory: plain reads; int8: dot products; float32: multiply-adds), its rate in
    bytes or operations a second, and the least seconds."""

    name: str
    unit: str
    rate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes read from memory; operations (a product and its addition are two) of 8-bit integers and of floats."""

    nbytes: float = 0.0
    integer_ops: float = 0.0
    float_ops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.nbytes + other.nbytes, self.integer_ops + other.integer_ops, self.float_ops + other.float_ops)

    def times(self, count: int) -> Work:
        return Work(count * self.nbytes, count * self.integer_ops, count * self.float_ops)

    @property
    def ops(self) -> float:
        return self.integer_ops + self.float_ops

    def bound(self, rates: Rates) -> Bound:
        """What this work cannot be faster than; weights of quantised formats count as 8-bit products."""
        reading = self.nbytes / rates.read
        computing = self.integer_ops / rates.integer_ops + self.float_ops / rates.float_ops
        if reading >= computing:
            return Bound("memory", "GB/s", rates.read, reading)
        if self.integer_ops >= self.float_ops:
            return Bound("int8", "GOPS", rates.integer_ops, computing)
        return Bound("float32", "GFLOP/s", rates.float_ops, computing)


def op_work(program: Program, op: Op, tokens: int, depth: float, kv: str) -> Work:
    """Of one op in a step of `tokens` tokens behind `depth` cached ones. What a Program traced for several tokens does
    for one row only (the logits) is counted for one."""
    rows = tokens if op.inputs[0].shape[0] == program.tokens else 1
    nbytes = float(op.weight_nbytes(rows))
    operations = op.flops(rows, int(depth + (tokens + 1) / 2))
    if op.name == "attention":
        layer: CacheLayer = op.attributes["cache"]
        of_element = KV_FORMATS[kv].nbytes / KV_FORMATS[kv].elements
        return Work(nbytes + (depth + tokens) * layer.elements * of_element, 0.0, operations)
    if "state" in op.attributes:
        nbytes += 2 * op.attributes["state"].nbytes  # read and written, however many tokens there are
    matrices = op.matrices
    whole = sum(w.elements for w in matrices) or 1
    quantised = sum(w.elements for w in matrices if w.format.name not in FLOAT_FORMATS)
    return Work(nbytes, operations * quantised / whole, operations * (whole - quantised) / whole)


def step_work(program: Program, tokens: int, depth: float, kv: str) -> Work:
    return sum((op_work(program, op, tokens, depth, kv) for op in program.ops), Work())


def measured_work(program: Program, test: Test, kv: str) -> Work:
    """A prompt reads every weight once; of generated tokens each does, and sees on average half of them before it."""
    if test.kind == "pp":
        return step_work(program, test.tokens, test.depth, kv)
    return step_work(program, 1, test.depth + (test.tokens - 1) / 2, kv).times(test.tokens)
