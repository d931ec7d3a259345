"""The default number of threads: physical cores that are quick, within what the process may use."""

from __future__ import annotations

import ctypes
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from localmoe.benchmark import machine
from localmoe.kernels.cpu import cores
from localmoe.kernels.cpu.cores_elsewhere import Cores, WindowsCore, counted, macos_cores, sysctl, windows_records


def describe(folder: Path, core_of_cpu: list[tuple[int, int]]) -> Path:
    for cpu, (package, core) in enumerate(core_of_cpu):
        place = folder / f"cpu{cpu}" / "topology"
        place.mkdir(parents=True)
        (place / "physical_package_id").write_text(f"{package}\n")
        (place / "core_id").write_text(f"{core}\n")
    return folder


def threads(topology: Path, slow: str = "none", groups: str = "none") -> int:
    """By default no list of slow cores and no quota."""
    return cores.default_threads(cores.linux_cores(topology, topology / slow), topology / groups)


def test_two_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    topology = describe(tmp_path, [(0, 0), (0, 1), (0, 0), (0, 1)])
    assert threads(topology) == 2


def test_cores_of_two_sockets_are_different_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert threads(describe(tmp_path, [(0, 0), (1, 0)])) == 2


@pytest.mark.parametrize(("limit", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8)])
def test_a_container_gets_no_more_threads_than_its_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    (tmp_path / "cpu.max").write_text(limit)
    assert threads(tmp_path, groups=".") == expected


@pytest.mark.parametrize(
    ("limit", "period", "expected"),
    [("150000", "100000", 2), ("50000", "100000", 1), ("-1", "100000", 8), ("400000", "0", 8), ("400000", "", 8)],
)
def test_a_quota_of_the_first_version_is_heeded_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, period: str, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{limit}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text(f"{period}\n")
    assert threads(tmp_path, groups=".") == expected


def test_the_smaller_of_two_quotas_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu.max").write_text("500000 100000\n")
    assert threads(tmp_path, groups=".") == 3


def test_efficiency_cores_get_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two performance cores of two threads, then four efficiency cores, as on an Intel hybrid processor."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    topology = describe(tmp_path, [(0, 0), (0, 0), (0, 4), (0, 4), (0, 8), (0, 9), (0, 10), (0, 11)])
    (tmp_path / "cpus").write_text("4-6,7\n")
    assert threads(topology, "cpus") == 2


@pytest.mark.parametrize(("capacities", "expected"), [([1024, 900, 300, 300], 2), ([512, 512, 512, 512], 4)])
def test_cores_of_small_capacity_get_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capacities: list[int], expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    topology = describe(tmp_path, [(0, core) for core in range(4)])
    for cpu, capacity in enumerate(capacities):
        (topology / f"cpu{cpu}" / "cpu_capacity").write_text(f"{capacity}\n")
    assert threads(topology) == expected


def test_a_process_kept_on_slow_cores_uses_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4, 5}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    (tmp_path / "cpus").write_text("4-7")
    assert threads(tmp_path, "cpus") == 2


def test_quick_processors_are_the_first_of_each_quick_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 2, 3, 4, 5}, raising=False)
    topology = describe(tmp_path, [(0, 0), (0, 0), (0, 4), (0, 4), (0, 8), (0, 9)])
    (tmp_path / "cpus").write_text("4-5\n")
    assert cores.quick_processors(topology, tmp_path / "cpus") == (1, 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4, 5}, raising=False)
    assert cores.quick_processors(topology, tmp_path / "cpus") == (4, 5)


# macOS and Windows


def told(*levels: tuple[int, str], **numbers: int) -> Any:
    """A system that knows these numbers, and of each level of performance how many cores and its name."""
    known = {f"hw.{name}": number.to_bytes(4, "little") for name, number in numbers.items()}
    for level, (count, name) in enumerate(levels):
        known[f"hw.perflevel{level}.physicalcpu"] = count.to_bytes(4, "little")
        known |= {f"hw.perflevel{level}.name": name.encode() + b"\0"} if name else {}
    return lambda name: known.get(name, b"")


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (told((4, "Performance"), (4, "Efficiency"), physicalcpu=8, logicalcpu=8), Cores(4, 4, 8)),  # M1
        (told((4, "Super"), (6, "Efficiency"), physicalcpu=10, logicalcpu=10), Cores(4, 6, 10)),  # M5
        (told((6, "Super"), (12, "Performance"), physicalcpu=18, logicalcpu=18), Cores(18, 0, 18)),  # M5 Max
        (told((4, ""), (4, ""), physicalcpu=8, logicalcpu=8), Cores(4, 4, 8)),
        (told(physicalcpu=4, logicalcpu=8), Cores(4, 0, 8)),  # Intel: no levels
        (told((4, "Performance"), physicalcpu=4, logicalcpu=4), Cores(4, 0, 4)),
        (told(physicalcpu=4), Cores(4, 0, 4)),
        (told((9, ""), (9, ""), physicalcpu=8, logicalcpu=8), Cores(8, 0, 8)),
        (told(), None),
    ],
)
def test_on_macos_the_cores_of_levels_that_are_not_for_efficiency_are_quick(
    system: Any, expected: Cores | None
) -> None:
    assert macos_cores(system) == expected


def test_sysctl_gives_what_is_under_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its prototype (sys/sysctl.h): int sysctlbyname(const char *, void *, size_t *, void *, size_t)."""
    asked = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, *[ctypes.c_void_p] * 3, ctypes.c_size_t)
    def answer(name: bytes, old: int, nbytes: int, new: int | None, new_nbytes: int) -> int:
        asked.append((name, ctypes.c_size_t.from_address(nbytes).value, new, new_nbytes))
        if name != b"hw.physicalcpu":
            return -1
        ctypes.c_int32.from_address(old).value = 10
        ctypes.c_size_t.from_address(nbytes).value = 4
        return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda _: type("Library", (), {"sysctlbyname": answer}))
    assert (sysctl("hw.physicalcpu"), sysctl("hw.perflevel0.physicalcpu")) == (b"\n\0\0\0", b"")
    assert asked[0] == (b"hw.physicalcpu", 64, None, 0)


@pytest.mark.skipif(sys.platform == "darwin", reason="which has the call")
def test_a_system_without_the_call_of_macos_tells_nothing() -> None:
    assert sysctl("hw.physicalcpu") == b""
    assert macos_cores() is None


class Affinity(ctypes.Structure):
    """GROUP_AFFINITY, as winnt.h has it."""

    _fields_ = (("mask", ctypes.c_uint64), ("group", ctypes.c_uint16), ("reserved", ctypes.c_uint16 * 3))


class Processor(ctypes.Structure):
    """PROCESSOR_RELATIONSHIP up to its array."""

    _fields_ = (
        ("flags", ctypes.c_uint8),
        ("efficiency", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 20),
        ("groups", ctypes.c_uint16),
    )


class Record(ctypes.Structure):
    """SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX up to that array."""

    _fields_ = (("relation", ctypes.c_uint32), ("nbytes", ctypes.c_uint32), ("processor", Processor))


def record(efficiency: int, *processors: tuple[int, int], relation: int = 0) -> bytes:
    """Of a core whose logical processors are (group, bits)."""
    inner = Processor(1, efficiency, (ctypes.c_uint8 * 20)(*range(20)), len(processors))
    groups = b"".join(bytes(Affinity(bits, group, (7, 7, 7))) for group, bits in processors)
    return bytes(Record(relation, ctypes.sizeof(Record) + len(groups), inner)) + groups


HYBRID = b"".join([record(1, (0, 3)), record(1, (0, 12)), *(record(0, (0, 1 << i)) for i in (4, 5, 6))])


def test_a_record_of_windows_is_48_bytes_long() -> None:
    assert len(record(0, (0, 1))) == 48


def test_on_windows_cores_of_the_highest_class_are_quick_and_two_threads_of_one_count_once() -> None:
    assert counted(list(windows_records(HYBRID))) == Cores(2, 3, 7)
    alike = record(0, (0, 3)) + record(0, (0, 12))
    assert counted(list(windows_records(alike))) == Cores(2, 0, 4)


def test_other_records_are_passed_over_and_groups_are_told_apart() -> None:
    answer = record(5, (0, 1), relation=3) + record(0, (0, 1 << 63)) + record(2, (1, 3), (2, 1))
    assert list(windows_records(answer)) == [WindowsCore(0, ((0, 1 << 63),)), WindowsCore(2, ((1, 3), (2, 1)))]


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [(0b10110, Cores(2, 1, 3)), (0b110000, Cores(2, 0, 2)), (0, Cores(2, 3, 7)), (1 << 40, None)],
)
def test_on_windows_processors_outside_the_affinity_do_not_count(allowed: int, expected: Cores | None) -> None:
    assert counted(list(windows_records(HYBRID)), allowed) == expected


def test_an_affinity_says_nothing_where_there_are_several_groups() -> None:
    assert counted(list(windows_records(record(0, (0, 3)) + record(0, (1, 3)))), 1) == Cores(2, 0, 4)


def test_an_answer_that_is_cut_short_gives_the_records_before() -> None:
    whole = list(windows_records(HYBRID))
    for stop in range(len(HYBRID)):
        assert list(windows_records(HYBRID[:stop])) == whole[: stop // 48]


@pytest.mark.parametrize("nbytes", [0, 1, 31])
def test_a_record_that_is_shorter_than_its_head_ends_the_answer(nbytes: int) -> None:
    broken = bytearray(record(0, (0, 1)) * 2)
    broken[52:56] = nbytes.to_bytes(4, "little")
    assert len(list(windows_records(bytes(broken)))) == 1


def test_more_groups_than_a_record_holds_are_not_read() -> None:
    broken = bytearray(record(0, (0, 1)) + record(0, (3, 5)))
    broken[30:32] = b"\xff\xff"
    assert list(windows_records(bytes(broken))) == [WindowsCore(0, ((0, 1),)), WindowsCore(0, ((3, 5),))]


def test_any_bytes_are_read_to_an_end() -> None:
    chance = random.Random(0)
    for _ in range(2000):
        answer = bytearray(HYBRID)
        for _ in range(chance.randrange(1, 8)):
            answer[chance.randrange(len(answer))] = chance.choice((0, 1, 16, 32, 48, 255))
        counted(list(windows_records(bytes(answer))))


@pytest.mark.parametrize(("platform", "place"), [("darwin", "macos_cores"), ("win32", "windows_cores")])
@pytest.mark.parametrize(("found", "expected"), [(Cores(4, 6, 10), 4), (None, 12)])
def test_a_system_is_asked_by_its_own_call_and_else_all_processors_count(
    platform: str, place: str, found: Cores | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "sys", SimpleNamespace(platform=platform))
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    monkeypatch.setattr(cores, place, lambda: found)
    assert cores.usable_cores() == (found or Cores(12, 0, 12))
    assert cores.default_threads(groups=tmp_path) == expected


def test_a_machine_is_described_by_the_same_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: Cores(4, 6, 14))
    assert machine.cores() == "10 physical (6 slow), 14 logical"
    monkeypatch.setattr(machine, "usable_cores", lambda: Cores(4, 0, 8))
    assert machine.cores() == "4 physical, 8 logical"
