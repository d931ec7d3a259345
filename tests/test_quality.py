"""bench/quality.py: what it makes of scores, solved on paper."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from localmoe.evaluation.saved_logits import rounded

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "quality.py"


@pytest.fixture(scope="module")
def quality() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quality"]


def test_two_ways_are_compared_chunk_by_chunk(quality: ModuleType) -> None:
    """p = (3/4, 1/4) against q = (1/4, 3/4) and against itself, in two chunks of one position."""
    p = rounded(np.log(np.array([[3.0, 1.0]], np.float32)))
    q = rounded(np.log(np.array([[1.0, 3.0]], np.float32)))
    tokens = np.array([[0, 0, 0, 0], [0, 0, 0, 1]], np.int32)
    far, near = quality.judge([p, p], [q, p], tokens), quality.judge([p, p], [p, p], tokens)
    assert str(far) == "perplexity    4.0000  KL 2.747e-01  same best token  50.00 %"
    assert far.less(near) == "ours less theirs +2.75e-01 ± 2.7e-01"
    assert near.less(near) == "ours less theirs +0.00e+00 ± 0.0e+00"
