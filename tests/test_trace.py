"""A file of routing decisions: what is written is read again, and anything else is refused by file and line."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.errors import FileFormatError, SettingError
from localmoe.experts import trace as module
from localmoe.experts.trace import Header, TraceWriter, line_of, read_trace
from tests.traces import header_of

HEADER = header_of(layers=2, experts=8, used=2, nbytes=(100, 120))
GOOD = ["[1,2,0,[0,1,7,2]]", "[1,2,1,[3,4,5,6]]", "[2,1,0,[1,0]]", "[2,1,1,[7,6]]"]


def written(path: Path, lines: list[str], header: str = "") -> Path:
    path.write_text((header or line_of(HEADER)) + "".join(line + "\n" for line in lines))
    return path


@settings(max_examples=40)
@given(st.data())
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    used = data.draw(st.integers(1, experts))
    header = Header(data.draw(st.text(max_size=20)), layers, experts, used, (7,) * layers)
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    writer, sent = TraceWriter(path, header), []
    for step in range(1, data.draw(st.integers(0, 4)) + 1):
        tokens = data.draw(st.integers(1, 3))
        for layer in range(layers):
            rows = [data.draw(st.permutations(range(experts)))[:used] for _ in range(tokens)]
            sent.append((step, layer, np.array(rows, np.int32)))
            writer.chose(*sent[-1])
    writer.close()
    found = read_trace(path)
    assert found.header == header
    assert [(c.step, c.layer, c.ids.tolist()) for c in found.choices] == [(s, l, i.tolist()) for s, l, i in sent]


def test_a_step_is_in_the_file_when_the_next_one_begins(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t", HEADER)
    for step in (1, 2):
        for layer in (0, 1):
            writer.chose(step, layer, np.array([[0, 1]], np.int32))
    assert [choice.step for choice in read_trace(tmp_path / "t").choices] == [1, 1]
    writer.close()
    assert [choice.step for choice in read_trace(tmp_path / "t").choices] == [1, 1, 2, 2]


def test_a_trace_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("precious")
    with pytest.raises(SettingError, match=r"model\.gguf: the file exists"):
        TraceWriter(tmp_path / "model.gguf", HEADER)
    assert (tmp_path / "model.gguf").read_text() == "precious"


def test_a_trace_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"--trace .*No such file"):
        TraceWriter(tmp_path / "nowhere" / "t", HEADER)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_ends_the_trace_with_one_message(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t", HEADER)
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), writer._file.fileno())  # type: ignore[union-attr]
    for step in (1, 2, 3, 4):
        writer.chose(step, 0, np.array([[0, 1]], np.int32))
    assert os.strerror(errno.ENOSPC) in writer.problem
    assert "ends before step 1" in writer.problem
    writer.close()


@pytest.mark.parametrize("cut", [1, 5, 13])
def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "t", GOOD)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [(c.step, c.layer) for c in read_trace(path).choices] == [(1, 0), (1, 1), (2, 0)]


def test_a_trace_may_end_behind_its_header_or_in_the_middle_of_a_step(tmp_path: Path) -> None:
    assert read_trace(written(tmp_path / "a", [])).choices == ()
    assert len(read_trace(written(tmp_path / "b", ["[1,1,1,[0,1]]", "[2,1,0,[0,1]]"])).choices) == 2


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("[2,1,0,[0,1]", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"step": 3}', r"expected \[step"),
        ("[3,1,0]", r"expected \[step"),
        ("[3,1,0,7]", r"expected \[step"),
        ("[3,1.0,0,[0,1]]", "whole numbers"),
        ("[3,true,0,[0,1]]", "whole numbers"),
        ("[3,1,-1,[0,1]]", "whole numbers"),
        (f"[{2**60},1,0,[0,1]]", "whole numbers"),
        ("[3,1,2,[0,1]]", "step 3, layer 2 after step 2, layer 1"),
        ("[2,1,1,[0,1]]", "step 2, layer 1 after step 2, layer 1"),
        ("[1,1,0,[0,1]]", "step 1, layer 0 after"),
        ("[3,0,0,[]]", "0 tokens"),
        ("[3,1,0,[0]]", "1 ids, expected 1 times 2"),
        ("[3,2,0,[0,1]]", "2 ids, expected 2 times 2"),
        ("[3,1,0,[0,8]]", "from 0 to 7"),
        ("[3,1,0,[0,-1]]", "from 0 to 7"),
        ("[3,1,0,[0,1.0]]", "from 0 to 7"),
        ("[3,1,0,[0,true]]", "from 0 to 7"),
        ("[3,1,0,[0,null]]", "from 0 to 7"),
        ("[3,1,0,[0,[1]]]", "from 0 to 7"),
        ("[3,1,0,[5,5]]", "twice"),
    ],
)
def test_a_line_that_is_wrong_is_refused_with_its_number(tmp_path: Path, line: str, found: str) -> None:
    with pytest.raises(FileFormatError, match=rf"t: line 6: .*{found}"):
        read_trace(written(tmp_path / "t", [*GOOD, line, "[9,1,0,[0,1]]"]))


def test_the_layers_of_a_step_have_the_same_tokens(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="line 3: 1 tokens in step 1"):
        read_trace(written(tmp_path / "t", [GOOD[0], "[1,1,1,[0,1]]"]))


CHANGES = [
    ({"localmoe_trace": 2}, "expected 1"),
    ({"localmoe_trace": True}, "expected 1"),
    ({"model": 5}, "expected a name"),
    ({"layers": 0}, "layers is '0'"),
    ({"layers": 10**9}, "layers is"),
    ({"layers": 4096, "experts": 65536, "used": 1}, "not possible"),
    ({"experts": 1.5}, "experts is"),
    ({"used": 9}, "9 used of 8 experts"),
    ({"expert_nbytes": [1]}, "expected 2 sizes"),
    ({"expert_nbytes": "ab"}, "expected 2 sizes"),
    ({"expert_nbytes": [1, 0]}, "an expert of '0' bytes"),
    ({"expert_nbytes": [1, 2**50]}, "an expert of"),
]


@pytest.mark.parametrize(("change", "found"), CHANGES)
def test_a_header_that_is_wrong_is_refused(tmp_path: Path, change: dict[str, object], found: str) -> None:
    line = json.dumps(json.loads(line_of(HEADER)) | change) + "\n"
    with pytest.raises(FileFormatError, match=f"t: line 1: .*{found}"):
        read_trace(written(tmp_path / "t", GOOD, line))


@pytest.mark.parametrize("key", module.KEYS)
def test_a_header_without_a_key_is_refused(tmp_path: Path, key: str) -> None:
    values = json.loads(line_of(HEADER))
    del values[key]
    with pytest.raises(FileFormatError, match=f"'{key}' is missing"):
        read_trace(written(tmp_path / "t", GOOD, json.dumps(values) + "\n"))


@pytest.mark.parametrize("text", ["{}", "[]\n", "GGUF" * 100_000, "{" + " " * (1 << 18) + "}\n", '{"a"\n'])
def test_another_file_is_no_trace(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(FileFormatError, match="t: line 1: "):
        read_trace(tmp_path / "t")


def test_what_is_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "t", GOOD)
    monkeypatch.setattr(module, "LINE_LIMIT", 15)
    with pytest.raises(FileFormatError, match="line 2: longer than 15 bytes"):
        read_trace(path)
    monkeypatch.setattr(module, "FILE_LIMIT", 100)
    with pytest.raises(FileFormatError, match="bytes, expected at most 100"):
        read_trace(path)


@settings(max_examples=200)
@given(st.data())
def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = written(tmp_path_factory.mktemp("trace") / "t", GOOD)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(FileFormatError):
        found = read_trace(path)
        assert all(c.ids.min() >= 0 and c.ids.max() < found.header.experts for c in found.choices)
