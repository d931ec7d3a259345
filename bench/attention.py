"""How near attention comes to the machine's limits: decode beside plain reads of memory, prefill beside multiply-adds.

    python bench/attention.py [--threads 2] [--rounds 5] [--shape dense1b olmoe mla] [--decode 2048 8192 32768]
        [--prefill 0 2048 8192] [--kv f16 q8_0 q4_0]

Decode takes as many layers as make 128 MB of cache, so that no layer is still in the processor's caches when its turn
comes again; limits and attention are measured in turns, and medians count, also of the ratios to the first format.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from localmoe.formats import FORMATS, KV_FORMATS, Bytes, Weight
from localmoe.kernels.cpu.device import CpuDevice, CpuPlan
from localmoe.kernels.cpu.limits import READ_NBYTES, Limits, Rates
from localmoe.kernels.ops import Ops, trace
from localmoe.kernels.program import Tensor

# heads, kv-heads, key width, value width (0: the first 512 elements of the key)
SHAPES = {"dense1b": (32, 4, 64, 64), "olmoe": (16, 16, 128, 128), "mla": (16, 1, 576, 0)}
PREFIX, CHUNK, CACHE_NBYTES = 512, 512, 128 << 20


def planned(device: CpuDevice, shape: str, tokens: int, layers: int) -> CpuPlan:
    """A plan of `layers` times attention over caches full of random numbers."""
    heads, kv_heads, width, value_width = SHAPES[shape]

    def forward(ops: Ops) -> Tensor:
        def rows(count: int) -> Tensor:
            table = np.random.default_rng(count).standard_normal((4, count)).astype(np.float32)
            whole = Weight.whole("w", table.shape, FORMATS["F32"], table.reshape(-1).view(np.uint8))
            return ops.embed(whole, ops.input)

        q, k = rows(heads * width).heads(heads), rows(kv_heads * width).heads(kv_heads)
        v = rows(kv_heads * value_width).heads(kv_heads) if value_width else None
        for _ in range(layers):
            cache = ops.cache.append(k, v, value_prefix=0 if value_width else PREFIX)
            out = ops.attention(q, cache, scale=width**-0.5).flat()
        return out

    program = trace(forward, tokens, all_rows=True)
    for layer in program.cache:
        for array in device.cache(layer):
            if array is not None:
                values = np.random.default_rng(layer.index).standard_normal(1 << 16).astype(np.float32)
                array.reshape(-1)[:] = np.resize(
                    quantize(values, GGMLQuantizationType(device.kv.id)).view(np.uint8), array.size
                )
    return device.compile(program)


@dataclass
class Measured:
    """Attention over a cache of one format, and the seconds of its rounds."""

    device: CpuDevice
    tape: npt.NDArray[np.int64]
    layers: int
    kept: CpuPlan
    seconds: list[float] = field(default_factory=list)

    def line(self, shape: str, tokens: int, seen: int, rates: list[Rates], first: Measured) -> str:
        heads, _, width, value_width = SHAPES[shape]
        operations = 2 * self.layers * seen * heads * (width + (value_width or PREFIX))
        flops = median(operations / s for s in self.seconds)
        of_flops = median(operations / s / r.float_ops for s, r in zip(self.seconds, rates, strict=True))
        text = f"{1e6 * median(self.seconds) / self.layers:9.0f} us a layer, {flops / 1e9:4.0f} GFLOP/s, "
        text += f"{100 * of_flops:3.0f} %"
        if tokens == 1:
            nbytes = self.layers * seen * row_nbytes(shape, self.device)
            of_read = median(nbytes / s / r.read for s, r in zip(self.seconds, rates, strict=True))
            text += f"; {median(nbytes / s for s in self.seconds) / 1e9:5.1f} GB/s, {100 * of_read:3.0f} %"
        if self is not first:
            pairs = zip(first.seconds, self.seconds, strict=True)
            faster = median(a / first.layers / (b / self.layers) for a, b in pairs)
            text += f"; {faster:.2f} times as fast as {first.device.kv.name}"
        return text


def row_nbytes(shape: str, device: CpuDevice) -> int:
    """Bytes of a position in one layer's cache."""
    _, kv_heads, width, value_width = SHAPES[shape]
    return device.kv.row_nbytes(kv_heads * (width + value_width))


def prepared(shape: str, tokens: int, depth: int, kv: str, threads: int) -> Measured:
    device = CpuDevice(depth + tokens, kv, threads)
    layers = max(1, CACHE_NBYTES // ((depth + 1) * row_nbytes(shape, device))) if tokens == 1 else 1
    plan = planned(device, shape, tokens, layers)
    plan.run(np.arange(tokens, dtype=np.int32) % 4, depth)
    tape = np.ascontiguousarray(plan._tape[[name.startswith("attention") for name in plan.entries()]])
    return Measured(device, tape, layers, plan)


def measure(shape: str, tokens: int, depth: int, flags: argparse.Namespace, data: Bytes) -> list[str]:
    """A line for each format about steps of `tokens` tokens behind `depth` cached ones, in turns."""
    seen = tokens * depth + tokens * (tokens + 1) // 2
    all_formats = [prepared(shape, tokens, depth, kv, flags.threads) for kv in flags.kv]
    limits, rates = Limits(all_formats[0].device, data), []
    for _ in range(flags.rounds):
        rates.append(limits.rates())
        for one in all_formats:
            start = perf_counter()
            one.device.threads_run(one.tape)
            one.seconds.append(perf_counter() - start)
    lines = [f"{one.device.kv.name:5s} {one.line(shape, tokens, seen, rates, all_formats[0])}" for one in all_formats]
    for one in all_formats:
        one.device.close()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--decode", nargs="*", type=int, default=[2048, 8192, 32768], help="cached tokens")
    parser.add_argument(
        "--prefill", nargs="*", type=int, default=[0, 2048, 8192], help="cached tokens before the chunk"
    )
    parser.add_argument("--kv", nargs="*", default=["f16"], choices=list(KV_FORMATS))
    flags = parser.parse_args()
    data = np.ones(READ_NBYTES, np.uint8)
    for shape in flags.shape:
        for depth in flags.decode:
            for line in measure(shape, 1, depth - 1, flags, data):
                print(f"decode  {shape:8s} at {depth:6d}: {line}", flush=True)
        for depth in flags.prefill:
            for line in measure(shape, CHUNK, depth, flags, data):
                print(f"prefill {shape:8s} at {depth:6d}: {line}", flush=True)


if __name__ == "__main__":
    main()
