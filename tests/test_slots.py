"""Experts in slots: the same bits as with everything in memory, in every family, at every size and after every change;
who goes, what is refused, what an interrupt and a failed read leave behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from registry import MODELS, chatting, written
from tiny_models import qwen3moe

import localmoe.experts.residence
from localmoe.errors import LocalMoeError, SettingError
from localmoe.experts.loading import Loading
from localmoe.experts.pressure import Pressure
from localmoe.experts.slots import SlotExperts, least_room, pools
from localmoe.kernels.program import Floats, Op
from localmoe.model import Model

IDS = np.random.default_rng(7).integers(0, 250, 70).tolist()
PROMPT, DECODED = 40, 8


def expert_ops(model: Model) -> list[Op]:
    return [op for op in model.network.program(1).ops if op.name == "experts"]


def routed(name: str) -> bool:
    return any("exps" in tensor for tensor in MODELS[name]().tensors)


@pytest.fixture(scope="module", params=[name for name in MODELS if routed(name)])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(chatting(MODELS[request.param]()), tmp_path_factory.mktemp("slots") / "m.gguf")


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    return qwen3moe(tmp_path / "m.gguf", format="Q8_0")


def opened(path: Path, mode: str, *, threads: int = 2, share: float | None = None, **more: object) -> Model:
    """`share`: of the room between the least that works and everything."""
    cache = None if share is None else room(path, share)
    return Model(path, threads=threads, context=256, loading=Loading(mode, expert_cache=cache, **more))  # type: ignore[arg-type]


def room(path: Path, share: float) -> int:
    with closing(Model(path, context=64, loading=Loading("mmap"))) as model:
        ops = expert_ops(model)
    whole = sum(pool.nbytes for pool in pools(ops, 1 << 40).values())
    return int(least_room(ops) + share * (whole - least_room(ops)))


def said(model: Model) -> bytes:
    """The bits of all logits of a prompt, a few tokens, and a second prompt behind them."""
    found = [model.forward(IDS[:PROMPT], 0, prompt=True)]
    found += [model.forward([IDS[i]], i) for i in range(PROMPT, PROMPT + DECODED)]
    found.append(model.forward(IDS[PROMPT + DECODED :], PROMPT + DECODED, prompt=True))
    return np.concatenate(found).tobytes()


def test_every_family_says_the_same_bits_at_every_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(opened(path, "off", threads=1)) as model:
        expected = said(model)
    ways = [(0.0, 1, False), (0.0, 2, True), (0.4, 2, False), (1.0, 2, True)]
    for share, threads, lookahead in ways:
        with closing(opened(path, "slots", threads=threads, share=share, lookahead=lookahead)) as model:
            assert said(model) == expected, (share, threads, lookahead)
            assert model.residency_mode == "slots"
            assert model.counts().chosen > 0
    monkeypatch.setattr(localmoe.experts.residence, "available_nbytes", lambda: 10)
    monkeypatch.setattr("localmoe.model.available_nbytes", lambda: 1 << 40)
    with closing(opened(path, "mmap")) as model:
        assert said(model) == expected
        assert model.uses() is not None  # experts were asked for before they were touched


def test_the_mode_changes_in_the_middle_and_no_bit_does(path: Path) -> None:
    with closing(opened(path, "off")) as model:
        expected = [model.forward(IDS[:PROMPT], 0, prompt=True)]
        expected += [model.forward([IDS[i]], i) for i in range(PROMPT, PROMPT + 10)]
    turns: list[Loading] = [
        Loading("slots", expert_cache=room(path, 0.0)),
        Loading("mmap"),
        Loading("slots", expert_cache=room(path, 0.5), lookahead=True, policy="lru"),
        Loading("slots", expert_cache=room(path, 1.0)),
        Loading("auto"),
    ]
    with closing(opened(path, "mmap")) as model:
        found = [model.forward(IDS[:PROMPT], 0, prompt=True)]
        for i in range(PROMPT, PROMPT + 10):
            if i % 2 == 0:
                model.change_loading(turns[(i - PROMPT) // 2])
            found.append(model.forward([IDS[i]], i))
    assert np.concatenate(found).tobytes() == np.concatenate(expected).tobytes()


def test_a_mode_that_cannot_be_leaves_the_old_one_at_work(quantised: Path) -> None:
    with closing(opened(quantised, "slots", share=0.5)) as model, closing(opened(quantised, "off")) as whole:
        model.forward(IDS[:PROMPT], 0, prompt=True)
        whole.forward(IDS[:PROMPT], 0, prompt=True)
        before = model.room()
        with pytest.raises(SettingError, match="too small"):
            model.change_loading(Loading("slots", expert_cache=1000))
        assert (model.residency_mode, model.room()) == ("slots", before)
        assert model.forward([5], PROMPT).tobytes() == whole.forward([5], PROMPT).tobytes()


def test_watching_a_text_sees_the_same_numbers(quantised: Path) -> None:
    def watched(model: Model) -> list[bytes]:
        seen: dict[str, bytes] = {}

        def see(op: Op, inputs: list[Floats], outputs: list[Floats]) -> None:
            name = f"{op.name} {[w.name for w in op.weights]}"
            seen[name] = b"".join(np.ascontiguousarray(x).tobytes() for x in outputs)

        model.watch(IDS[:PROMPT], see)
        return [seen[name] for name in sorted(seen) if "exps" in name]

    with closing(opened(quantised, "slots", share=0.0)) as few, closing(opened(quantised, "off")) as whole:
        assert watched(few) == watched(whole) != []


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_that_works(quantised: Path) -> None:
    with pytest.raises(SettingError, match=r"memory are too few: .* need at least") as refused:
        Model(quantised, context=64, loading=Loading("slots", memory=1000))
    size, unit = str(refused.value).rsplit(" ", 2)[1:]
    assert unit == "MB"
    with closing(Model(quantised, context=64, loading=Loading("slots", memory=int(float(size) * 1e6)))) as model:
        model.forward(IDS[:PROMPT], 0, prompt=True)
        model.forward([1], PROMPT)
    with pytest.raises(SettingError, match="expert cache of 10 B is too small; at least"):
        Model(quantised, context=64, loading=Loading("slots", expert_cache=10))


def test_a_model_without_experts_has_no_use_for_slots(tmp_path: Path) -> None:
    path = written(chatting(MODELS["llama"]()), tmp_path / "m.gguf")
    with pytest.raises(SettingError, match="no experts to keep in slots"):
        Model(path, loading=Loading("slots"))


def slots_of(model: Model) -> SlotExperts:
    store = model._running.experts
    assert isinstance(store, SlotExperts)
    return store


def test_memory_that_is_given_back_and_taken_again_changes_no_bit(quantised: Path) -> None:
    with closing(opened(quantised, "off")) as model:
        expected = said(model)
    with closing(opened(quantised, "slots", share=1.0)) as model:
        store, whole = slots_of(model), slots_of(model).room_nbytes
        model.forward(IDS[:PROMPT], 0, prompt=True)
        store.shrink(0.5)
        half = store.room_nbytes
        assert half <= 0.55 * whole
        assert said(model) == expected
        store.shrink(1.0)
        assert store.room_nbytes == least_room(expert_ops(model))
        assert said(model) == expected
        store.grow(1.0)
        assert store.room_nbytes == whole
        assert said(model) == expected


def test_slots_shrink_under_pressure_and_grow_when_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []

    class Store:
        def shrink(self, share: float) -> None:
            did.append("shrink")

        def grow(self, share: float) -> None:
            did.append("grow")

    now, waiting = [100.0], [0.0]
    monkeypatch.setattr("localmoe.experts.pressure.monotonic", lambda: now[0])
    monkeypatch.setattr("localmoe.experts.pressure.pressure", lambda: waiting[0])
    monkeypatch.setattr("localmoe.experts.pressure.available_nbytes", lambda: 1 << 40)
    monkeypatch.setattr("localmoe.experts.pressure.total_nbytes", lambda: 1 << 41)
    valve = Pressure(Store())
    for second, share in [(101, 0.0), (102, 50.0), (102.5, 50.0), (103, 50.0), (104, 0.0), (132, 0.0), (134, 0.0)]:
        now[0], waiting[0] = second, share
        valve.look()
    assert did == ["shrink", "shrink", "grow"]


def test_a_long_prompt_passes_through_the_slots_of_its_layer(quantised: Path) -> None:
    with closing(opened(quantised, "slots", share=0.5)) as model:
        model.forward(IDS, 0, prompt=True)
        store = slots_of(model)
        (pool,) = store.pools.values()
        first = np.bincount(pool.owner[pool.owner >= 0] // store.width, minlength=2)
        model.forward(IDS[::-1], 0, prompt=True)
        model.forward(IDS, 0, prompt=True)
        after = np.bincount(pool.owner[pool.owner >= 0] // store.width, minlength=2)
    assert after.min() >= pool.owner.size - pool.share > 0, (first, after)


def test_what_is_chosen_again_is_a_hit_and_is_not_read_again(quantised: Path) -> None:
    with closing(opened(quantised, "slots", share=1.0)) as model:
        model.forward([3], 0)
        first = model.counts()
        model.forward([3], 0)
        again = model.counts() - first
    assert (first.hits, first.chosen, first.steps, first.tokens) == (0, 4, 1, 1)
    assert (again.hits, again.chosen, again.nbytes_read) == (4, 4, 0)
    assert first.nbytes_read >= 4 * sum(w.nbytes // 6 for w in expert_ops(model)[0].matrices)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | None], None]:
    """What the next reads raise."""
    from localmoe.experts.reading import FileReader

    error: list[BaseException | None] = [None]
    read = FileReader.read

    def raising(self: FileReader, buffer: memoryview, offset: int) -> None:
        if error[0] is not None:
            raise error[0]
        read(self, buffer, offset)

    monkeypatch.setattr(FileReader, "read", raising)

    def fail(with_: BaseException | None) -> None:
        error[0] = with_

    return fail


@pytest.mark.parametrize("error", [LocalMoeError("the disk is gone"), MemoryError("none left"), KeyboardInterrupt()])
def test_a_failed_read_is_told_and_the_next_step_is_right(
    quantised: Path, failing: Callable[[BaseException | None], None], error: BaseException
) -> None:
    with closing(opened(quantised, "off")) as model:
        expected = said(model)
    with closing(opened(quantised, "slots", share=0.3)) as model:
        failing(error)
        with pytest.raises(LocalMoeError, match=r"disk is gone|could not be read"):
            model.forward(IDS[:PROMPT], 0, prompt=True)
        failing(None)
        assert said(model) == expected


def interrupting(files: tuple[str, ...], strike: int) -> Any:
    """A trace function that raises at the so-manieth line run in these files."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            lines += 1
            if lines == strike:
                raise KeyboardInterrupt
        return trace

    return trace


def test_an_interrupt_between_any_two_steps_of_the_store_leaves_it_true(quantised: Path) -> None:
    """Ctrl+C raises in the thread that computes: tried at many lines of the store's files."""
    with closing(opened(quantised, "off")) as model:
        expected = said(model)
    files = ("slots.py", "readers.py", "pool.py")
    with closing(opened(quantised, "slots", share=0.1)) as model:
        for strike in [*range(0, 600, 7), *range(600, 6000, 211)]:
            sys.settrace(interrupting(files, strike))
            try:
                said(model)
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            if strike % 5 == 0:
                assert said(model) == expected, strike
        assert said(model) == expected
