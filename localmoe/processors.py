"""How busy, how slowed down and how hot the machine's processors are, as far as Linux tells; knows no kernels."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
TICKS = 8  # of /proc/stat that are known: user, nice, system, idle, iowait, irq, softirq, steal (proc_stat(5))
IDLE, WAITING, STOLEN = 3, 4, 7


@dataclass(frozen=True, slots=True)
class Busy:
    """Shares of all processors' time: of other programs, and of other machines on the same host (stolen)."""

    others: float
    stolen: float


class Watch:
    """Measures from its making until `seen`; `root` is where /proc and /sys lie."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._ticks, self._own, self._throttled = _ticks(root), _own_seconds(), throttled(root)

    def seen(self) -> Busy | None:
        """None where the system does not tell, or no time has passed."""
        after, own = _ticks(self._root), _own_seconds() - self._own
        if self._ticks is None or after is None:
            return None
        passed = [b - a for a, b in zip(self._ticks, after, strict=True)]
        whole = sum(passed)
        if whole <= 0:
            return None
        busy = whole - passed[IDLE] - passed[WAITING] - passed[STOLEN]
        return Busy(max(0.0, busy - own * _ticks_a_second()) / whole, passed[STOLEN] / whole)

    def throttled(self) -> int | None:
        """How often a core was slowed down for its heat meanwhile; None where the system does not tell."""
        after = throttled(self._root)
        return None if self._throttled is None or after is None else after - self._throttled


def throttled(root: Path = ROOT) -> int | None:
    """How often cores were slowed down for their heat since the start (Intel); None where the system does not tell."""
    cores = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    found = _numbers(cores)
    return sum(found) if found else None


def clock(root: Path = ROOT) -> tuple[float, float] | None:
    """(now, at most) of the quickest core in Hz; None where the system does not tell."""
    folder = root / "sys/devices/system/cpu"
    now = _numbers(folder.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    most = _numbers(folder.glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq"))
    return (1000 * max(now), 1000 * max(most)) if now and most else None


def governor(root: Path = ROOT) -> str | None:
    """How the system chooses clocks, such as "performance" or "powersave"."""
    try:
        return (root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return None


def hottest(root: Path = ROOT) -> float | None:
    """Degrees Celsius of the hottest sensor; None where there is none."""
    found = _numbers((root / "sys/class/thermal").glob("thermal_zone*/temp"))
    return max(found) / 1000 if found else None


def _ticks(root: Path) -> list[int] | None:
    try:
        words = (root / "proc/stat").read_text().partition("\n")[0].split()
        found = [int(word) for word in words[1 : TICKS + 1]]
    except (OSError, ValueError):
        return None
    return found if len(found) == TICKS else None


def _own_seconds() -> float:
    used = os.times()
    return used.user + used.system


def _ticks_a_second() -> int:
    return os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _numbers(files: Iterable[Path]) -> list[int]:
    found = []
    for file in files:
        try:
            found.append(int(file.read_text()))
        except (OSError, ValueError):
            continue
    return found
