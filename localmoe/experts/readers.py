"""A small team of threads that read experts into memory; knows neither layers nor policies.

The thread that computes asks and looks whether a load is complete. It may be interrupted between any two of its steps
(Ctrl+C): then a load that it asked for goes on, and one that it did not quite ask for is asked for again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TypeVar

from localmoe.errors import DeviceError
from localmoe.experts.making import Making, Spare
from localmoe.experts.reading import FileReader
from localmoe.interrupt import Uninterrupted, start_threads, when_gone

T = TypeVar("T")
PATIENCE = 0.5  # seconds between two looks at whether the readers are still there
READ, GIVEN_UP = "read", "given up"  # what becomes of a load
HANGING = 5.0  # seconds that a read may take when nobody wants it any more


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """One read: so many bytes from `offset` of a file to `buffer`, all as the reader's alignment asks."""

    reader: FileReader
    offset: int
    buffer: memoryview

    @property
    def nbytes(self) -> int:
        return len(self.buffer)

    def fill(self, spare: Spare) -> None:
        self.reader.read(self.buffer, self.offset)


@dataclass(eq=False, slots=True)
class Load:
    """What has to be read before an expert is there: several threads may take a piece each."""

    pieces: deque[Piece | Making]
    count: int
    key: int
    slot: int
    ahead: bool = False  # nobody waits for it yet
    left: bool = False  # by a step that is over: if it fails, it is read anew
    asked: bool = False
    error: BaseException | None = None
    read: deque[None] = field(default_factory=deque)  # one for each piece that is done; appending is atomic
    _fate: dict[str, str] = field(default_factory=dict)  # of "fate": setting what is not set yet is atomic, too

    @property
    def complete(self) -> bool:
        return len(self.read) == self.count

    def begin(self) -> bool:
        """Before a piece is read; False where nothing is to be read any more."""
        return self._fate.setdefault("fate", READ) == READ

    def give_up(self) -> bool:
        """Nothing of it will be read; False where somebody has begun to."""
        return self._fate.setdefault("fate", GIVEN_UP) == GIVEN_UP

    @property
    def given_up(self) -> bool:
        return self._fate.get("fate") == GIVEN_UP


class Readers:
    """`count` threads; what is waited for comes before what is read ahead, each in the order of asking. They end when
    nobody holds it any more, too."""

    def __init__(self, count: int) -> None:
        self._desk = _Desk()
        self._threads = [threading.Thread(target=self._desk.work, name="reader", daemon=True) for _ in range(count)]
        with Uninterrupted():
            when_gone(self, self._desk.dismiss, count)  # the threads know the desk alone
            start_threads(self._threads)

    def ask(self, load: Load) -> None:
        """Begin to read; asking again for what is waiting already does no harm."""
        self._desk.queue(load).append(load)
        self._desk.tokens.put(True)
        load.asked = True

    def hurry(self, load: Load) -> None:
        """Somebody waits for it now, if nobody did until now."""
        if not load.asked or load.ahead:
            load.ahead = False
            self.ask(load)

    def finished(self) -> Iterator[Load]:
        """Loads that became complete since this was asked last; one that an interrupt kept from the asker is not told
        again, and one may be told twice."""
        while not self._desk.finished.empty():
            yield self._desk.finished.get()

    def wait(self) -> Load | None:
        """The next load that becomes complete; None after a while. Raises DeviceError when no thread is left."""
        desk = self._desk
        try:
            return desk.finished.get(timeout=PATIENCE)
        except Empty:
            if not any(thread.is_alive() for thread in self._threads):
                raise DeviceError("the threads that read experts have ended: open the model again") from None
            for _ in range(len(desk.urgent) + len(desk.later) - desk.tokens.qsize()):
                desk.tokens.put(True)  # asking was interrupted, or a thread that ended took tokens for others
            return None

    def close(self) -> None:
        """Returns when no thread reads any more; one whose read hangs keeps the memory that it reads into."""
        self._desk.dismiss(len(self._threads))
        end = monotonic() + HANGING
        for thread in self._threads:
            thread.join(max(0.0, end - monotonic()))


@dataclass(eq=False, slots=True)
class _Desk:
    """What askers and threads share."""

    urgent: deque[Load] = field(default_factory=deque)
    later: deque[Load] = field(default_factory=deque)
    tokens: SimpleQueue[bool] = field(default_factory=SimpleQueue)  # one for each look that a thread is to take
    finished: SimpleQueue[Load] = field(default_factory=SimpleQueue)

    def queue(self, load: Load) -> deque[Load]:
        return self.later if load.ahead else self.urgent

    def dismiss(self, count: int) -> None:
        """Each thread ends behind the piece that it reads."""
        self.urgent.clear()
        self.later.clear()
        for _ in range(count):
            self.tokens.put(False)

    def work(self) -> None:
        spare = Spare()
        while self.tokens.get():
            self._read(spare)

    def _read(self, spare: Spare) -> None:
        load = _first(self.urgent) or _first(self.later)
        if load is None or not load.begin():
            return
        piece = _first(load.pieces)
        if piece is None:  # taken by others
            return
        try:
            if load.pieces:
                self.queue(load).appendleft(load)
                self.tokens.put(True)
            piece.fill(spare)
        except BaseException as error:  # a thread must never end with a load that looks unfinished
            load.error = error
        load.read.append(None)
        if load.complete:
            self.finished.put(load)


def _first(waiting: deque[T]) -> T | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None
