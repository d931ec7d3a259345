"""The expert slots make room when memory gets short, and take it back when it is quiet; decides nothing else."""

from __future__ import annotations

from time import monotonic
from typing import Protocol

from localmoe.memory import available_nbytes, pressure, total_nbytes

INTERVAL = 1.0  # seconds between two looks
HIGH = 10.0  # per cent of the last ten seconds that some task waited for memory
SCARCE = 0.03  # of all memory: less that is free is too little
QUIET = 30.0  # seconds without either until memory is taken again
PART = 1 / 8  # of the slots, given back or taken at a time


class Elastic(Protocol):
    """What can give memory back."""

    def shrink(self, share: float) -> None: ...
    def grow(self, share: float) -> None: ...


class Pressure:
    """Looks at most once in INTERVAL; shrinks `store` under pressure, grows it again after QUIET seconds."""

    def __init__(self, store: Elastic) -> None:
        self._store = store
        self._next = 0.0
        self._quiet_since = monotonic()

    def look(self) -> None:
        now = monotonic()
        if now < self._next:
            return
        self._next = now + INTERVAL
        if (pressure() or 0.0) > HIGH or available_nbytes() < SCARCE * total_nbytes():
            self._quiet_since = now
            self._store.shrink(PART)
        elif now - self._quiet_since > QUIET:
            self._store.grow(PART)
