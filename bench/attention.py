"""How near attention comes to the machine's limits: decode beside plain reads of memory, prefill beside multiply-adds.

    python bench/attention.py [--threads 2] [--rounds 5] [--shape dense1b olmoe mla] [--decode 2048 8192 32768]
        [--prefill 0 2048 8192] [--kv f32|f16|q8_0]

Decode takes as many layers as make 128 MB of cache, so that no layer is still in the processor's caches when its turn
comes again; limits and attention are measured in turns, and medians count.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from localmoe.formats import FORMATS, KV_FORMATS, Bytes, Weight
from localmoe.kernels.cpu.device import CpuDevice, CpuPlan
from localmoe.kernels.cpu.limits import READ_NBYTES, Limits
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


def measure(shape: str, tokens: int, depth: int, flags: argparse.Namespace, data: Bytes) -> str:
    """A line about steps of `tokens` tokens behind `depth` cached ones."""
    heads, kv_heads, width, value_width = SHAPES[shape]
    device = CpuDevice(depth + tokens, flags.kv, flags.threads)
    seen = tokens * depth + tokens * (tokens + 1) // 2
    row_nbytes = device.kv.row_nbytes(kv_heads * (width + value_width))
    layers = max(1, CACHE_NBYTES // (seen * row_nbytes)) if tokens == 1 else 1
    plan = planned(device, shape, tokens, layers)
    plan.run(np.arange(tokens, dtype=np.int32) % 4, depth)
    tape = np.ascontiguousarray(plan._tape[[name.startswith("attention") for name in plan.entries()]])
    limits, seconds, rates = Limits(device, data), [], []
    for _ in range(flags.rounds):
        rates.append(limits.rates())
        start = perf_counter()
        device.threads_run(tape)
        seconds.append(perf_counter() - start)
    operations = 2 * layers * seen * heads * (width + (value_width or PREFIX))
    flops = median(operations / s for s in seconds)
    of_flops = median(operations / s / r.float_ops for s, r in zip(seconds, rates, strict=True))
    text = f"{1e6 * median(seconds) / layers:9.0f} us a layer, {flops / 1e9:4.0f} GFLOP/s, {100 * of_flops:3.0f} %"
    if tokens == 1:
        nbytes = layers * seen * row_nbytes
        of_read = median(nbytes / s / r.read for s, r in zip(seconds, rates, strict=True))
        text += f"; {median(nbytes / s for s in seconds) / 1e9:5.1f} GB/s, {100 * of_read:3.0f} %"
    device.close()
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--decode", nargs="*", type=int, default=[2048, 8192, 32768], help="cached tokens")
    parser.add_argument(
        "--prefill", nargs="*", type=int, default=[0, 2048, 8192], help="cached tokens before the chunk"
    )
    parser.add_argument("--kv", default="f16", choices=list(KV_FORMATS))
    flags = parser.parse_args()
    data = np.ones(READ_NBYTES, np.uint8)
    for shape in flags.shape:
        for depth in flags.decode:
            print(f"decode  {shape:8s} at {depth:6d}: {measure(shape, 1, depth - 1, flags, data)}", flush=True)
        for depth in flags.prefill:
            print(f"prefill {shape:8s} at {depth:6d}: {measure(shape, CHUNK, depth, flags, data)}", flush=True)


if __name__ == "__main__":
    main()
