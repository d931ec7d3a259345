"""What recurrent layers cost: microseconds a token and layer of the convolution and of the gated delta rule, decoding
and in a chunk, beside the limits of memory and multiply-adds.

    python bench/recurrent.py [--threads 2] [--rounds 5] [--shape qwen3next qwen35-0.8b]

Decoding takes so many layers that their states are 128 MB, as those of a whole model are not in the processor's caches;
limits and ops are measured in turns, and medians count.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import numpy as np

from localmoe.formats import FORMATS, Bytes, Weight
from localmoe.kernels.cpu.device import CpuDevice, CpuPlan
from localmoe.kernels.cpu.limits import READ_NBYTES, Limits
from localmoe.kernels.ops import Ops, trace
from localmoe.kernels.program import StateSlots, Tensor

SHAPES = {"qwen3next": (16, 32, 128, 4), "qwen35-0.8b": (16, 16, 128, 4)}  # key heads, value heads, width, taps
CHUNK, STATES_NBYTES = 512, 128 << 20


def drawn(*shape: int) -> Weight:
    values = np.random.default_rng(shape[-1]).standard_normal(shape).astype(np.float32)
    return Weight.whole("w", shape, FORMATS["F32"], values.reshape(-1).view(np.uint8))


def planned(device: CpuDevice, shape: str, tokens: int, layers: int) -> CpuPlan:
    """A plan of `layers` times convolution and delta rule."""
    keys, heads, width, taps = SHAPES[shape]
    channels = (2 * keys + heads) * width

    def forward(ops: Ops) -> Tensor:
        x, gates = (ops.embed(drawn(4, n), ops.input) for n in (channels, 2 * heads))
        parts = [x.columns(i * keys * width, (i + 1) * keys * width).heads(keys) for i in (0, 1)]
        parts.append(x.columns(2 * keys * width, channels).heads(heads))
        beta, decay = gates.columns(0, heads).heads(1), gates.columns(heads, 2 * heads).heads(1)
        rate, bias = (
            Weight.whole("w", (heads,), FORMATS["F32"], v.view(np.uint8)) for v in np.full((2, heads), -0.1, np.float32)
        )
        for _ in range(layers):
            mixed = ops.causal_conv(parts, drawn(channels, taps), ops.cache.state(1, taps - 1, channels))
            query, key = (mixed.columns(i * keys * width, (i + 1) * keys * width).heads(keys) for i in (0, 1))
            value = mixed.columns(2 * keys * width, channels).heads(heads)
            state = ops.cache.state(heads, width, width)
            out = ops.delta_rule(query, key, value, beta, decay, rate, bias, state).flat()
        return out

    return device.compile(trace(forward, tokens, all_rows=True))


def measure(shape: str, tokens: int, flags: argparse.Namespace, data: Bytes) -> str:
    """A line about a step of `tokens` tokens."""
    _, heads, width, _ = SHAPES[shape]
    device, nbytes = CpuDevice(tokens, "f16", flags.threads), 4 * heads * width * width
    layers = STATES_NBYTES // nbytes if tokens == 1 else 1
    plan = planned(device, shape, tokens, layers)
    plan.run(np.arange(tokens, dtype=np.int32) % 4, 1, StateSlots(0, 1))
    names = np.array(plan.entries())
    limits, text = Limits(device, data), []
    for kernels in (["causal_conv"], ["delta_gates", "delta_rule"]):
        tape, seconds, rates = np.ascontiguousarray(plan._tape[np.isin(names, kernels)]), [], []
        for _ in range(flags.rounds):
            rates.append(limits.rates())
            start = perf_counter()
            device.threads_run(tape)
            seconds.append(perf_counter() - start)
        text.append(f"{kernels[-1]} {1e6 * median(seconds) / layers / tokens:7.2f} us")
    moved = median(2 * layers * nbytes / s for s in seconds)
    flops = median(7 * layers * tokens * heads * width * width / s for s in seconds)
    of_read = median(2 * layers * nbytes / s / r.read for s, r in zip(seconds, rates, strict=True))
    of_flops = median(
        7 * layers * tokens * heads * width * width / s / r.float_ops for s, r in zip(seconds, rates, strict=True)
    )
    device.close()
    figures = f"{moved / 1e9:5.1f} GB/s, {100 * of_read:3.0f} %; " if tokens == 1 else ""
    return f"{', '.join(text)}; {figures}{flops / 1e9:4.0f} GFLOP/s, {100 * of_flops:3.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    flags = parser.parse_args()
    data = np.ones(READ_NBYTES, np.uint8)
    for shape in flags.shape:
        print(f"decode  {shape:12s}: {measure(shape, 1, flags, data)}", flush=True)
        print(f"prefill {shape:12s}: {measure(shape, CHUNK, flags, data)}", flush=True)


if __name__ == "__main__":
    main()
