"""How many threads a process should start: its physical cores that are quick, within its affinity and its cgroup's
quota; knows no team. Here is what Linux tells; `cores_elsewhere.py` asks macOS and Windows."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from math import ceil
from pathlib import Path

from localmoe.kernels.cpu.cores_elsewhere import Cores, macos_cores, windows_cores

TOPOLOGY = Path("/sys/devices/system/cpu")
SLOW = Path("/sys/devices/cpu_atom/cpus")  # Intel's efficiency cores, there on hybrid processors only: "12-19"
GROUPS = Path("/sys/fs/cgroup")
SPAN = re.compile(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*")
QUOTA = "cpu.max"  # version 2: "quota period" in microseconds, or "max period"
QUOTA_AND_PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"  # version 1; a quota of -1 is none


def default_threads(found: Cores | None = None, groups: Path = GROUPS) -> int:
    """Physical cores that are quick, at least 1; of `usable_cores` unless others are given.

    Decoding is bound by memory: a second thread on a core only gets in the way. And threads share a matrix evenly, so
    that one slow core would hold up all.
    """
    found = found or usable_cores()
    return max(1, min(found.quick or found.slow, _allowance(groups)))


def usable_cores() -> Cores:
    """Those that this process may run on; without a word of the system, each of its processors is a core."""
    if sys.platform == "darwin":
        found = macos_cores()
    elif sys.platform == "win32":
        found = windows_cores()
    else:
        found = linux_cores()
    processors = len(usable_processors())
    return found or Cores(processors, 0, processors)


def linux_cores(topology: Path = TOPOLOGY, slow: Path = SLOW) -> Cores:
    """From the files of /sys; each logical processor is a core where it does not tell."""
    usable = usable_processors()
    dawdling = slow_processors(usable, topology, slow)
    quick = one_of_each_core(usable - dawdling, topology)
    return Cores(len(quick), len(one_of_each_core(dawdling, topology)), len(usable))


def usable_processors() -> set[int]:
    """Logical processors that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def quick_processors(topology: Path = TOPOLOGY, slow: Path = SLOW) -> tuple[int, ...]:
    """The first logical processor of each quick core that this process may run on, of slow ones where all are slow
    (Linux)."""
    usable = usable_processors()
    return one_of_each_core(usable - slow_processors(usable, topology, slow) or usable, topology)


def one_of_each_core(processors: Iterable[int], topology: Path = TOPOLOGY) -> tuple[int, ...]:
    """The lowest of these logical processors in each core, in rising order."""
    first: dict[tuple[str, str], int] = {}
    for cpu in sorted(processors):
        first.setdefault(_core(topology, cpu), cpu)
    return tuple(first.values())


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


def processors_in(text: str) -> Iterator[int]:
    """ "0-3,8" -> 0, 1, 2, 3, 8, one by one. Raises ValueError for what is no such list."""
    for part in text.split(","):
        span = SPAN.fullmatch(part)
        numbers = range(int(span[1]), int(span[2] or span[1]) + 1) if span else ()
        if not numbers:
            raise ValueError(f"{part[:40]!r} is no range of processors")
        yield from numbers


def _listed(file: Path) -> set[int]:
    try:
        return set(processors_in(file.read_text()))
    except (OSError, ValueError):  # no such file, or an empty one
        return set()


def _allowance(groups: Path) -> int:
    """Cores' worth of time that the cgroup may use."""
    found = []
    for files in ((QUOTA,), QUOTA_AND_PERIOD):
        try:
            allowed, period = (int(word) for file in files for word in (groups / file).read_text().split())
        except (OSError, ValueError):  # no such file, or no limit
            continue
        found += [ceil(allowed / period)] if allowed > 0 and period > 0 else []
    return min(found, default=os.cpu_count() or 1)
