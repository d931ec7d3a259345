"""Where on disk the matrices of a model lie, and how much of them the page cache has; knows neither policies nor
models."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localmoe.formats import Bytes, Weight
from localmoe.loader.files import MappedFile, place

MOST = 4096  # pieces, picked at random: a model has up to a hundred thousand
MOST_NBYTES = 8 << 30  # that the page cache is asked about
SPAN = 64 << 20  # bytes of one question


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a file that are read together, a matrix of an expert or part of what it is made of, and where in memory
    they are mapped."""

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


def pieces(weights: Iterable[Weight], files: Sequence[MappedFile]) -> list[Piece]:
    """What matrices are read from, MOST of them at most, in random order; the weights must live as long as they do.
    Empty where the model is planned, or lies in memory."""
    found = []
    for slab in _some_slabs(weights):
        if here := place(files, address := slab.ctypes.data, slab.size):
            found.append(Piece(Path(here[0].place), here[1], slab.size, address))
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
    matrices = [(weight, matrix) for weight in weights for matrix in range(len(weight.slabs))]
    some = random.sample(matrices, min(MOST, len(matrices)))
    largest = (max(weight.views(matrix), key=len) for weight, matrix in some)  # small parts are read beside them
    return [view for view in largest if view.strides == (1,)]
