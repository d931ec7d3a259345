"""The one place where a device is chosen; what a device and its plans must offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from localmoe.errors import DeviceError, SettingError
from localmoe.formats import KV_FORMATS, Bytes, Format
from localmoe.kernels.program import IN_PLACE, Floats, Program, Progress, StateSlots, Watcher
from localmoe.kernels.residency import Residency

DEVICES = ("cpu", "reference")


class Plan(Protocol):
    """A compiled Program."""

    def run(self, tokens: npt.NDArray[np.int32], position: int, slots: StateSlots = IN_PLACE) -> Floats:
        """1 to `program.tokens` token ids at cache positions position… -> logits (rows, V), a fresh array.

        What stood in the cache at these positions is overwritten; what stands behind them no longer counts. Recurrent
        states are read from and written to `slots`; an interrupted step leaves those written undefined.
        """
        ...

    def watch(self, tokens: npt.NDArray[np.int32], position: int, see: Watcher) -> Floats:
        """`run`, op by op: `see` is called behind each with its inputs and outputs, which hold only while it runs."""
        ...


class Device(Protocol):
    """Compiles Programs, and owns the KV cache and the buffers that their Plans share."""

    name: str
    threads: int
    cpus: tuple[int, ...]  # the one that each thread is kept on; empty: the system moves them about

    def compile(self, program: Program, residency: Residency | None = None) -> Plan: ...

    def compile_all(self, programs: Sequence[Program], residency: Residency | None = None) -> Sequence[Plan]:
        """A Plan for each; what has to be made for several of them is made once, under one count of progress.

        With a `residency`, experts are where it says when it says so; without, where the Program's weights lie.
        """
        ...

    def cache_bytes(self, program: Program) -> tuple[list[Bytes], list[Bytes]]:
        """All that it keeps from step to step, as views: keys and values of each layer (heads, S, row), and each
        recurrent state (slots, bytes)."""
        ...

    def shift(self, program: Program, start: int, stop: int, end: int) -> None:
        """Of `end` cached tokens, those from `stop` on take the places from `start` on, their keys turned accordingly;
        only where there is no `shifting.obstacle`."""
        ...

    def close(self) -> None:
        """Give back threads and memory."""
        ...


def cache_format(name: str) -> Format:
    """The format of that name for the KV cache. Raises SettingError where there is none."""
    if name not in KV_FORMATS:
        raise SettingError(f"KV format {name!r} is not known; these are: {', '.join(KV_FORMATS)}")
    return KV_FORMATS[name]


def open_device(
    name: str,
    *,
    context: int,
    kv_format: str = "f16",
    threads: int | None = None,
    pin: str | None = None,
    progress: Progress | None = None,
) -> Device:
    """A device whose cache holds `context` tokens. Raises DeviceError for one that is not there, SettingError for a KV
    format that is not known and for threads that are not possible or cannot be pinned so."""
    cache_format(kv_format)
    if name == "reference":
        from localmoe.kernels.reference import ReferenceDevice

        if pin is not None:
            raise SettingError("pin: the reference device has no threads of its own; the cpu device has")
        return ReferenceDevice(context, kv_format)
    if name == "cpu":
        from localmoe.kernels.cpu.device import CpuDevice

        return CpuDevice(context, kv_format, threads, progress, pin)
    raise DeviceError(f"device {name!r} is not available; these are: {', '.join(DEVICES)}")
