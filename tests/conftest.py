"""What every test may ask for: the conformance data. Knows where the data lies, not what is in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def conformance() -> Path:
    """The folder of golden data: $LOCALMOE_CONFORMANCE, else ../shared/data; without it the test is skipped."""
    named = os.environ.get("LOCALMOE_CONFORMANCE")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no conformance data at {folder}: set LOCALMOE_CONFORMANCE to its folder")
    return folder
