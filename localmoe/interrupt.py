"""Ctrl+C and what it must not cut in two; knows nothing of what that is.

KeyboardInterrupt comes between any two steps of Python's own code, that of `threading`, `queue` and
`concurrent.futures` included: an event, a queue, a future or a thread being started that is left there keeps its lock
for ever, and whoever needs it next waits for ever. A bare Lock and a SimpleQueue are one step of C each.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
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
BRIEFLY = 0.05  # seconds between two moments at which one who waits for a result hears Ctrl+C


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
