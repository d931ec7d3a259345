"""One thread beside the answer that writes kept files in their order; must not know what is in them.

There is room for one that waits, so that at most three segments are in memory: one being copied out, one waiting, one
being written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from threading import ExceptHookArgs, Thread, current_thread, excepthook

from localmoe.interrupt import Uninterrupted, start_threads

# Seconds that a prompt waits for the disk between two of its parts, and the next question; what is not taken by then is
# offered again later.
BRIEFLY, PATIENCE = 0.1, 1.0

Job = Callable[[], None]  # which raises nothing


class Writer:
    """A thread that begins with the first job."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        self._room.put(None)
        self._thread: Thread | None = None

    def put(self, job: Job, *, briefly: bool = False) -> bool:
        """Whether it will be done; not where the disk is too slow for it."""
        with Uninterrupted():
            if self._thread is None:
                self._thread = Thread(target=self._run, name="localmoe prompt cache", daemon=True)
                start_threads([self._thread])
            try:
                self._room.get(timeout=BRIEFLY if briefly else PATIENCE)
            except Empty:
                return False
            self._jobs.put(partial(self._begin, job))
            return True

    def drain(self) -> None:
        """Returns when all is done that was put."""
        if self._thread is not None:
            done: SimpleQueue[None] = SimpleQueue()
            self._jobs.put(lambda: done.put(None))
            done.get()

    def close(self) -> None:
        """Do what is left to do, and end."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _begin(self, job: Job) -> None:
        self._room.put(None)
        job()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # a mistake of ours is shown as in any thread, and leaves nobody waiting
                excepthook(ExceptHookArgs((*sys.exc_info(), current_thread())))
            del job  # and with it the rows that it held
