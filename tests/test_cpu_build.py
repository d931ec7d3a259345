"""Compiled kernels: emitted for the instruction set asked for, cached, loaded without numba; and what `v` promises."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest

from localmoe.errors import DeviceError
from localmoe.kernels.cpu import build, isa, matmul
from localmoe.kernels.cpu.build import Kernels, kernel

ISAS = isa.runnable()
WIDER = {"avx512": (), "avx2": ("zmm",), "portable": ("ymm", "zmm", "vmovups", "vmulps")}


@kernel("test_copy_plus_one", arguments=3)
def copy_plus_one(v: Any) -> Callable[..., None]:
    def run(source, target, count):  # type: ignore[no-untyped-def]
        for i in range(count):
            v.store(target + i * 8, v.load(v.int64, source + i * 8) + 1)

    return run


@kernel("test_zeros", arguments=2)
def zeros(v: Any) -> Callable[..., None]:
    held = v.stack(1024)

    def run(target, count):  # type: ignore[no-untyped-def]
        place = held()
        for i in range(0, 4 * count, 4 * v.lanes):
            v.store(place + i, v.zero(v.f32))
        for i in range(0, 4 * count, 4):
            v.store(target + i, v.load(v.int32, place + i))

    return run


@kernel("test_floats", arguments=3)
def floats(v: Any) -> Callable[..., None]:
    def run(source, target, count):  # type: ignore[no-untyped-def]
        step = 4 * v.lanes
        for i in range(0, 4 * count, step):
            x = v.load(v.f32, source + i)
            v.store(target + i, v.exp(x))
            v.store(target + 4 * count + i, v.convert(v.f32, v.nearest(x)))
            v.store(target + 8 * count + i, -x * 2 + v.sqrt(v.absolute(x)))
            v.store_half(target + 12 * count + i // 2, x)
            v.store(target + 16 * count + i, v.maximum(x, v.splat(v.f32, np.float32(1))))

    return run


@kernel("test_integers", arguments=2)
def integers(v: Any) -> Callable[..., None]:
    def run(source, target):  # type: ignore[no-untyped-def]
        u, s, t = v.load(v.u8x32, source), v.load(v.i8x32, source + 32), v.load(v.i8x32, source + 64)
        v.store(target, v.dot(v.zero(v.i32x8), u, t))
        v.store(target + 32, v.dot(v.zero(v.i32x8), s, t))
        v.store(target + 64, v.convert(v.i32x8, v.load(v.i16x8, source) >> 3))
        v.store(target + 96, v.convert(v.u32x8, v.load(v.u16x8, source) >> 3))
        v.store(target + 128, v.word_pairs(v.load(v.i16x16, source), v.load(v.i16x16, source + 32)))
        v.store(target + 160, v.total(v.convert(v.i32x8, v.load(v.i8x8, source))))

    return run


@kernel("test_atomics", arguments=2)
def atomics(v: Any) -> Callable[..., None]:
    table = v.table(np.array([5, 7], np.int64))
    held = v.stack(16)

    def run(counter, callee):  # type: ignore[no-untyped-def]
        v.atomic_store(counter, v.atomic_add(counter, 3) * 100 + v.atomic_load(counter))
        place = held()
        v.store(place, v.load(v.int64, table() + 8))
        v.call(callee, place, counter + 8, 1)
        v.pause()

    return run


def called(folder: Path, which: str, name: str, *arguments: int) -> None:
    kernels = Kernels(isa.named(which), folder)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))(kernels.address(name))(*arguments)


@pytest.mark.parametrize("which", ISAS)
@pytest.mark.parametrize("name", ["gemv_f16", "gemv_q8_0", "gemv_q4_k"])
def test_no_instruction_wider_than_the_instruction_set_is_emitted(name: str, which: str) -> None:
    text = build.assembly(name, isa.named(which))
    for word in WIDER[which] if isa.named(which).x86 else ():
        assert word not in text
    if which == "avx512":
        assert "zmm" in text
        assert matmul.FAST["Q8_0"][0] != name or "vpdpbusd" in text


@pytest.mark.parametrize("which", ISAS)
def test_exp_rounding_and_halves_agree_with_numpy(which: str, tmp_path: Path) -> None:
    special = [0, -0.0, 1, -1, 0.5, 1.5, 2.5, -2.5, -np.inf, np.inf, np.nan, -87.5, 88.7, 65504, 6e-8, 1e-7]
    x = np.array([*special, *np.linspace(-87, 88, 4080), *np.geomspace(1e-7, 7e4, 4096)], np.float32)
    out = np.full(5 * x.size, np.nan, np.float32)
    called(tmp_path, which, "test_floats", x.ctypes.data, out.ctypes.data, x.size)
    exp, nearest, mixed, halves, larger = out.reshape(5, -1)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.exp(x.astype(np.float64))
        normal = (x > -87) & (x < 88)
        assert (np.abs(exp[normal] / expected[normal] - 1)).max() < 3e-7
        assert exp[8] == 0
        assert np.isinf(exp[9])
        assert np.isnan(exp[10])
        small = np.abs(x) < 1e6
        assert (nearest[small] == np.rint(x[small])).all()
        np.testing.assert_array_equal(mixed[small], (-x * 2 + np.sqrt(np.abs(x)))[small])
        half = x.astype(np.float16)
        np.testing.assert_array_equal(halves.view(np.float16)[: x.size], half)
        assert (larger[small] == np.maximum(x[small], 1)).all()


@pytest.mark.parametrize("which", ISAS)
def test_a_loop_that_stores_zeros_calls_nothing(which: str, tmp_path: Path) -> None:
    """An object that expects a function of the C library would move the constants of those loaded with it."""
    assert build.outside(build.emitted("test_zeros", isa.named(which))) == []
    kernels = Kernels(isa.named(which), tmp_path)
    kernels.prepare(("test_zeros", "test_floats"))
    found = np.full(160, 7, np.int32)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 2)(kernels.address("test_zeros"))(found.ctypes.data, 128)
    assert found.tolist() == [0] * 128 + [7] * 32


def test_what_an_object_calls_is_told() -> None:
    target = build.target_machine(isa.host_isa())
    text = "declare void @memset()\ndefine void @f() {\n  call void @memset()\n  ret void\n}\n"
    module = llvm.parse_assembly(text)
    module.triple = isa.host_isa().triple
    assert build.outside(bytes(target.emit_object(module))) == ["memset"]


@pytest.mark.parametrize("which", ISAS)
def test_integer_products_are_exact_at_the_ends_of_their_ranges(which: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = np.concatenate([rng.integers(0, 256, 64), rng.integers(-127, 128, 32) & 255]).astype(np.uint8)
    data[:8], data[32:40], data[64:72] = 255, 128, 127
    out = np.full(41, -1, np.int32)
    called(tmp_path, which, "test_integers", data.ctypes.data, out.ctypes.data)
    u, s, t = data[:32].astype(np.int32), data[32:64].view(np.int8).astype(np.int32), data[64:].view(np.int8)
    assert (out[:8] == (u * t).reshape(8, 4).sum(1)).all()
    assert (out[8:16] == (s * t).reshape(8, 4).sum(1)).all()
    assert (out[16:24] == data[:16].view(np.int16).astype(np.int32) >> 3).all()
    assert (out[24:32] == data[:16].view(np.uint16).astype(np.int32) >> 3).all()
    words = data[:64].view(np.int16).astype(np.int32).reshape(2, 8, 2)
    assert (out[32:40] == (words[0] * words[1]).sum(1)).all()
    assert out[40] == data[:8].view(np.int8).sum()


def test_atomics_tables_stack_and_calls_by_address_work_together(tmp_path: Path) -> None:
    kernels = Kernels(isa.named(ISAS[0]), tmp_path)
    cells = np.array([4, 0], np.int64)
    callee = kernels.address("test_copy_plus_one")
    ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(kernels.address("test_atomics"))(cells.ctypes.data, callee)
    assert cells.tolist() == [407, 8]


def test_progress_is_told_on_the_first_start_and_a_warm_one_compiles_nothing(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    for _ in range(2):
        Kernels(isa.named(ISAS[0]), tmp_path).prepare(["test_copy_plus_one"], lambda *step: told.append(step))
    assert told == [(0, 1, "test_copy_plus_one"), (1, 1, "test_copy_plus_one")]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_object_is_noticed_and_built_again(damage: str, tmp_path: Path) -> None:
    numbers, out = np.array([41], np.int64), np.zeros(1, np.int64)
    arguments = (numbers.ctypes.data, out.ctypes.data, 1)
    called(tmp_path, ISAS[0], "test_copy_plus_one", *arguments)
    (stored,) = tmp_path.rglob("test_copy_plus_one.o")
    good = stored.read_bytes()
    flipped = bytearray(good)
    flipped[100] ^= 1
    stored.write_bytes({"cut": good[:-5], "flipped": bytes(flipped), "empty": b""}[damage])
    called(tmp_path, ISAS[0], "test_copy_plus_one", *arguments)
    assert out[0] == 42
    assert stored.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    numbers, out = np.array([1], np.int64), np.zeros(1, np.int64)
    called(blocked, ISAS[0], "test_copy_plus_one", numbers.ctypes.data, out.ctypes.data, 1)
    assert out[0] == 2


def test_a_warm_start_never_imports_numba(tmp_path: Path) -> None:
    Kernels(isa.host_isa(), tmp_path).prepare(["gemv_f32"])
    script = (
        "import sys, pathlib; from localmoe.kernels.cpu import activations, gemm, matmul, isa, build;"
        f"build.Kernels(isa.host_isa(), pathlib.Path({str(tmp_path)!r})).address('gemv_f32');"
        "assert not {'numba', 'gguf'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_an_instruction_set_that_the_host_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = isa.host()._replace(features={})
    monkeypatch.setattr(isa, "host", lambda: bare)
    assert isa.runnable() == ("portable",)
    with pytest.raises(DeviceError, match="'avx2' cannot run on this processor; possible: portable"):
        isa.named("avx2")


def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMOE_ISA", "portable")
    assert isa.host_isa().name == "portable"
    monkeypatch.setenv("LOCALMOE_ISA", "sse9")
    with pytest.raises(DeviceError, match="sse9"):
        isa.host_isa()
