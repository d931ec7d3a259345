"""Ctrl+C and what it must not cut in two; knows nothing of what that is.

KeyboardInterrupt comes between any two steps of Python's own code, that of `threading`, `queue` and
`concurrent.futures` included: an event, a queue, a future or a thread being started that is left there keeps its lock
for ever, and whoever needs it next waits for ever. A bare Lock and a SimpleQueue are one step of C each. And one that
comes while garbage is collected is heard in the first Python that the collector calls: that ends there, and Python
drops the press.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
import weakref
from _thread import interrupt_main, start_new_thread
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

try:  # what `signal` wraps: its turning numbers into enumerations and back costs ten times what the calls do
    from _signal import getsignal as _handler  # type: ignore[import-not-found]
    from _signal import signal as _handle
except ImportError:
    from signal import getsignal as _handler
    from signal import signal as _handle

if TYPE_CHECKING:
    from concurrent.futures import Future

P = ParamSpec("P")
T = TypeVar("T")
BRIEFLY = 0.05  # seconds: between two moments at which one who waits hears Ctrl+C; until a lost one is pressed again


class Uninterrupted:
    """A `with` block behind which Ctrl+C is heard, and not inside. Only the main thread hears any."""

    def __enter__(self) -> None:
        self._heard = False
        self._before = _handler(signal.SIGINT) if current_thread() is main_thread() else None
        if self._before is not None:
            _handle(signal.SIGINT, self._hear)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            _handle(signal.SIGINT, self._before)
        if self._heard:
            signal.raise_signal(signal.SIGINT)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True


def start_threads(threads: Iterable[Thread]) -> None:
    """Start threads, all of them or none."""
    with Uninterrupted():
        for thread in threads:
            thread.start()


class _Owner(weakref.ref[object]):
    """Goes by itself, in a step of C, to the queue that it is made with."""

    __slots__ = ("end", "keep")

    end: Callable[[], object]
    keep: object


class _Endings:
    """A thread, which hears no Ctrl+C, that ends what nobody holds any more."""

    def __init__(self) -> None:
        self._gone: SimpleQueue[weakref.ref[object]] = SimpleQueue()
        self._waiting: dict[int, _Owner] = {}
        self._thread = Thread()

    def add(self, owner: object, end: Callable[[], object], keep: object) -> None:
        waiting = _Owner(owner, self._gone.put)
        waiting.end, waiting.keep = end, keep
        with Uninterrupted():
            self._waiting[id(waiting)] = waiting
            if not self._thread.is_alive():  # the first one; or in a child of a fork, which has no threads
                self._thread = Thread(target=self._work, name="endings", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            self._end_one()

    def _end_one(self) -> None:
        waiting = self._waiting.pop(id(self._gone.get()))
        try:
            waiting.end()
        except Exception:
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), current_thread())))


_ENDINGS = _Endings()


def when_gone(owner: object, end: Callable[..., object], *args: object, keep: object = None) -> Callable[[], None]:
    """Have `end(*args)` called once: soon after nobody holds `owner` any more, by a thread of its own; when what this
    returns is called; or at exit. Until `owner` has gone and that is done, `keep` is held."""
    with Uninterrupted():
        once = weakref.finalize(_ENDINGS, end, *args)  # never gone: it is called from here and at exit alone

        def called() -> None:
            with Uninterrupted():
                once()

        _ENDINGS.add(owner, called, keep)
        return called


@contextmanager
def pressed_again() -> Iterator[None]:
    """A `with` block in which a Ctrl+C that was heard where Python drops it, in a callback of a collection, is pressed
    once more a moment later, and not printed."""
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            start_new_thread(press, ())  # a Thread of `threading` would take locks, in the midst of anything
        else:
            before(dropped)

    def press() -> None:
        time.sleep(BRIEFLY)
        if sys.unraisablehook is not hook:  # it is too late
            return
        if hasattr(signal, "pthread_kill"):  # which ends a call of the system that waits, too
            signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
        else:
            interrupt_main()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


class Pool:
    """`threads` threads that call functions and give the results; Ctrl+C is heard between its steps."""

    def __init__(self, threads: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._executor = ThreadPoolExecutor(threads)

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        with Uninterrupted():
            return self._executor.submit(function, *args, **kwargs)

    def result(self, future: Future[T]) -> T:
        """Waits for what the function returns; raises what it raises."""
        while True:
            with Uninterrupted():
                try:
                    return future.result(BRIEFLY)
                except TimeoutError:
                    if future.done():  # it is the function's own
                        raise

    def cancel(self, futures: Iterable[Future[T]]) -> None:
        """Leave out those that have not begun."""
        with Uninterrupted():
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Returns when nothing runs any more; what has not begun is left out."""
        with Uninterrupted():
            self._executor.shutdown(cancel_futures=True)
