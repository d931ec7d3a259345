"""How many threads a process should start: its physical cores that are quick, within its affinity and its cgroup's
quota; knows no team."""

from __future__ import annotations

import os
from collections.abc import Iterable
from math import ceil
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")
SLOW = Path("/sys/devices/cpu_atom/cpus")  # Intel's efficiency cores, there on hybrid processors only: "12-19"
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup version 2: "quota period" in microseconds, or "max period"


def default_threads(topology: Path = TOPOLOGY, slow: Path = SLOW, quota: Path = QUOTA) -> int:
    """Physical cores that are quick, at least 1.

    Decoding is bound by memory: a second thread on a core only gets in the way. And threads share a matrix evenly, so
    that one slow core would hold up all.
    """
    usable = usable_processors()
    quick = usable - slow_processors(usable, topology, slow)
    return max(1, min(physical_cores(quick or usable, topology), _allowance(quota)))


def usable_processors() -> set[int]:
    """Logical processors that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def physical_cores(processors: Iterable[int], topology: Path = TOPOLOGY) -> int:
    """How many cores these logical processors belong to."""
    return len({_core(topology, cpu) for cpu in processors})


def slow_processors(processors: set[int], topology: Path = TOPOLOGY, slow: Path = SLOW) -> set[int]:
    """Those of a hybrid processor's efficiency cores, or of less than half of the greatest capacity that Linux states;
    empty where all are alike or the system does not tell."""
    capacities = {cpu: _number(topology / f"cpu{cpu}" / "cpu_capacity") for cpu in processors}
    greatest = max(capacities.values(), default=0)
    return {cpu for cpu, capacity in capacities.items() if 2 * capacity < greatest} | (_listed(slow) & processors)


def _core(topology: Path, cpu: int) -> tuple[str, str]:
    """What logical processors of one core have in common; each its own where the system does not tell."""
    folder = topology / f"cpu{cpu}" / "topology"
    try:
        return (folder / "physical_package_id").read_text().strip(), (folder / "core_id").read_text().strip()
    except OSError:
        return "", str(cpu)


def _number(file: Path) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0


def _listed(file: Path) -> set[int]:
    """The numbers of a list such as "0-3,8"."""
    try:
        spans = [part.partition("-") for part in file.read_text().strip().split(",")]
        return {n for first, _, last in spans for n in range(int(first), int(last or first) + 1)}
    except (OSError, ValueError):  # no such file, or an empty one
        return set()


def _allowance(quota: Path) -> int:
    """Cores' worth of time that the cgroup may use."""
    try:
        allowed, period = quota.read_text().split()
        return ceil(int(allowed) / int(period))
    except (OSError, ValueError):  # no such file, or no limit
        return os.cpu_count() or 1
