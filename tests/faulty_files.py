"""A disk that misbehaves, for whoever reads experts: errors, short reads, slowness, standstill; knows no store.

It stands where `FileReader` asks the system for bytes, so that all of its own care is at work too.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from localmoe.experts.reading import FileReader

Read = Callable[[FileReader, memoryview, int], int]


@dataclass
class FaultyDisk:
    """What happens to reads that begin from now on; every field may be changed while they run."""

    failing: float = 0.0  # how likely a read ends with an input/output error
    short: float = 0.0  # how likely it brings a part of what was asked for
    ended: bool = False  # reads bring nothing, as behind the end of a file
    delay: float = 0.0  # seconds more
    broken: Exception | None = None  # what is raised in the reading thread, by a mistake of the program's own
    meanwhile: Callable[[], None] | None = None  # called once, in the middle of the next read
    seed: int = 0
    reads: int = 0
    threads: set[str] = field(default_factory=set)  # which read, by name

    def __post_init__(self) -> None:
        self._random = Random(self.seed)
        self._turn = threading.Lock()
        self._moving = threading.Event()
        self._moving.set()
        self.standing = threading.Event()  # set as soon as a read stands still

    def stand_still(self) -> None:
        """Reads that begin now wait for `go_on`."""
        self.standing.clear()
        self._moving.clear()

    def go_on(self) -> None:
        self._moving.set()

    def mend(self) -> None:
        """All is well from now on."""
        self.failing = self.short = self.delay = 0.0
        self.ended, self.broken, self.meanwhile = False, None, None
        self.go_on()

    def read(self, whole: Read, reader: FileReader, buffer: memoryview, offset: int) -> int:
        with self._turn:
            self.reads += 1
            self.threads.add(threading.current_thread().name)
            fails, is_short = self._random.random() < self.failing, self._random.random() < self.short
            part = self._random.randint(1, max(1, len(buffer) - 1))
            meanwhile, self.meanwhile, broken = self.meanwhile, None, self.broken
        if meanwhile:
            meanwhile()
        if not self._moving.is_set():
            self.standing.set()
            self._moving.wait()
        time.sleep(self.delay)
        if broken:
            raise broken
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.ended:
            return 0
        if is_short and len(buffer) > reader.alignment:  # what comes of a direct read is whole blocks, and at least one
            part = max(part // reader.alignment, 1) * reader.alignment
            return whole(reader, buffer[:part], offset)
        return whole(reader, buffer, offset)


def broken_disk(monkeypatch: pytest.MonkeyPatch, **faults: object) -> FaultyDisk:
    """One that every FileReader reads from until the test ends."""
    disk, whole = FaultyDisk(**faults), FileReader._read_at  # type: ignore[arg-type]
    monkeypatch.setattr(FileReader, "_read_at", lambda reader, buffer, offset: disk.read(whole, reader, buffer, offset))
    return disk
