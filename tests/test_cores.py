"""The default number of threads: physical cores that are quick, within what the process may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from localmoe.kernels.cpu import cores


def describe(folder: Path, core_of_cpu: list[tuple[int, int]]) -> Path:
    for cpu, (package, core) in enumerate(core_of_cpu):
        place = folder / f"cpu{cpu}" / "topology"
        place.mkdir(parents=True)
        (place / "physical_package_id").write_text(f"{package}\n")
        (place / "core_id").write_text(f"{core}\n")
    return folder


def nowhere(folder: Path) -> tuple[Path, Path]:
    """Neither a list of slow cores nor a quota."""
    return folder / "none", folder / "none"


def test_two_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    topology = describe(tmp_path, [(0, 0), (0, 1), (0, 0), (0, 1)])
    assert cores.default_threads(topology, *nowhere(tmp_path)) == 2


def test_cores_of_two_sockets_are_different_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert cores.default_threads(describe(tmp_path, [(0, 0), (1, 0)]), *nowhere(tmp_path)) == 2


@pytest.mark.parametrize(("limit", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8)])
def test_a_container_gets_no_more_threads_than_its_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    (tmp_path / "cpu.max").write_text(limit)
    assert cores.default_threads(tmp_path, tmp_path / "none", tmp_path / "cpu.max") == expected


def test_efficiency_cores_get_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two performance cores of two threads, then four efficiency cores, as on an Intel hybrid processor."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    topology = describe(tmp_path, [(0, 0), (0, 0), (0, 4), (0, 4), (0, 8), (0, 9), (0, 10), (0, 11)])
    (tmp_path / "cpus").write_text("4-6,7\n")
    assert cores.default_threads(topology, tmp_path / "cpus", tmp_path / "none") == 2


@pytest.mark.parametrize(("capacities", "expected"), [([1024, 900, 300, 300], 2), ([512, 512, 512, 512], 4)])
def test_cores_of_small_capacity_get_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capacities: list[int], expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    topology = describe(tmp_path, [(0, core) for core in range(4)])
    for cpu, capacity in enumerate(capacities):
        (topology / f"cpu{cpu}" / "cpu_capacity").write_text(f"{capacity}\n")
    assert cores.default_threads(topology, *nowhere(tmp_path)) == expected


def test_a_process_kept_on_slow_cores_uses_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4, 5}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    (tmp_path / "cpus").write_text("4-7")
    assert cores.default_threads(tmp_path, tmp_path / "cpus", tmp_path / "none") == 2
