"""Mapped memory whose file cannot be read any more: the signal that would end the process becomes a count; must not
know what the memory holds.

The system sends SIGBUS to a thread that reads a page of a file which was cut short, or whose disk fails. No Python can
run at such a moment, so the handler is machine code: it lays zeros over the rest of that stretch of memory, counts, and
lets the thread go on, whose results are then worth nothing. Linux on x86-64 and arm64; elsewhere nothing is guarded.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import signal
import sys
from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from localmoe.interrupt import Uninterrupted, when_gone

if TYPE_CHECKING:
    import llvmlite.binding as llvm

STRETCHES = 1024  # that can be guarded at a time; those beyond are not
SLOTS = 4  # of the table for each, see `Row`
SIGINFO, ON_STACK, MAP_FIXED = 4, 0x08000000, 0x10  # flags of sigaction and mmap on Linux
# Reasons above 0 are the system's own, others are kill's and raise's. An entry that is free has no byte inside. A fault
# anywhere else goes to the handler of before; where that is the system's own, it is put back, and met when the
# instruction that faulted is run again.
HANDLER = """
define void @on_bus_error(i32 %signal, ptr %info, ptr %context) {{
entry:
  %reason_at = getelementptr i8, ptr %info, i64 8
  %reason = load i32, ptr %reason_at
  %address_at = getelementptr i8, ptr %info, i64 16
  %address = load i64, ptr %address_at
  %is_fault = icmp sgt i32 %reason, 0
  br i1 %is_fault, label %search, label %others
search:
  %i = phi i64 [ 0, %entry ], [ %next, %skip ]
  %at_end = icmp eq i64 %i, {stretches}
  br i1 %at_end, label %others, label %look
look:
  %slot = mul i64 %i, {slots}
  %start_at = getelementptr i64, ptr inttoptr (i64 {table} to ptr), i64 %slot
  %end_at = getelementptr i64, ptr %start_at, i64 1
  %start = load volatile i64, ptr %start_at
  %end = load volatile i64, ptr %end_at
  %behind_start = icmp uge i64 %address, %start
  %before_end = icmp ult i64 %address, %end
  %inside = and i1 %behind_start, %before_end
  br i1 %inside, label %ours, label %skip
skip:
  %next = add i64 %i, 1
  br label %search
ours:
  %page = and i64 %address, -{page}
  %nbytes = sub i64 %end, %page
  %mapped = call i64 inttoptr (i64 {mmap} to ptr)(i64 %page, i64 %nbytes, i32 1, i32 {zeros}, i32 -1, i64 0)
  %is_mapped = icmp eq i64 %mapped, %page
  br i1 %is_mapped, label %count, label %others
count:
  %faults_at = getelementptr i64, ptr %start_at, i64 2
  %last_at = getelementptr i64, ptr %start_at, i64 3
  store volatile i64 %address, ptr %last_at
  %before = atomicrmw add ptr %faults_at, i64 1 seq_cst
  ret void
others:
  %previous = load volatile i64, ptr inttoptr (i64 {previous} to ptr)
  %is_function = icmp ugt i64 %previous, 1
  br i1 %is_function, label %chain, label %default
chain:
  %function = inttoptr i64 %previous to ptr
  call void %function(i32 %signal, ptr %info, ptr %context)
  ret void
default:
  %put_back = call i32 inttoptr (i64 {sigaction} to ptr)(i32 %signal, ptr inttoptr (i64 {previous} to ptr), ptr null)
  br i1 %is_fault, label %leave, label %again
again:
  %raised = call i32 inttoptr (i64 {raise_} to ptr)(i32 %signal)
  ret void
leave:
  ret void
}}
"""


class Row(ctypes.Structure):
    """Of the table: one stretch, how often it faulted, and where it last did."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("start", "end", "faults", "last"))


class SignalAction(ctypes.Structure):
    """`struct sigaction` of the C libraries of 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_size_t),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_size_t),
    )


class BusErrors:
    """The process's handler of SIGBUS, in place while anything is guarded."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._turn = Lock()
        self._previous = SignalAction()
        self.table = np.zeros((STRETCHES, SLOTS), np.int64)
        self._engine = self._compiled()
        self._own = SignalAction(handler=self._engine.get_function_address("on_bus_error"), flags=SIGINFO | ON_STACK)

    def enter(self, stretches: Sequence[tuple[int, int]]) -> list[int]:
        """Guard memory, (address, nbytes) each; returns the rows of the table, fewer than asked where it is full."""
        with self._turn:
            if not self.table[:, 1].any():
                self._libc.sigaction(signal.SIGBUS, ctypes.byref(self._own), ctypes.byref(self._previous))
            rows = [int(row) for row in np.flatnonzero(self.table[:, 1] == 0)[: len(stretches)]]
            for row, (address, nbytes) in zip(rows, stretches, strict=False):
                self.table[row] = address, address + nbytes, 0, 0
            return rows

    def row(self, number: int) -> Row:
        return Row.from_address(self.table[number].ctypes.data)

    def leave(self, rows: Sequence[int]) -> None:
        """Guard it no longer; the last one puts the handler of before in its place again."""
        with self._turn:
            self.table[list(rows)] = 0
            if rows and not self.table[:, 1].any():
                found = SignalAction()
                self._libc.sigaction(signal.SIGBUS, None, ctypes.byref(found))
                if found.handler == self._own.handler:  # else someone came after us, and leads here
                    self._libc.sigaction(signal.SIGBUS, ctypes.byref(self._previous), None)

    def _compiled(self) -> llvm.ExecutionEngine:
        addresses = {name: ctypes.cast(self._libc[name], ctypes.c_void_p).value for name in ("mmap", "sigaction")}
        import llvmlite.binding as llvm  # headers alone are read without it

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        text = HANDLER.format(
            **addresses,
            raise_=ctypes.cast(self._libc["raise"], ctypes.c_void_p).value,
            stretches=STRETCHES,
            slots=SLOTS,
            table=self.table.ctypes.data,
            previous=ctypes.addressof(self._previous),
            page=mmap.PAGESIZE,
            zeros=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED,
        )
        machine = llvm.Target.from_default_triple().create_target_machine(opt=0)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), machine)
        engine.finalize_object()
        return engine


def map_over(address: int, nbytes: int, descriptor: int) -> None:
    """A file's beginning, read-only, in place of what is mapped there. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    place = (ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
    shared = mmap.MAP_SHARED | MAP_FIXED
    if libc.mmap(*place, mmap.PROT_READ, shared, descriptor, ctypes.c_long(0)) != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@cache
def bus_errors() -> BusErrors | None:
    """The one of this process; None where there is none for the system."""
    possible = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") and sys.maxsize > 1 << 32
    return BusErrors() if possible else None


class Guard:
    """Stretches of mapped memory, (address, nbytes) each, that may fault without ending the process.

    `memory` is what keeps them mapped, and is held as long as they are guarded: nothing else can come to lie there.
    """

    def __init__(self, stretches: Sequence[tuple[int, int]], memory: object = None) -> None:
        self._count = len(stretches)
        with Uninterrupted():  # else rows that nobody gives back, and what llvmlite frees twice
            handler = bus_errors() if stretches else None
            rows = handler.enter(stretches) if handler else []
            self._rows = [handler.row(row) for row in rows] if handler else []
            self.close = when_gone(self, handler.leave if handler else tuple, rows, keep=memory)

    @property
    def active(self) -> bool:
        """Whether faults are counted here: not on every system, and not beyond a number of stretches."""
        return len(self._rows) == self._count

    def fault(self) -> tuple[int, int] | None:
        """Of the first stretch that faulted its number, and the address where it last did so; None as long as all went
        well."""
        return next(((i, row.last) for i, row in enumerate(self._rows) if row.faults), None)

    def forget(self, number: int) -> None:
        """A stretch's faults, once its memory is the file's again."""
        self._rows[number].faults = 0
