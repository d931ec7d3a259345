"""`localmoe` in a process of its own behind a pseudo-terminal, as a person has it; knows no model."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

TESTS = Path(__file__).parent
PROMPT = ">>> "
CTRL_C = "\x03"
# Ctrl+C reaches the processes of the session whose terminal it is typed at.
LAUNCHER = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
{setup}
from localmoe.cli import main
main(sys.argv[1:])
"""


class Chat:
    """`localmoe chat`; `setup` is Python that runs in that process before it."""

    def __init__(self, *words: object, setup: str = "", **environment: str) -> None:
        import pty

        self._terminal, theirs = pty.openpty()
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER.format(setup=setup), "chat", *map(str, words)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "PYTHONPATH": path, "TERM": "dumb", **environment},
        )
        os.close(theirs)
        self.transcript = ""
        self._seen = 0

    def until(self, text: str, seconds: float = 60) -> str:
        """What came since the last call, up to `text` and with it."""
        deadline = time.monotonic() + seconds
        while (at := self.transcript.find(text, self._seen)) < 0:
            if time.monotonic() > deadline or not self._more(deadline - time.monotonic()):
                raise AssertionError(f"no {text!r} in: {self.transcript[self._seen :]!r}")
        found = self.transcript[self._seen : at + len(text)]
        self._seen = at + len(text)
        return found

    def _more(self, seconds: float) -> bool:
        if not select.select([self._terminal], [], [], max(seconds, 0))[0]:
            return True
        try:
            found = os.read(self._terminal, 65536)
        except OSError:  # the other end is closed
            return False
        self.transcript += found.decode("utf-8", "replace").replace("\r", "")
        return bool(found)

    def press(self, key: str) -> None:
        os.write(self._terminal, key.encode())

    def ask(self, message: str) -> str:
        """The answer to a message, and whatever was said beside it."""
        self.say(message)
        found = self.until("\n" + PROMPT).removesuffix("\n" + PROMPT)
        return found.removeprefix(message + "\n").strip("\n")  # echoed twice if it came before the prompt was ready

    def say(self, message: str) -> None:
        self.press(message + "\r")
        self.until(message + "\n")

    def leave(self) -> int:
        """The exit status, behind /exit."""
        self.press("/exit\r")
        deadline = time.monotonic() + 30
        while self._process.poll() is None and time.monotonic() < deadline:
            self._more(0.1)
        return self._process.wait(1)

    def __enter__(self) -> Self:
        self.until(PROMPT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind:
            print(self.transcript)
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)
