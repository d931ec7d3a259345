"""How much memory there is: free bytes, within the process's cgroup limit; and how sizes are written."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_FILES = (  # (limit, use) of version 2, then of version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def total_nbytes() -> int:
    """Physical memory in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 8 << 30


def available_nbytes() -> int:
    """Bytes that can be allocated without swapping, as far as the system tells."""
    free = total_nbytes()
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
        free = free * 3 // 4
    for limit, use in CGROUP_FILES:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(use).read_text()))
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
    return max(free, 0)


def readable_size(nbytes: float) -> str:
    """1234567890 -> "1.23 GB" (powers of 1000, as disks and the field count)."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
