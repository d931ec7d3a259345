"""Names of kept files, and which of them together make up the longest beginning of a prompt; opens no file.

A run of tokens [start, stop) is a file

    START-STOP-H(START)-H(STOP).rows        and recurrent states at a position        POSITION-H(POSITION).states

where H(n) is the digest of the model and of the first n tokens. So any two prompts that begin alike share files,
whoever wrote them, and a run says by its name which tokens stand before it and whether it agrees to its end.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Digest = bytes  # of 32 bytes; names have the first 16

ROWS = re.compile(r"(\d{1,9})-(\d{1,9})-([0-9a-f]{32})-([0-9a-f]{32})\.rows", re.ASCII)
STATES = re.compile(r"(\d{1,9})-([0-9a-f]{32})\.states", re.ASCII)


class Entry(NamedTuple):
    """A kept file, by its name: rows of the tokens start:stop, or (start = stop) the states at a position."""

    start: int
    stop: int
    before: str
    after: str

    @property
    def is_rows(self) -> bool:
        return self.start < self.stop

    @property
    def name(self) -> str:
        if self.is_rows:
            return f"{self.start}-{self.stop}-{self.before}-{self.after}.rows"
        return f"{self.start}-{self.before}.states"

    @property
    def place(self) -> str:
        """Which tokens it is about, for a message."""
        return f"tokens {self.start} to {self.stop}" if self.is_rows else f"recurrent states at token {self.start}"


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens start:stop of a prompt, whose rows an entry has from its token `first` on."""

    entry: Entry
    start: int
    stop: int

    @property
    def first(self) -> int:
        return self.start - self.entry.start


def entry_of(name: str) -> Entry | None:
    """None for a name that is none of ours."""
    if found := ROWS.fullmatch(name):
        start, stop = int(found[1]), int(found[2])
        return Entry(start, stop, found[3], found[4]) if start < stop else None
    if found := STATES.fullmatch(name):
        return Entry(int(found[1]), int(found[1]), found[2], found[2])
    return None


def digests(model: bytes, ids: Ids, positions: Iterable[int]) -> dict[int, Digest]:
    """H of each of these positions that `ids` reaches."""
    digest, found, at = hashlib.sha256(model), {}, 0
    for position in sorted({position for position in positions if position <= ids.size}):
        digest.update(ids[at:position].data)
        found[position], at = digest.digest(), position
    return found


def named(digest: Digest) -> str:
    return digest[:16].hex()


def shared(a: Ids, b: Ids) -> int:
    """How many leading tokens two sequences share."""
    shorter = min(a.size, b.size)
    differing = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differing[0]) if differing.size else shorter


def agreeing(entries: Sequence[Entry], names: Mapping[int, str]) -> list[Entry]:
    """Those before which just the tokens stand whose digests `names` has."""
    return [entry for entry in entries if names.get(entry.start) == entry.before]


def cover(
    ids: Ids, start: int, entries: Sequence[Entry], names: Mapping[int, str], tokens_of: Callable[[Entry], Ids | None]
) -> list[Part]:
    """The parts that reach furthest from `start` on without a hole, of `entries` that agree in what stands before them.

    `tokens_of` reads the tokens of an entry that may agree in its beginning only; None where it cannot.
    """
    ends: dict[Entry, int] = {}

    def end(entry: Entry) -> int:
        """Up to where the prompt goes as the entry does."""
        if entry not in ends:
            if names.get(entry.stop) == entry.after:
                ends[entry] = entry.stop
            else:
                tokens = tokens_of(entry)
                ends[entry] = entry.start + (0 if tokens is None else shared(tokens, ids[entry.start :]))
        return ends[entry]

    parts: list[Part] = []
    at = start
    while True:
        reaching = [entry for entry in entries if entry.start <= at < entry.stop]
        best = max(reaching, key=lambda entry: (end(entry), -entry.stop), default=None)  # and the least beside it
        if best is None or end(best) <= at:
            return parts
        parts.append(Part(best, at, end(best)))
        at = end(best)
