"""What Linux tells of busy, slow and hot processors, on made-up trees of /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import localmoe.processors
from localmoe.processors import Busy, Watch, clock, governor, hottest, throttled

CORES = "sys/devices/system/cpu"


def write(root: Path, place: str, text: str) -> None:
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def ticks(root: Path, *numbers: int) -> None:
    write(root, "proc/stat", f"cpu  {' '.join(map(str, numbers))} 7 7\ncpu0 1 2 3 4 5 6 7 8 9 10")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of processor time that this process has used; a hundred ticks a second."""
    used = [0.0]
    monkeypatch.setattr(os, "times", lambda: SimpleNamespace(user=used[0], system=0.0))
    monkeypatch.setattr(localmoe.processors, "_ticks_a_second", lambda: 100)
    return used


def test_time_of_others_is_what_is_busy_and_not_ones_own(tmp_path: Path, own: list[float]) -> None:
    ticks(tmp_path, 100, 0, 0, 1000, 50, 0, 0, 0)
    watch = Watch(tmp_path)
    ticks(tmp_path, 140, 10, 10, 1020, 60, 5, 5, 0)  # 100 passed: 70 busy, 20 idle, 10 waiting for a disk
    own[0] = 0.3
    assert watch.seen() == Busy(others=0.4, stolen=0.0)


def test_stolen_time_is_that_of_other_machines(tmp_path: Path, own: list[float]) -> None:
    ticks(tmp_path, *[0] * 8)
    watch = Watch(tmp_path)
    ticks(tmp_path, 30, 0, 0, 45, 0, 0, 0, 25)
    own[0] = 9.0  # more than there was: clocks differ by a tick
    assert watch.seen() == Busy(others=0.0, stolen=0.25)


def test_where_nothing_is_told_or_no_time_has_passed_nothing_is_said(tmp_path: Path) -> None:
    assert Watch(tmp_path).seen() is None
    ticks(tmp_path, 1, 2)
    assert Watch(tmp_path).seen() is None
    ticks(tmp_path, *[5] * 8)
    assert Watch(tmp_path).seen() is None
    assert (throttled(tmp_path), clock(tmp_path), governor(tmp_path), hottest(tmp_path)) == (None,) * 4
    assert Watch(tmp_path).throttled() is None


def test_cores_that_were_slowed_down_while_watched_are_counted(tmp_path: Path) -> None:
    for core, count in ((0, 3), (1, 4)):
        write(tmp_path, f"{CORES}/cpu{core}/thermal_throttle/core_throttle_count", str(count))
    watch = Watch(tmp_path)
    assert watch.throttled() == 0
    write(tmp_path, f"{CORES}/cpu1/thermal_throttle/core_throttle_count", "6")
    assert watch.throttled() == 2
    assert throttled(tmp_path) == 9


def test_the_quickest_core_and_the_hottest_sensor_count(tmp_path: Path) -> None:
    for core, now in ((0, 1_200_000), (1, 2_400_000)):
        write(tmp_path, f"{CORES}/cpu{core}/cpufreq/scaling_cur_freq", str(now))
        write(tmp_path, f"{CORES}/cpu{core}/cpufreq/cpuinfo_max_freq", "4800000")
        write(tmp_path, f"{CORES}/cpu{core}/cpufreq/scaling_governor", "powersave")
        write(tmp_path, f"sys/class/thermal/thermal_zone{core}/temp", str(40_000 + now // 100))
    assert clock(tmp_path) == (2.4e9, 4.8e9)
    assert governor(tmp_path) == "powersave"
    assert hottest(tmp_path) == 64.0
