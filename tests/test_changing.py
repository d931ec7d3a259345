"""The way of loading changed while a conversation goes on: what goes on, what is taken back, what is counted."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tiny_models import qwen3moe

import localmoe.experts.residence
import localmoe.model
from localmoe.errors import SettingError
from localmoe.experts.loading import Loading
from localmoe.experts.trace import read_trace
from localmoe.formats import FORMATS, Weight
from localmoe.loader.files import MappedFile
from localmoe.memory import Resident, resident
from localmoe.model import Model
from localmoe.pages import let_go


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3moe(tmp_path_factory.mktemp("changing") / "m.gguf", format="Q8_0")


def test_a_trace_goes_on_in_every_mode(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace"
    with closing(Model(path, context=64, loading=Loading("mmap", trace=file))) as model:
        model.forward([1], 0)
        model.change_loading(Loading("slots", trace=file))
        model.forward([2], 1)
        with pytest.raises(SettingError, match="too small"):
            model.change_loading(Loading("slots", expert_cache=1, trace=file))
        model.forward([3], 2)
        model.change_loading(Loading("off", trace=file))
        model.forward([4], 3)
        layers = len(model.expert_blocks)
    assert [(c.step, c.layer) for c in read_trace(file).choices] == [(s, n) for s in range(1, 5) for n in range(layers)]


def test_a_trace_ends_when_nobody_asks_for_it_any_more(path: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with closing(Model(path, context=64, loading=Loading("slots", trace=first))) as model:
        model.forward([1], 0)
        model.change_loading(Loading("slots"))
        model.forward([2], 1)
        model.change_loading(Loading("slots", trace=second))
        model.forward([3], 2)
    assert {c.step for c in read_trace(first).choices} == {1}
    assert {c.step for c in read_trace(second).choices} == {3}


def test_of_a_model_that_cannot_be_opened_no_trace_is_left(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace"
    with pytest.raises(SettingError, match="too few"):
        Model(path, context=64, loading=Loading("slots", memory=1000, trace=file))
    assert not file.exists()


def test_a_model_that_is_closed_twice_learns_once(path: Path) -> None:
    for sessions in (1, 2):
        model = Model(path, context=64, loading=Loading("slots"))
        model.forward([1], 0)
        model.close()
        model.close()
        with closing(Model(path, context=64, loading=Loading("slots"))) as again:
            assert again._usage._uses.sum() == sessions * model.uses().sum()  # type: ignore[union-attr]


def test_what_the_model_has_is_free_for_another_way_of_loading(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slots are given back, and its KV cache is part of what it needs."""
    free, own = [1 << 40], 3 << 40
    monkeypatch.setattr(localmoe.experts.residence, "available_nbytes", lambda: free[0])
    monkeypatch.setattr(localmoe.model, "resident", lambda: Resident(own, 0, own))
    with closing(Model(path, context=64, loading=Loading("slots"))) as model:
        before = model.room()
        free[0] = 0
        model.change_loading(Loading("slots"))
        after = model.room()
    assert before is not None and after is not None
    assert after.budget_nbytes == pytest.approx(3 * before.budget_nbytes)


def test_reading_it_all_is_told_to_who_asked_for_it(path: Path) -> None:
    opening: list[str] = []
    changing: list[str] = []
    with closing(Model(path, context=64, progress=lambda what, *_: opening.append(what))) as model:
        opening.clear()
        model.change_loading(Loading("off"), lambda what, *_: changing.append(what))
    assert "reading weights" in changing
    assert "reading weights" not in opening


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells which pages a process has")
def test_pages_that_are_let_go_are_no_part_of_the_process(tmp_path: Path) -> None:
    rows, columns = 2048, 4096
    file = tmp_path / "weights"
    file.write_bytes(np.arange(rows * columns, dtype=np.uint32).astype(np.uint8).tobytes())
    mapped = MappedFile.of(file)
    data = np.frombuffer(mapped.data, np.uint8)
    weight = Weight("w", (rows, columns), FORMATS["I8"], (data,))
    assert data.max() == 255
    before = resident().files
    let_go([weight])
    assert before - resident().files > 0.9 * data.size
    assert data[-1] == (rows * columns - 1) % 256
