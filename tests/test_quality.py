"""bench/quality.py: llama-perplexity's file of logits read from hand-made bytes, and the figures solved on paper."""

from __future__ import annotations

import importlib.util
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

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


def test_a_saved_file_is_tokens_and_rows_of_scaled_steps(quality: ModuleType, tmp_path: Path) -> None:
    """Context 4 scores one position of a chunk; three tokens of vocabulary are filled up to four."""
    head = b"_logits_" + struct.pack("<3i", 4, 3, 2) + struct.pack("<8i", *range(8))
    rows = struct.pack("<2f4H", 0.5, -4.0, 0, 2, 6, 9) + struct.pack("<2f4H", 0.25, -8.0, 4, 8, 12, 9)
    path = tmp_path / "saved"
    path.write_bytes(head + rows)
    tokens, chunks = quality.read_saved(path)
    assert tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [chunk.tolist() for chunk in chunks] == [[[-4.0, -3.0, -1.0]], [[-7.0, -6.0, -5.0]]]


def test_a_file_of_another_kind_is_refused(quality: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(SystemExit, match="_logits_ is wanted"):
        quality.read_saved(path)


def test_saved_logits_end_16_nats_below_the_best_and_move_by_half_a_step(quality: ModuleType) -> None:
    logits = np.array([[3.0, -2.0, -40.0, 0.1234567], [0.0, 0.0, 0.0, 0.0]], np.float32)
    kept = quality.as_saved(logits)
    assert np.abs(kept - np.maximum(logits, logits.max(axis=1, keepdims=True) - 16)).max() <= 16 / 65535 / 2 + 2e-6
    assert kept[1].tolist() == [0, 0, 0, 0]


def test_a_score_is_the_paper_s_figure(quality: ModuleType) -> None:
    """p = (3/4, 1/4) against q = (1/4, 3/4), then against itself."""
    p = np.log(np.array([[3.0, 1.0]], np.float32))
    tokens = np.array([[0, 0, 0, 0], [0, 0, 0, 1]], np.int32)
    score = quality.score([p, p], [p[:, ::-1], p], tokens)
    assert score.divergence == pytest.approx(np.array([[0.5 * np.log(3)], [0]]))
    assert score.surprise == pytest.approx(np.array([[np.log(4)], [np.log(4)]]))
    assert score.agrees.tolist() == [[False], [True]]
