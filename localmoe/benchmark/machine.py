"""The machine a benchmark ran on, in words: processor, instruction set, cores, memory, system, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from localmoe.kernels.cpu.cores import usable_cores
from localmoe.kernels.cpu.isa import host_isa
from localmoe.memory import readable_size, total_nbytes


def description() -> dict[str, str]:
    isa = host_isa()
    return {
        "processor": processor(),
        "instruction set": f"{isa.name} for {isa.processor}",  # of which a virtual machine's name may tell nothing
        "cores": cores(),
        "memory": readable_size(total_nbytes()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "Python": platform.python_version(),
        "localmoe": own_version(),
        "load average": " ".join(f"{load:.2f}" for load in load_average()) or "unknown",
    }


def cores() -> str:
    """Those that this process may use, and how many of them are the slow ones of a hybrid processor."""
    found = usable_cores()
    return f"{found.physical} physical{f' ({found.slow} slow)' if found.slow else ''}, {found.logical} logical"


def processor() -> str:
    """The processor's name for itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load_average() -> tuple[float, ...]:
    """Processes that wanted to run over the last 1, 5 and 15 minutes; empty where the system does not tell."""
    try:
        return os.getloadavg()
    except (AttributeError, OSError):
        return ()


def own_version() -> str:
    try:
        return version("localmoe")
    except PackageNotFoundError:
        return "from source"
