"""Where on disk the matrices of a model lie, and how much of them the page cache has; knows neither policies nor
models."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localmoe.formats import Bytes, Weight

MOST = 4096  # pieces, picked at random: a model has up to a hundred thousand
MOST_NBYTES = 8 << 30  # that the page cache is asked about
SPAN = 64 << 20  # bytes of one question
MAPS = Path("/proc/self/maps")


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a file that are read together, one matrix of one expert, and where in memory they are mapped."""

    path: Path
    start: int
    nbytes: int
    address: int

    @property
    def cached(self) -> float | None:
        """Which share of its pages is in the page cache; None where the system does not tell. Linux does for files that
        the user owns or may write, and calls all of others cached (mincore(2))."""
        if sys.platform != "linux" or not _owned(self.path):
            return None
        first, end = self.address & -mmap.PAGESIZE, self.address + self.nbytes
        mincore, pages, there = ctypes.CDLL(None).mincore, 0, 0
        for start in range(first, end, SPAN):
            size = min(SPAN, end - start)
            flags = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            place = ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_void_p(flags.ctypes.data)
            if mincore(*place) != 0:
                return None
            pages, there = pages + flags.size, there + int(np.count_nonzero(flags & 1))
        return there / pages


def pieces(weights: Iterable[Weight], maps: Path = MAPS) -> list[Piece]:
    """The slabs of matrices that are views of mapped files, MOST of them at most, in random order; the weights must
    live as long as they do. Empty where nothing is mapped or the system does not tell what is."""
    mappings = _mappings(maps)
    firsts = [mapping.first for mapping in mappings]
    found = []
    for slab in _some_slabs(weights):
        index = bisect_right(firsts, address := slab.ctypes.data) - 1
        if index >= 0 and address + slab.size <= mappings[index].end:
            mapping = mappings[index]
            found.append(Piece(mapping.path, mapping.offset + address - mapping.first, slab.size, address))
    return found


def cached_share(pieces: Sequence[Piece]) -> float | None:
    """Which share of the bytes is in the page cache, from the first MOST_NBYTES; None where the system does not
    tell."""
    asked = there = 0.0
    for piece in pieces:
        share = piece.cached
        if share is None:
            return None
        asked, there = asked + piece.nbytes, there + share * piece.nbytes
        if asked > MOST_NBYTES:
            break
    return there / asked if asked else None


def _owned(path: Path) -> bool:
    try:
        return os.stat(path).st_uid == os.geteuid() or os.access(path, os.W_OK)
    except OSError:
        return False


def _some_slabs(weights: Iterable[Weight]) -> list[Bytes]:
    slabs = [slab for weight in weights for slab in weight.slabs if slab.strides == (1,)]
    return random.sample(slabs, min(MOST, len(slabs)))


@dataclass(frozen=True, slots=True)
class Mapping:
    """A file's bytes from `offset` on are in memory from `first` to `end`."""

    first: int
    end: int
    offset: int
    path: Path


def _mappings(maps: Path) -> list[Mapping]:
    """The files that this process has mapped, by address; see proc_pid_maps(5)."""
    try:
        lines = [line.split(None, 5) for line in os.fsdecode(maps.read_bytes()).splitlines()]
    except OSError:
        return []
    found = []
    for fields in lines:
        if len(fields) == 6 and fields[5].startswith("/"):
            first, end = (int(address, 16) for address in fields[0].split("-"))
            found.append(Mapping(first, end, int(fields[2], 16), Path(fields[5].replace("\\012", "\n"))))
    return found
