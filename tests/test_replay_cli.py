"""`localmoe experts replay`: what is shown of a trace, and what is refused."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localmoe import cli
from localmoe.experts import curve
from localmoe.experts.trace import TraceWriter
from tests.traces import header_of

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """12 decoded tokens, a chunk of 4, 12 decoded tokens; 2 layers of 8 experts, of 100 and 300 bytes."""
    writer = TraceWriter(tmp_path / "trace.jsonl", header_of(2, 8, 2, (100, 300)))
    for step in range(1, 26):
        tokens = 4 if step == 14 else 1
        for layer in (0, 1):
            rows = [[(step + token) % 3, 3 + (step * token + layer) % 5] for token in range(tokens)]
            writer.chose(step, layer, np.array(rows, np.int32))
    writer.close()
    return writer.path


def called(capsys: Capture, *words: str) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main(["experts", "replay", *words])
    except SystemExit as error:
        status = int(error.code or 0)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_tables_and_bars_of_every_policy(trace: Path, capsys: Capture) -> None:
    status, out, _ = called(capsys, str(trace), "--sizes", "25,100")
    assert status == 0
    lines = out.splitlines()
    titles = [line for line in lines if line.startswith(("hits", "read"))]
    assert [title.partition(", ")[2] for title in titles] == ["decoded tokens"] * 2 + ["prompts"] * 2
    assert lines[1].split() == ["experts", "kept", "lru", "lfru", "history", "belady"]
    assert lines[2].split()[:4] == ["25.0", "%", "800", "B"]
    assert lines.count("25.0 % kept") == lines.count("100.0 % kept") == 1
    assert sum(line.startswith("belady") and "█" in line for line in lines) == 2


def test_json_has_counts_and_bytes(trace: Path, capsys: Capture) -> None:
    _, out, _ = called(capsys, str(trace), "--json", "--sizes", "100")
    found: list[dict[str, Any]] = json.loads(out)
    assert [record["policy"] for record in found] == ["lru", "lfru", "history", "belady"]
    for record in found:
        assert record["cache_nbytes"] == record["experts_nbytes"] == 3200
        decoded = record["decoded"]
        assert (decoded["tokens"], decoded["chosen"], record["prompts"]["tokens"]) == (12, 48, 4)
        assert decoded["hit_rate"] == decoded["hits"] / 48


def test_sizes_that_are_the_same_slots_are_shown_once(trace: Path, capsys: Capture) -> None:
    _, out, _ = called(capsys, str(trace), "--json", "--sizes", "1,2,3 %")
    assert len(json.loads(out)) == 4


def test_sizes_may_be_bytes(trace: Path, capsys: Capture) -> None:
    """Of 3200 bytes of experts."""
    _, by_bytes, _ = called(capsys, str(trace), "--json", "--sizes", "1.6kB, 800 B, 75 %")
    _, by_share, _ = called(capsys, str(trace), "--json", "--sizes", "25,50,75")
    assert json.loads(by_bytes) == json.loads(by_share) != []


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--sizes", "8GiB"], "at most 100 per cent of all experts, 3.2 kB"),
        (["--sizes", "25,3 apples"], "--sizes '3 apples': expected numbers"),
        (["--sizes", "many"], "--sizes 'many': expected numbers"),
        (["--sizes", "0"], "at most 100 per cent"),
        (["--sizes", "nan"], "at most 100 per cent"),
        (["--sizes", "5,101"], "at most 100 per cent"),
        (["--plot", "curve.gif"], "--plot curve.gif: a curve can be drawn as .png or .svg"),
    ],
)
def test_flags_out_of_range_are_refused(trace: Path, capsys: Capture, words: list[str], found: str) -> None:
    status, out, err = called(capsys, str(trace), *words)
    assert (status, out) == (2, "")
    assert found in err
    assert err.count("\n") == 1


def test_another_file_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "t").write_bytes(b"GGUF\x03\0\0\0")
    status, _, err = called(capsys, str(tmp_path / "t"))
    assert status == 2
    assert "t: line 1: a trace begins with" in err


def test_a_curve_without_matplotlib_names_the_extra(
    trace: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve, "find_spec", lambda name: None)
    status, _, err = called(capsys, str(trace), "--plot", "curve.png")
    assert status == 2
    assert "pip install 'localmoe[plot]'" in err


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the extra plot")
@pytest.mark.parametrize(("name", "magic"), [("curve.png", b"\x89PNG"), ("curve.svg", b"<?xml")])
def test_a_curve_is_drawn(trace: Path, tmp_path: Path, capsys: Capture, name: str, magic: bytes) -> None:
    status, _, err = called(capsys, str(trace), "--plot", str(tmp_path / name))
    assert (status, err) == (0, "")
    assert (tmp_path / name).read_bytes().startswith(magic)
    status, _, err = called(capsys, str(trace), "--plot", str(tmp_path / "nowhere" / name))
    assert status == 2
    assert "No such file" in err


def test_matplotlib_is_imported_for_a_curve_alone(trace: Path, capsys: Capture) -> None:
    loaded = "matplotlib" in sys.modules
    called(capsys, str(trace))
    assert ("matplotlib" in sys.modules) == loaded
