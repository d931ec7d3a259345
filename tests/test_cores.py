"""The default number of threads: physical cores within what the process may use."""

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


def test_two_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    topology = describe(tmp_path, [(0, 0), (0, 1), (0, 0), (0, 1)])
    assert cores.default_threads(topology, tmp_path / "none") == 2


def test_cores_of_two_sockets_are_different_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert cores.default_threads(describe(tmp_path, [(0, 0), (1, 0)]), tmp_path / "none") == 2


@pytest.mark.parametrize(("limit", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8)])
def test_a_container_gets_no_more_threads_than_its_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    (tmp_path / "cpu.max").write_text(limit)
    assert cores.default_threads(tmp_path, tmp_path / "cpu.max") == expected
