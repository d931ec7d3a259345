"""The control groups (cgroups) that bound this process's memory, versions 1 and 2; knows nothing of the whole machine.

A process is in one group of a tree, and every group up to the root bounds it. Where the tree is mounted is in
/proc/self/mountinfo, which group it is in /proc/self/cgroup (cgroups(7)). In a container only the lower end of the tree
may be mounted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")
ESCAPED = re.compile(r"\\([0-7]{3})")  # blanks and backslashes of a mount point, as octal numbers


@dataclass(frozen=True, slots=True)
class Files:
    """What one version calls things: limits, use, and the keys of memory.stat that are cached pages of files."""

    limits: tuple[str, ...]
    use: str
    cached: tuple[str, str]


FILES = {
    1: Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
}


@dataclass(frozen=True, slots=True)
class Group:
    """One group, as a folder of files."""

    folder: Path
    version: int

    @property
    def limit_nbytes(self) -> int | None:
        """The lowest of its limits; None where it has none, or does not govern memory."""
        found = [_number(self.folder / name) for name in FILES[self.version].limits]
        return min((limit for limit in found if limit is not None), default=None)

    @property
    def free_nbytes(self) -> int | None:
        """What is left of the limit, cached pages of files not counted as used: they are dropped when memory is
        wanted. None where there is no limit."""
        limit, used = self.limit_nbytes, _number(self.folder / FILES[self.version].use)
        if limit is None or used is None:
            return None
        return limit - max(used - self._cached_nbytes(), 0)

    def _cached_nbytes(self) -> int:
        try:
            lines = [line.split() for line in (self.folder / "memory.stat").read_text().splitlines()]
            return sum(int(words[1]) for words in lines if words[0] in FILES[self.version].cached)
        except (OSError, ValueError, IndexError):
            return 0


def own_groups(root: Path = ROOT) -> list[Group]:
    """Every group that may bound this process's memory, its own before those above it; empty where there are none.

    `root` is where /proc and /sys lie.
    """
    found = []
    for version in FILES:
        place = _place(root, version)
        if place is not None:
            mount, below = place
            found += [Group(folder, version) for folder in _upwards(mount, below)]
    return found


def own_pressure_file(root: Path = ROOT) -> Path | None:
    """Where the process's own group tells how much its tasks wait for memory; only version 2 does."""
    place = _place(root, 2)
    return place[0] / place[1] / "memory.pressure" if place else None


def _upwards(mount: Path, below: PurePosixPath) -> list[Path]:
    return [mount / folder for folder in (below, *below.parents)]


def _place(root: Path, version: int) -> tuple[Path, PurePosixPath] | None:
    """Where the memory controller's tree (version 2: that of all controllers) is mounted, and the own group below."""
    kind = "cgroup" if version == 1 else "cgroup2"
    own = _own_path(root, version)
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        mounted, found = before.split(), after.split()
        if own is None or len(mounted) < 5 or len(found) < 3 or found[0] != kind:
            continue
        if version == 1 and "memory" not in found[2].split(","):
            continue
        top, point = (ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), field) for field in mounted[3:5])
        mount = root / point.lstrip("/")
        inside = own.is_relative_to(top) and ".." not in own.parts  # else what is mounted is all there is to see
        return mount, own.relative_to(top) if inside else PurePosixPath()
    return None


def _own_path(root: Path, version: int) -> PurePosixPath | None:
    """The own group as /proc/self/cgroup names it: "4:memory:/a/b", or "0::/a/b" in version 2."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if (version == 1 and "memory" in controllers.split(",")) or (version == 2 and number == "0"):
            return PurePosixPath(path)
    return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(file: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
