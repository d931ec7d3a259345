"""`localmoe bench`: tokens per second, and per cent of what this machine could reach, measured in the same run; prints
nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter

import numpy as np

from localmoe.errors import SettingError
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.cpu.limits import Limits
from localmoe.model import Model

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One test: mean and standard deviation over the repeats, in tokens per second, and the share of the named
    limit."""

    test: str
    tokens_per_second: float
    deviation: float
    limit_name: str
    limit_percent: float
    note: str


def run(
    path: str | Path,
    *,
    threads: int | None = None,
    prompt: int = 512,
    generate: int = 64,
    repeat: int = 5,
    progress: Progress | None = None,
) -> list[Row]:
    """Read `prompt` tokens from an empty cache, and generate `generate` tokens one by one, `repeat` times each after
    one that is not counted. Each limit is measured beside each repeat. Raises SettingError where nothing is asked
    for."""
    if not prompt and not generate:
        raise SettingError("bench has nothing to measure: give -p or -n a number above 0")
    model = Model(path, threads=threads, context=max(prompt, generate, 1), progress=progress)
    try:
        rows = [_measured(model, n, kind, repeat, progress) for n, kind in ((prompt, "pp"), (generate, "tg")) if n]
    finally:
        model.close()
    return rows


def _measured(model: Model, tokens: int, kind: str, repeat: int, progress: Progress | None) -> Row:
    assert isinstance(model.device, CpuDevice)
    limits = Limits(model.device)
    program = model.network.program(1)
    ids = np.random.default_rng(0).integers(0, model.network.config.vocabulary, tokens)
    rates, shares, found, work = [], [], 0.0, 0.0
    for turn in range(repeat + 1):
        if progress:
            progress(f"{kind}{tokens}", turn, repeat + 1)
        start = perf_counter()
        step = model.chunk if kind == "pp" else 1
        for position in range(0, tokens, step):
            model.forward([int(i) for i in ids[position : position + step]], position)
        seconds = perf_counter() - start
        if kind == "pp":
            work = sum(op.flops(tokens, (tokens + 1) // 2) for op in program.ops) - _skipped_logits(model, tokens)
            found = limits.flops_per_second()
        else:
            cache = 2 * program.cache_elements() * (tokens + 1) / 2
            work = tokens * (program.weight_nbytes(1) + cache)
            found = limits.read_nbytes_per_second()
        if turn:  # the first warms caches up
            rates.append(tokens / seconds)
            shares.append(100 * work / seconds / found)
    name, limit = (
        ("float32 multiply-adds", f"{found / 1e9:.0f} GFLOP/s")
        if kind == "pp"
        else ("memory reads", f"{found / 1e9:.1f} GB/s")
    )
    deviation = stdev(rates) if len(rates) > 1 else 0.0
    return Row(f"{kind}{tokens}", fmean(rates), deviation, name, fmean(shares), f"{limit}, {model.threads} threads")


def _skipped_logits(model: Model, tokens: int) -> int:
    """FLOPs of logits that a prefill does not compute: all but one row of each chunk."""
    output = model.network.weights.output
    return 2 * int(output.elements) * (tokens - -(-tokens // model.chunk))
