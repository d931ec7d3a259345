"""How fast a disk gives experts: half a second of random reads of the model file itself; knows no model.

Reads past the page cache where the file system allows it, and leaves nothing of its own in it.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Literal, NamedTuple

from localmoe.experts.pieces import Piece
from localmoe.interrupt import start_threads

Way = Literal["direct", "buffered"]

SECONDS = 0.5
PATIENCE = 1.0  # seconds for a read that was begun in time
ALIGNMENT = max(4096, mmap.PAGESIZE)  # of places, sizes and buffers: a sector of any disk, and a page
FIRST_NBYTES = 128 << 10  # of the read that says how long others may take
MOST_NBYTES = 32 << 20  # of one read
SKIPPED = 4096  # pieces in a row that tell nothing: there will be no other
PHASES: tuple[tuple[Way, int], ...] = (("direct", 1), ("direct", 2), ("buffered", 2), ("direct", 4))
PLAIN_PHASES: tuple[tuple[Way, int], ...] = (("buffered", 1), ("buffered", 2), ("buffered", 4))


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes a second with so many reads in flight, past the page cache (direct) or through it (buffered): of the middle
    read, as a probe is so short that one stall would decide. `stalled` is the share of bytes that were lost to those.
    """

    way: Way
    depth: int
    nbytes_per_second: float
    stalled: float = 0.0


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """What a probe found: `read_nbytes` is the size of most reads, `rates` has at least one entry."""

    read_nbytes: int
    rates: tuple[Rate, ...]

    @property
    def best(self) -> Rate:
        return max(self.rates, key=lambda rate: rate.nbytes_per_second)

    @property
    def way(self) -> Way:
        """The way that is quicker with as many reads in flight; past the page cache unless a tenth is lost by it, as
        that takes neither memory nor a copy."""
        buffered = {rate.depth: rate.nbytes_per_second for rate in self.rates if rate.way == "buffered"}
        direct = {rate.depth: rate.nbytes_per_second for rate in self.rates if rate.way == "direct"}
        depths = buffered.keys() & direct.keys()
        if not depths:
            return self.best.way
        return "direct" if all(direct[depth] >= 0.9 * buffered[depth] for depth in depths) else "buffered"


def probe(pieces: Sequence[Piece], seconds: float = SECONDS) -> DiskSpeed | None:
    """Reads some of `pieces` for at most `seconds` and the time of one read; cached ones and holes tell nothing.

    None where nothing can be measured: no pieces, files that cannot be read, a system without preadv (Windows).
    """
    if not pieces or not hasattr(os, "preadv"):
        return None
    end = perf_counter() + seconds
    way: Way = "direct" if _reads_directly(pieces[0].path) else "buffered"
    cursors: dict[Way, Iterator[Piece]] = {"direct": cycle(pieces), "buffered": iter(pieces)}
    phases = PHASES if way == "direct" else PLAIN_PHASES
    first = Phase(cursors[way], way, FIRST_NBYTES, end, most=1)
    rate = first.run(1)
    if rate is None:
        return None
    limit = int(min(max(rate.nbytes_per_second * seconds / len(phases), ALIGNMENT), MOST_NBYTES)) & -ALIGNMENT
    rates, reads = [], []
    for number, (way, depth) in enumerate(phases):
        now = perf_counter()
        phase = Phase(cursors[way], way, limit, now + (end - now) / (len(phases) - number))
        if found := phase.run(depth):
            rates.append(found)
            reads += phase.reads
    # A disk may be so slow that the first read takes all the time.
    return DiskSpeed(int(median(read.nbytes for read in reads or first.reads)), tuple(rates or (rate,)))


class Read(NamedTuple):
    nbytes: int
    seconds: float


@dataclass(eq=False)
class Phase:
    """Threads that read until a point in time, `most` pieces at most; `cursor` gives each piece to one of them."""

    cursor: Iterator[Piece]
    way: Way
    limit: int  # bytes of one read
    end: float
    most: int = 1 << 20
    reads: list[Read] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, depth: int) -> Rate | None:
        """None where nothing was read."""
        threads = [threading.Thread(target=self._read, name=f"probe-{n}", daemon=True) for n in range(depth)]
        start = perf_counter()
        start_threads(threads)
        for thread in threads:  # one that a dead disk holds is left behind
            thread.join(max(0.0, self.end - perf_counter()) + PATIENCE)
        seconds = perf_counter() - start
        with self._lock:
            if not self.reads:
                return None
            rate = depth * median(read.nbytes / read.seconds for read in self.reads)
            whole = sum(read.nbytes for read in self.reads) / seconds
            return Rate(self.way, depth, rate, max(0.0, 1 - whole / rate))

    def _read(self) -> None:
        longest, skipped = 0.0, 0
        with suppress(OSError), Reader(self.way, self.limit) as reader:
            while (start := perf_counter()) + longest < self.end and skipped < SKIPPED:
                with self._lock:
                    piece = next(self.cursor, None) if len(self.reads) < self.most else None
                if piece is None:
                    return
                nbytes = reader.read(piece)
                skipped = 0 if nbytes else skipped + 1
                if nbytes:
                    seconds = perf_counter() - start
                    longest = max(longest, seconds)
                    with self._lock:
                        self.reads.append(Read(nbytes, seconds))


class Reader:
    """Reads pieces, or as much of each as `limit` allows, into memory of its own; the files stay open inside `with`."""

    def __init__(self, way: Way, limit: int) -> None:
        self._way, self._limit = way, limit
        self._buffer = memoryview(mmap.mmap(-1, limit))
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)

    def read(self, piece: Piece) -> int:
        """Bytes read, whole sectors; 0 for what lies in a hole of the file, or in the page cache where that is on the
        way. Raises OSError."""
        if piece.path not in self._files:
            self._files[piece.path] = _open(piece.path, self._way)
        file, start = self._files[piece.path], piece.start & -ALIGNMENT
        nbytes = min(-(-(piece.start + piece.nbytes - start) // ALIGNMENT) * ALIGNMENT, self._limit)
        if _is_hole(file, start, nbytes):
            return 0
        if self._way == "direct":
            return os.preadv(file, [self._buffer[:nbytes]], start)
        if piece.cached:
            return 0  # and it stays there: a model that is in use is not to be driven out
        try:
            return os.preadv(file, [self._buffer[:nbytes]], start)
        finally:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, start, nbytes, os.POSIX_FADV_DONTNEED)


def _open(path: Path, way: Way) -> int:
    """A file open for reads of that way. Raises OSError where the file system does not allow it."""
    if way == "direct" and sys.platform == "darwin":
        import fcntl

        file = os.open(path, os.O_RDONLY)
        fcntl.fcntl(file, fcntl.F_NOCACHE, 1)
        return file
    file = os.open(path, os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if way == "direct" else 0))
    if way == "buffered" and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # nothing beyond what is asked for
    return file


def _reads_directly(path: Path) -> bool:
    """Whether the file system reads past the page cache; some say so only when asked to read."""
    if sys.platform != "darwin" and not hasattr(os, "O_DIRECT"):
        return False
    try:
        file = _open(path, "direct")
    except OSError:
        return False
    try:
        return os.preadv(file, [mmap.mmap(-1, ALIGNMENT)], 0) > 0
    except OSError:
        return False
    finally:
        os.close(file)


def _is_hole(file: int, start: int, nbytes: int) -> bool:
    """Whether the disk holds nothing there: a sparse file's zeros come from nowhere."""
    try:
        return os.lseek(file, start, os.SEEK_DATA) >= start + nbytes
    except OSError as error:
        return error.errno == errno.ENXIO  # nothing up to the end; others cannot tell
    except AttributeError:
        return False
