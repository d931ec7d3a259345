"""What every test may ask for: the conformance data. Knows where the data lies, not what is in it."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from verified import NAME, write

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def conformance() -> Path:
    """The folder of golden data: $LOCALMOE_CONFORMANCE, else ../shared/data; without it the test is skipped."""
    named = os.environ.get("LOCALMOE_CONFORMANCE")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no conformance data at {folder}: set LOCALMOE_CONFORMANCE to its folder")
    return folder


NUMBERS = count()


@pytest.fixture(autouse=True)
def nothing_learned(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the experts of one test's model were used for is not known to the next test."""
    folder = tmp_path_factory.getbasetemp() / f"usage-{next(NUMBERS)}"
    monkeypatch.setattr("localmoe.experts.usage.usage_folder", lambda: folder)


CLAIMS: list[Any] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        CLAIMS.extend(value for name, value in report.user_properties if name == NAME)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With $LOCALMOE_RECORD, what was verified is written there, if nothing failed."""
    path = os.environ.get("LOCALMOE_RECORD")
    if path and CLAIMS and not session.testsfailed:
        write(Path(path), CLAIMS)
