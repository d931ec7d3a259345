"""Experts in slots: the same bits as with everything in memory, in every family, at every size and after every change;
who goes, what is refused, what an interrupt and a failed read leave behind."""

from __future__ import annotations

import gc
import mmap
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
from localmoe.errors import DeviceError, LocalMoeError, SettingError
from localmoe.experts.loading import Loading
from localmoe.experts.pool import Pool
from localmoe.experts.pressure import Pressure
from localmoe.experts.readers import Readers
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
    monkeypatch.setattr("localmoe.network.available_nbytes", lambda: 1 << 40)
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


def watched(model: Model) -> dict[str, bytes]:
    """The bits of what every op that has weights gives, in the chunk seen last."""
    seen: dict[str, bytes] = {}

    def see(op: Op, inputs: list[Floats], outputs: list[Floats]) -> None:
        if op.weights:
            name = f"{op.name} {[w.name for w in op.weights]}"
            seen[name] = b"".join(np.ascontiguousarray(x).tobytes() for x in outputs)

    seen["logits"] = model.watch(IDS[:PROMPT], see).tobytes()
    return seen


def test_watching_a_text_sees_the_same_numbers(path: Path) -> None:
    """Where it pauses for experts it has run other ops of the layer already, some of them over their inputs."""
    with closing(opened(path, "slots", share=0.0)) as few, closing(opened(path, "off")) as whole:
        expected, found = watched(whole), watched(few)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert len(found) == len(expected)


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


def test_slots_that_nobody_uses_any_more_give_their_memory_back_at_once(quantised: Path) -> None:
    """Whoever made them may be part of a circle, which Python does not look for before long."""
    gc.disable()
    try:
        with closing(opened(quantised, "slots", share=1.0)) as model:
            model.forward(IDS[:PROMPT], 0, prompt=True)
            (pool,) = slots_of(model).pools.values()
            model.change_loading(Loading("mmap"))
            assert pool._memory.closed
    finally:
        gc.enable()


def test_memory_that_there_is_not_is_refused_in_a_line() -> None:
    with pytest.raises(DeviceError, match=r"the system does not give .* of memory for experts"):
        Pool(4, 1 << 55, 4)


def test_a_system_without_huge_pages_has_slots_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)
    pool = Pool(2, 1 << 16, 2)
    pool.place(1)[:] = bytes(1 << 16)
    pool.close()


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
    assert after.min() >= pool.share == 3, (first, after)


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


def test_what_a_session_used_is_read_ahead_in_the_next_one(quantised: Path) -> None:
    with closing(opened(quantised, "slots", share=1.0)) as model:
        assert loads_of(model) == set()
        first = said(model)
        used = int((model.uses() > 0).sum())  # type: ignore[operator]
    with closing(opened(quantised, "slots", share=1.0)) as model:
        assert len(loads_of(model)) == used > 0
        assert said(model) == first
        assert (model.counts().ahead_read, model.counts().ahead_used) == (0, 0)  # nobody guessed
    with closing(opened(quantised, "slots", share=1.0, learned=False)) as model:
        assert loads_of(model) == set()


def loads_of(model: Model) -> set[int]:
    """The experts that are there or being read."""
    return {int(key) for pool in slots_of(model).pools.values() for key in pool.owner if key >= 0}


def test_a_step_does_not_wait_for_what_is_only_read_ahead(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier sessions fill all slots with reads that nobody has begun: they make room, the least likely first."""
    with closing(opened(quantised, "slots", share=1.0)) as model:
        expected = said(model)
    monkeypatch.setattr("localmoe.experts.slots.THREADS", 0)
    with closing(opened(quantised, "slots", share=0.3)) as model:
        store = slots_of(model)
        (pool,) = store.pools.values()
        asked = list(store.loading)
        assert len(asked) == pool.owner.size
        layer = store.layers[1]
        wanted = [e for e in range(6) if layer.first + e not in store.loading][:2]
        layer._ask(wanted)
        assert list(store.loading) == [*asked[: -len(wanted)], *(layer.first + e for e in wanted)]
        store.team = Readers(2)
        for load in store.loading.values():
            store.team.ask(load)
        assert said(model) == expected


@pytest.mark.parametrize("known", [True, False])
def test_guesses_are_counted_as_right_while_they_are_still_read_and_as_wrong_when_they_had_to_go(
    quantised: Path, known: bool
) -> None:
    with closing(opened(quantised, "slots", share=1.0, learned=False)) as model:
        store = slots_of(model)
        layer = store.layers[1]
        layer.expect(np.array([[2, 3]], np.int32))
        if not known:
            while store.loading:
                store.wait()
            while store.victim(layer.pool, None) is not None:
                pass
        layer.choose(np.array([[2, 4]], np.int32))
        assert (store.counts.ahead_read, store.counts.ahead_used) == (2, int(known))


def test_what_became_complete_unseen_costs_the_next_wait_nothing(quantised: Path) -> None:
    """A wait returns for something new, however many reads came to their end while nobody waited."""
    with closing(opened(quantised, "slots", share=1.0, learned=False)) as model:
        store = slots_of(model)
        for expert in range(6):
            store.layers[0].read_ahead(expert)
        while not all(load.complete for load in store.loading.values()):
            pass
        store.collect()
        assert store.team.wait() is None
        assert store.ready[0].all()


def test_a_load_that_an_interrupt_kept_from_the_readers_is_read_in_the_next_step(
    quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(opened(quantised, "slots", share=0.0, learned=False)) as model:
        store = slots_of(model)
        ask = Readers.ask
        monkeypatch.setattr(Readers, "ask", lambda team, load: None)
        store.layers[0]._ask([0, 1])
        monkeypatch.setattr(Readers, "ask", ask)
        store.begin()
        assert all(load.asked for load in store.loading.values())
        while store.loading:
            store.wait()
        assert store.ready[0, :2].all()


def test_a_trace_tells_what_was_chosen_in_slots_and_in_mmap(quantised: Path, tmp_path: Path) -> None:
    from localmoe.experts.trace import read_trace

    found = []
    for mode in ("slots", "mmap"):
        file = tmp_path / mode
        with closing(opened(quantised, mode, trace=file)) as model:
            said(model)
            uses = model.uses()
        trace = read_trace(file)
        found.append([(c.step, c.layer, c.ids.tobytes()) for c in trace.choices])
        assert uses is not None
        counted = np.zeros_like(uses)
        for choice in trace.choices:
            np.add.at(counted[choice.layer], choice.ids.ravel(), 1)
        assert (counted == uses).all()
    assert found[0] == found[1] != []


def test_every_expert_of_a_prompt_is_read_once_at_most(quantised: Path) -> None:
    """One that has come must not make room for another before it was multiplied."""
    for share in (0.0, 0.2, 0.5):
        with closing(opened(quantised, "slots", share=share, learned=False)) as model:
            model.forward(IDS, 0, prompt=True)
            counts, one = model.counts(), slots_of(model).layers[0].size.nbytes
        assert counts.nbytes_read <= (counts.chosen - counts.hits) * one
