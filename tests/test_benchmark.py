"""`localmoe bench`: the arithmetic of its rows under a fake clock, its yardsticks, and one real run of a tiny model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
from tiny_models import qwen3moe

from localmoe import benchmark
from localmoe.errors import SettingError
from localmoe.kernels.cpu import limits
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.cpu.limits import Limits


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3moe(tmp_path_factory.mktemp("models") / "tiny.gguf", format="Q8_0")


@pytest.fixture(autouse=True)
def _small_yardsticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_NBYTES", 1 << 20)
    monkeypatch.setattr(limits, "PRODUCTS", 1 << 12)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every repeat of a test takes half a second; memory gives 1 MB/s and the cores 10 MFLOP/s."""
    ticks = count()
    monkeypatch.setattr(benchmark, "perf_counter", lambda: next(ticks) / 2)
    monkeypatch.setattr(Limits, "read_nbytes_per_second", lambda self: 1e6)
    monkeypatch.setattr(Limits, "flops_per_second", lambda self: 1e7)


@pytest.mark.usefixtures("clock")
def test_generation_is_measured_against_the_bytes_it_must_read(file: Path) -> None:
    (row,) = benchmark.run(file, prompt=0, generate=4, repeat=3, threads=2)
    # 74,580 bytes of weights a token (test_inspection), and 256 bytes for each of 1, 2, 3 and 4 cached tokens
    nbytes = 4 * 74580 + 256 * (1 + 2 + 3 + 4)
    assert (row.test, row.tokens_per_second, row.deviation) == ("tg4", 8, 0)
    assert (row.limit_name, row.note) == ("memory reads", "0.0 GB/s, 2 threads")
    assert math.isclose(row.limit_percent, 100 * nbytes / 0.5 / 1e6)


@pytest.mark.usefixtures("clock")
def test_a_prompt_is_measured_against_the_multiply_adds_it_takes(file: Path) -> None:
    (row,) = benchmark.run(file, prompt=7, generate=0, repeat=2, threads=1)
    block = 2 * 64 * 64 + 2 * 32 * 64 + 6 * 64 + 2 * 3 * 32 * 64  # attention, router, two experts
    attention = 4 * (16 + 16) * 4  # heads, keys and values, and 4 of the 7 tokens on average
    flops = 2 * (7 * 2 * (block + attention) + 260 * 64)  # logits of the last token only
    assert (row.test, row.tokens_per_second, row.limit_name) == ("pp7", 14, "float32 multiply-adds")
    assert math.isclose(row.limit_percent, 100 * flops / 0.5 / 1e7)


def test_rates_come_with_their_mean_and_standard_deviation(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: Iterator[float] = iter([0, 100, 0, 1, 0, 2, 0, 4])  # the first repeat does not count
    monkeypatch.setattr(benchmark, "perf_counter", lambda: next(times))
    (row,) = benchmark.run(file, prompt=0, generate=4, repeat=3, threads=1)
    assert math.isclose(row.tokens_per_second, (4 + 2 + 1) / 3)
    assert math.isclose(row.deviation, stdev([4, 2, 1]))


def test_a_real_run_gives_a_row_for_each_test_and_tells_how_far_it_is(file: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    rows = benchmark.run(file, prompt=20, generate=3, repeat=2, progress=lambda *news: heard.append(news))
    assert [row.test for row in rows] == ["pp20", "tg3"]
    assert all(math.isfinite(x) and x > 0 for row in rows for x in (row.tokens_per_second, row.limit_percent))
    assert [news for news in heard if news[0] == "tg3"] == [("tg3", 0, 3), ("tg3", 1, 3), ("tg3", 2, 3)]


def test_nothing_to_measure_is_refused(file: Path) -> None:
    with pytest.raises(SettingError, match="nothing to measure"):
        benchmark.run(file, prompt=0, generate=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_read_loop_loads_every_byte_exactly_once(threads: int) -> None:
    device = CpuDevice(16, "f16", threads)
    yardstick = Limits(device)
    data = yardstick._data
    data[:] = np.random.default_rng(0).integers(0, 256, data.size, np.uint8)
    assert yardstick.read_nbytes_per_second() > 0
    found = yardstick._results.view(np.int32)[:: 64 // 4][:threads]
    lanes = device.kernels.isa.lanes
    lines = data.view(np.int32).reshape(-1, 8 * lanes)  # what one turn of the loop reads
    cuts = [len(lines) * t // threads for t in range(threads + 1)]
    parts = [lines[a:b].reshape(-1, lanes) for a, b in pairwise(cuts)]
    expected = [np.bitwise_xor.reduce(part).astype(np.int64).sum().astype(np.int32) for part in parts]
    assert found.tolist() == expected
    device.close()


def test_the_fastest_of_several_passes_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CpuDevice(16, "f16", 1)
    yardstick = Limits(device)
    times = iter([0, 4, 10, 12, 20, 25])
    monkeypatch.setattr(limits, "perf_counter", lambda: next(times))
    assert yardstick.read_nbytes_per_second() == (1 << 20) / 2
    times = iter([0, 4, 10, 18, 20, 21])
    assert yardstick.flops_per_second() == 2 * 10 * device.kernels.isa.lanes * (1 << 12)
    device.close()
