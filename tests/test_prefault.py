"""Weights read ahead in the background: all pages are there afterwards, it stops when told, only what fits is read."""

from __future__ import annotations

import gc
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import deepseek2

import localmoe
import localmoe.experts.residence
import localmoe.model
from localmoe.formats import F32, Weight
from localmoe.prefault import PIECE, Prefault

linux = pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")


def mapped(path: Path, nbytes: int) -> Weight:
    with path.open("wb") as file:
        file.truncate(nbytes)
    with path.open("rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    return Weight.whole("x", (nbytes // 4,), F32, data)


def resident_nbytes(path: Path) -> int:
    """Bytes of a mapped file that are mapped in, from /proc/self/smaps."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    places = [i for i, line in enumerate(lines) if line.endswith(str(path))]
    sizes = [next(line for line in lines[i:] if line.startswith("Rss:")) for i in places]
    return 1024 * sum(int(size.split()[1]) for size in sizes)


@linux
def test_every_page_of_every_slab_is_there_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    weight = mapped(path, 3 * PIECE + 4096)
    assert resident_nbytes(path) == 0
    for _ in range(5):  # the system may take a page back at any moment
        Prefault([weight.part(0, 1), weight]).wait()
        if (resident := resident_nbytes(path)) == weight.nbytes:
            return
    if resident == 0:
        pytest.skip("this kernel has no MADV_POPULATE_READ")
    assert resident == weight.nbytes


@linux
def test_it_stops_between_two_pieces(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    weight = mapped(path, 64 << 30)  # a hole of which the disk holds nothing
    prefault = Prefault([weight])
    prefault.stop()
    assert resident_nbytes(path) < 8 << 30


@linux
def test_it_stops_when_nobody_holds_it_any_more(tmp_path: Path) -> None:
    """A model that is dropped without close does not go on to read its 20 GB."""
    path = tmp_path / "weights"
    prefault = Prefault([mapped(path, 64 << 30)])
    thread = prefault._thread
    del prefault
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    assert resident_nbytes(path) < 8 << 30


@pytest.mark.parametrize(
    ("lazy", "free", "ahead"), [("auto", 1 << 40, True), ("auto", 1 << 20, False), ("mmap", 1 << 40, False)]
)
def test_weights_that_fit_the_memory_are_read_ahead_in_auto_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: str, free: int, ahead: bool
) -> None:
    read: list[Weight] = []

    class Recorded(Prefault):
        def __init__(self, weights: Any, **how: Any) -> None:
            read.extend(weights)
            super().__init__(())

    monkeypatch.setattr(localmoe.model, "Prefault", Recorded)
    monkeypatch.setattr(localmoe.experts.residence, "available_nbytes", lambda: free)
    model = localmoe.load(deepseek2(tmp_path / "tiny.gguf"), lazy=lazy)
    matrices = {weight.name for op in model.network.program(1).ops if op.name != "embed" for weight in op.matrices}
    model.close()
    assert {weight.name for weight in read} == (matrices if ahead else set())
    experts = ["exps" in weight.name for weight in read]
    assert experts == sorted(experts)
