"""How much memory there is: of the machine, of the control groups that bound this process, of the process itself; and
how sizes are read and written."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from localmoe.cgroup import ROOT, own_groups, own_pressure_file
from localmoe.errors import SettingError

UNITS = {
    "": 1,
    "b": 1,
    **{unit: 1000**i for i, prefix in enumerate("kmgt", 1) for unit in (prefix, f"{prefix}b")},
    **{unit: 1024**i for i, prefix in enumerate("kmgt", 1) for unit in (f"{prefix}i", f"{prefix}ib")},
}
SIZE = re.compile(r"(\d+\.?\d*|\.\d+)\s*([a-z]*)", re.ASCII)
LARGEST = 1 << 62


def total_nbytes(root: Path = ROOT) -> int:
    """Bytes of memory that this process may have: of the machine, or of the control group with the lowest limit."""
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        physical = 8 << 30
    return min([physical, *(limit for group in own_groups(root) if (limit := group.limit_nbytes) is not None)])


def available_nbytes(root: Path = ROOT) -> int:
    """Bytes that can be allocated without swapping, as far as the system tells; cached pages of files are available."""
    free = _kilobytes(root / "proc/meminfo").get("MemAvailable", total_nbytes(root) * 3 // 4)
    return max(min([free, *(left for group in own_groups(root) if (left := group.free_nbytes) is not None)]), 0)


def pressure(root: Path = ROOT) -> float | None:
    """Per cent of the last ten seconds in which some task waited for memory (the kernel's pressure stall information):
    of the process's own control group, else of the machine; None where the system does not tell."""
    for file in (own_pressure_file(root), root / "proc/pressure/memory"):
        try:
            found = re.search(r"^some avg10=(\d+\.\d+)", file.read_text()) if file else None
        except OSError:
            continue
        if found:
            return float(found[1])
    return None


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes of this process that are in memory: its own (`anonymous`), pages of files that it has mapped, and the most
    that both were together."""

    anonymous: int
    files: int
    peak: int

    @property
    def nbytes(self) -> int:
        return self.anonymous + self.files


def resident(root: Path = ROOT) -> Resident:
    """What this process has now. Where the system tells the peak alone, it stands for what is anonymous; 0 where it
    tells nothing."""
    status = _kilobytes(root / "proc/self/status")
    if "RssAnon" in status:
        own = status["RssAnon"] + status.get("RssShmem", 0)
        files = status.get("RssFile", 0)
        return Resident(own, files, max(status.get("VmHWM", 0), own + files))
    peak = _peak_nbytes()
    return Resident(peak, 0, peak)


def _peak_nbytes() -> int:
    try:
        import resource  # Windows has none
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _kilobytes(file: Path) -> dict[str, int]:
    """The lines of a file of /proc that look like "MemAvailable:  123 kB", in bytes; empty where it is not there."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


def readable_size(nbytes: float) -> str:
    """1234567890 -> "1.23 GB" (powers of 1000, as disks and the field count)."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def parse_size(text: str) -> int:
    """ "8GiB", "1.2 GB", "512M" -> bytes; units without an i count by 1000, so that a budget never means more than was
    meant. Raises SettingError for anything else, and for less than one byte."""
    found = SIZE.fullmatch(text.strip().lower())
    nbytes = float(found[1]) * UNITS[found[2]] if found and found[2] in UNITS else 0.0
    if not 1 <= nbytes <= LARGEST:
        raise SettingError(
            "a size is a number with kB, MB, GB or TB (powers of 1000) or KiB, MiB, GiB or TiB (of 1024), "
            f"such as 8GiB, not {text[:40]!r}"
        )
    return int(nbytes)


def parse_rate(text: str) -> int:
    """ "1.2GB/s" -> bytes a second; what parse_size reads, with "/s" or without."""
    return parse_size(re.sub(r"\s*/\s*s(ec(ond)?)?\s*$", "", text))
