"""How many threads a process should start: its physical cores, within its affinity and its cgroup's quota; knows no
team."""

from __future__ import annotations

import os
from math import ceil
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup version 2: "quota period" in microseconds, or "max period"


def default_threads(topology: Path = TOPOLOGY, quota: Path = QUOTA) -> int:
    """Physical cores (decoding is bound by memory: a second thread on a core only gets in the way), at least 1."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return max(1, min(len({_core(topology, cpu) for cpu in usable}), _allowance(quota)))


def _core(topology: Path, cpu: int) -> tuple[str, str]:
    """What logical processors of one core have in common; each its own where the system does not tell."""
    folder = topology / f"cpu{cpu}" / "topology"
    try:
        return (folder / "physical_package_id").read_text().strip(), (folder / "core_id").read_text().strip()
    except OSError:
        return "", str(cpu)


def _allowance(quota: Path) -> int:
    """Cores' worth of time that the cgroup may use."""
    try:
        allowed, period = quota.read_text().split()
        return ceil(int(allowed) / int(period))
    except (OSError, ValueError):  # no such file, or no limit
        return os.cpu_count() or 1
