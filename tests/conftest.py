"""What every test may ask for, and what holds for all of them: the conformance data, where nothing of one test is found
by the next, which random examples are tried. Knows where the data lies, not what is in it."""

from __future__ import annotations

import os
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from verified import NAME, write

from localmoe.interrupt import when_gone

# The same examples in each run, so that a change is not refused for what it did not do; others are tried by
# `make test ARGS=--hypothesis-profile=default`.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def conformance() -> Path:
    """The folder of golden data: $LOCALMOE_CONFORMANCE, else ../shared/data; without it the test is skipped."""
    named = os.environ.get("LOCALMOE_CONFORMANCE")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no conformance data at {folder}: set LOCALMOE_CONFORMANCE to its folder")
    return folder


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell: no Ctrl+C would be heard
    signal.signal(signal.SIGINT, signal.default_int_handler)
NUMBERS = count()
when_gone(lambda: None, list)  # which starts the thread that ends what has gone: tests count the others


@pytest.fixture(autouse=True)
def nothing_learned(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the experts of one test's model were used for is not known to the next test."""
    folder = tmp_path_factory.getbasetemp() / f"usage-{next(NUMBERS)}"
    monkeypatch.setattr("localmoe.experts.usage.usage_folder", lambda: folder)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Conversations and histories of one test are not found by the next, nor by the user; the folder comes into being
    when something is kept."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / f"state-{next(NUMBERS)}"))


CLAIMS: list[Any] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        CLAIMS.extend(value for name, value in report.user_properties if name == NAME)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With $LOCALMOE_RECORD, what was verified is written there, if nothing failed."""
    path = os.environ.get("LOCALMOE_RECORD")
    if path and CLAIMS and not session.testsfailed:
        write(Path(path), CLAIMS)
