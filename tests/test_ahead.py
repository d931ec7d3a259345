"""Kernels emitted ahead of time: for other machines too, in archives that are guarded, chosen by a host's features."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localmoe.kernels.cpu import ahead, build, isa
from localmoe.kernels.cpu.build import Kernels, kernel
from localmoe.kernels.cpu.isa import TARGETS, Isa, Target, host_isa, target_of
from localmoe.kernels.cpu.shipped import SUFFIX, Archive, write_archive

ahead.import_kernels()
OBJECTS = {"one": b"code of one", "two": bytes(range(256))}
BY_NAME = {target.name: target for target in TARGETS}
ZEN4 = BY_NAME["znver4"].needs
here = target_of(host_isa())
needs_target = pytest.mark.skipif(here is None, reason="no target is for this host")


@kernel("test_doubled", arguments=2)
def doubled(v: Any) -> Callable[..., None]:
    def run(source, target):  # type: ignore[no-untyped-def]
        v.store(target, v.load(v.int64, source) * 2)

    return run


def doubled_21(kernels: Kernels, progress: list[str]) -> int:
    kernels.prepare(["test_doubled"], lambda done, total, name: progress.append(name))
    numbers = np.array([21, 0], np.int64)
    run = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(kernels.address("test_doubled"))
    run(numbers.ctypes.data, numbers.ctypes.data + 8)
    return int(numbers[1])


def written(folder: Path, objects: dict[str, bytes], fingerprint: str = "") -> Path:
    """An archive for this host."""
    assert here is not None
    path = folder / (here.name + SUFFIX)
    write_archive(path, fingerprint or build.emitted_fingerprint(here.isa), objects)
    return path


def symbols(code: bytes) -> tuple[int, list[str], list[str]]:
    """Of an ELF object: its machine, the names that it defines, and those that it lacks."""
    assert code[:5] == b"\x7fELF\x02"
    (table,), (count,) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<H", code, 60)
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, table + 64 * i) for i in range(count)]
    (kept,) = [s for s in sections if s[1] == 2]
    names = sections[kept[6]][4]
    defined, lacking = [], []
    for at in range(kept[4], kept[4] + kept[5], 24):
        name, info, _, section = struct.unpack_from("<IBBH", code, at)
        text = code[names + name : code.index(b"\0", names + name)].decode()
        if text and info >> 4 == 1:
            (defined if section else lacking).append(text)
    return struct.unpack_from("<H", code, 18)[0], defined, lacking


def test_an_archive_gives_back_what_was_put_in(tmp_path: Path) -> None:
    write_archive(tmp_path / "deep" / "a", "print", OBJECTS)
    archive = Archive(tmp_path / "deep" / "a", "print")
    assert set(archive.names()) == set(OBJECTS)
    assert {name: archive.object(name) for name in OBJECTS} == OBJECTS
    assert archive.object("three") is None


def test_an_archive_of_other_sources_is_empty(tmp_path: Path) -> None:
    write_archive(tmp_path / "a", "print", OBJECTS)
    assert Archive(tmp_path / "a", "another").names() == ()
    assert Archive(tmp_path / "absent", "print").object("one") is None


def test_no_damage_to_an_archive_gives_code_that_was_not_put_in(tmp_path: Path) -> None:
    write_archive(tmp_path / "a", "print", OBJECTS)
    good = (tmp_path / "a").read_bytes()
    for at in range(len(good)):
        flipped = bytearray(good)
        flipped[at] ^= 4
        for damaged in (good[:at], bytes(flipped)):
            (tmp_path / "a").write_bytes(damaged)
            archive = Archive(tmp_path / "a", "print")
            assert all(archive.object(name) in (None, code) for name, code in OBJECTS.items())


@needs_target
def test_a_shipped_kernel_is_neither_compiled_nor_cached(tmp_path: Path) -> None:
    assert here is not None
    written(tmp_path / "shipped", {"test_doubled": build.emitted("test_doubled", here.isa)})
    told: list[str] = []
    assert doubled_21(Kernels(host_isa(), tmp_path / "cache", tmp_path / "shipped"), told) == 42
    assert not told
    assert not (tmp_path / "cache").exists()


@needs_target
@pytest.mark.parametrize("fingerprint", ["0" * 16, ""])
def test_what_the_archive_lacks_is_compiled(tmp_path: Path, fingerprint: str) -> None:
    assert here is not None
    objects = {"test_doubled": build.emitted("test_doubled", here.isa)} if fingerprint else OBJECTS
    written(tmp_path / "shipped", objects, fingerprint)
    told: list[str] = []
    assert doubled_21(Kernels(host_isa(), tmp_path / "cache", tmp_path / "shipped"), told) == 42
    assert told == ["test_doubled", "test_doubled"]


def test_the_fingerprint_of_a_target_is_the_same_on_every_host_but_not_for_two_targets() -> None:
    prints = {build.emitted_fingerprint(target.isa) for target in TARGETS}
    assert len(prints) == len(TARGETS)
    first = TARGETS[0].isa
    assert build.emitted_fingerprint(replace(first)) == build.emitted_fingerprint(first)


@pytest.mark.parametrize("name", ["gemv_q8_0", "cache_append_q4_0"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_host_emits_objects_for_every_target(target: Target, name: str) -> None:
    machine, defined, lacking = symbols(build.emitted(name, target.isa))
    assert machine == (62 if target.isa.x86 else 183)  # EM_X86_64, EM_AARCH64
    assert defined == [name]
    assert set(lacking) <= {"_GLOBAL_OFFSET_TABLE_"}


@pytest.mark.parametrize("signed", [True, False])
def test_a_dot_product_is_an_instruction_on_arm(signed: bool) -> None:
    @kernel(f"test_dot_{signed}", arguments=2)
    def dot(v: Any) -> Callable[..., None]:
        left = v.i8x32 if signed else v.u8x32

        def run(source, target):  # type: ignore[no-untyped-def]
            v.store(target, v.dot(v.zero(v.i32x8), v.load(left, source), v.load(v.i8x32, source + 32)))

        return run

    text = build.assembly(f"test_dot_{signed}", BY_NAME["aarch64-dotprod"].isa)
    assert "sdot" in text
    assert "mul" not in text


@pytest.mark.parametrize(("target", "level"), [("znver5", 0), ("znver4", 1), ("cascadelake", 1), ("x86-64-v3", 1)])
@pytest.mark.parametrize("name", ["gemv_f16", "attention_decode_f16"])
def test_streams_are_prefetched_into_the_level_that_suits_the_processor(target: str, level: int, name: str) -> None:
    text = build.assembly(name, BY_NAME[target].isa)
    assert f"prefetcht{level}\t" in text
    if name.startswith("attention"):  # its only ones; matrices touch pages ahead in the second level everywhere
        assert f"prefetcht{1 - level}\t" not in text


def chosen(monkeypatch: pytest.MonkeyPatch, name: str, wanted: str, features: tuple[str, ...]) -> str | None:
    """The target for a host with this processor and these features."""
    triple = "aarch64-unknown-linux-gnu" if wanted == "arm" else "x86_64-pc-linux-gnu"
    other = isa.host()._replace(features=dict.fromkeys(features, True), processor=name)
    monkeypatch.setattr(isa, "host", lambda: other)
    found = target_of(Isa("portable" if wanted == "arm" else wanted, 8, name, "", triple))
    return found.name if found else None


@pytest.mark.parametrize(
    ("processor", "wanted", "features", "expected"),
    [
        ("znver4", "avx512", ZEN4, "znver4"),
        ("znver9", "avx512", BY_NAME["znver5"].needs, "znver5"),
        ("znver5", "avx512", (*ZEN4, "avxvnni", "avx512vp2intersect"), "znver5"),  # movdiri hidden, as some hosts do
        ("znver4", "avx512", tuple(f for f in ZEN4 if f != "avx512bf16"), "cascadelake"),
        ("sapphirerapids", "avx512", tuple(f for f in ZEN4 if f != "sse4a"), "cascadelake"),
        ("cascadelake", "avx512", BY_NAME["cascadelake"].needs, "cascadelake"),
        ("znver4", "avx2", ZEN4, "x86-64-v3"),
        ("haswell", "avx2", BY_NAME["x86-64-v3"].needs, "x86-64-v3"),
        ("haswell", "avx2", ("avx2", "fma", "f16c"), None),
        ("core2", "portable", (), "x86-64"),
        ("neoverse-v1", "arm", ("neon", "lse", "dotprod", "sve"), "aarch64-dotprod"),
        ("cortex-a72", "arm", ("neon",), None),
    ],
)
def test_a_target_is_chosen_by_features_first(
    monkeypatch: pytest.MonkeyPatch, processor: str, wanted: str, features: tuple[str, ...], expected: str | None
) -> None:
    assert chosen(monkeypatch, processor, wanted, features) == expected


def test_objects_for_linux_are_for_no_other_system() -> None:
    for triple in ("x86_64-apple-darwin", "x86_64-pc-windows-msvc"):
        assert target_of(Isa("portable", 8, "x86-64", "", triple)) is None


def test_archives_are_written_for_the_targets_and_kernels_asked_for(tmp_path: Path) -> None:
    targets = (BY_NAME["x86-64"], BY_NAME["aarch64-dotprod"])
    ahead.write_archives(tmp_path, targets, ("last_row", "add"), jobs=1)
    assert {path.name for path in tmp_path.iterdir()} == {target.name + SUFFIX for target in targets}
    for target in targets:
        archive = Archive(tmp_path / (target.name + SUFFIX), build.emitted_fingerprint(target.isa))
        assert set(archive.names()) == {"add", "last_row"}
        assert all(symbols(archive.object(name) or b"")[1] == [name] for name in archive.names())


def test_every_kernel_of_the_package_is_found() -> None:
    assert {"run_tape", "gemm", "gemv_q4_k", "attention_decode_f16", "limit_read"} <= set(build.registered())


def test_of_old_caches_the_newest_stay(tmp_path: Path) -> None:
    for age in range(5):
        (tmp_path / f"{age:016x}").mkdir()
        os.utime(tmp_path / f"{age:016x}", (1e9 - age, 1e9 - age))
    (tmp_path / "notes").mkdir()
    kernels = Kernels(host_isa(), tmp_path, tmp_path / "none")
    assert doubled_21(kernels, []) == 42
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{0:016x}", f"{1:016x}", "notes", build.fingerprint(host_isa())}
