"""Routing decisions as a file: JSON lines, a header and then one line for each step and layer; must not know models.

    {"localmoe_trace": 1, "model": …, "layers": L, "experts": E, "used": k, "expert_nbytes": [… L numbers]}
    [step, tokens, layer, [ids, tokens · k of them, token by token]]

Steps count from 1, layers (those that have experts) from 0. A step lists its layers in their order; fewer than all
where it was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from localmoe.errors import FileFormatError, SettingError
from localmoe.kernels.residency import Ids
from localmoe.loader.source import require_file, shown

VERSION = 1
FILE_LIMIT, LINE_LIMIT, HEADER_LIMIT = 1 << 29, 1 << 23, 1 << 17  # bytes
LAYER_LIMIT, EXPERT_LIMIT, NBYTES_LIMIT = 1 << 12, 1 << 16, 1 << 40
ARRAY_LIMIT = 1 << 22  # layers times experts
STEP_LIMIT = 1 << 53
KEYS = ("localmoe_trace", "model", "layers", "experts", "used", "expert_nbytes")


@dataclass(frozen=True, slots=True)
class Header:
    """Whose choices they are; `used` experts a token and layer, `expert_nbytes` of one expert, layer by layer."""

    model: str
    layers: int
    experts: int
    used: int
    expert_nbytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """What one layer's router chose in one step: (T, k)."""

    step: int
    layer: int
    ids: Ids


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace that was read and checked."""

    header: Header
    choices: tuple[Choice, ...]


class TraceWriter:
    """Writes each step when the next one begins. Where that fails, `problem` says so once, and no more is written."""

    def __init__(self, path: Path, header: Header) -> None:
        """Raises SettingError where the file cannot be made, or is there already."""
        self.path, self.problem = path, ""
        self._step, self._lines = 0, [line_of(header)]
        self._file: BinaryIO | None = None
        try:
            self._file = path.open("xb", buffering=0)
        except FileExistsError:
            raise SettingError(f"--trace {path}: the file exists; name another one, or remove it") from None
        except (OSError, ValueError) as error:
            raise SettingError(f"--trace {path}: {getattr(error, 'strerror', None) or error}") from None
        self._write()

    def chose(self, step: int, layer: int, ids: Ids) -> None:
        """A layer's choice, (T, k); steps and their layers come in order."""
        if self._file is None:
            return
        if step != self._step:
            self._write()
            self._step = step
        self._lines.append(f"[{step},{len(ids)},{layer},{json.dumps(ids.ravel().tolist(), separators=(',', ':'))}]\n")

    def close(self) -> None:
        """Write what is left."""
        self._write()
        if self._file is not None:
            self._file.close()
            self._file = None

    def discard(self) -> None:
        """Nothing came of it: the file is removed."""
        self.close()
        with suppress(OSError):
            self.path.unlink()

    def _write(self) -> None:
        data, self._lines = memoryview("".join(self._lines).encode()), []
        try:
            while self._file is not None and data:
                data = data[self._file.write(data) :]
        except OSError as error:  # a full disk: the conversation matters more
            self.problem = f"--trace {self.path}: {error.strerror or error}; the trace ends before step {self._step}"
            assert self._file is not None
            self._file.close()
            self._file = None


def line_of(header: Header) -> str:
    values = (VERSION, header.model, header.layers, header.experts, header.used, header.expert_nbytes)
    return json.dumps(dict(zip(KEYS, values, strict=True))) + "\n"


def read_trace(path: Path) -> Trace:
    """Raises FileFormatError, naming file and line, for anything that is not as above; a last line that was cut off
    when its process ended is left out."""
    if (nbytes := require_file(path)) > FILE_LIMIT:
        raise FileFormatError(f"{path}: {nbytes} bytes, expected at most {FILE_LIMIT}")
    try:
        with open(path, "rb") as file:
            first = file.readline(HEADER_LIMIT + 1)
            header = _header(path, first)
            return Trace(header, tuple(_choices(path, file, header)))
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read ({error.strerror or error})") from None


def _wrong(path: Path, number: int, found: str) -> FileFormatError:
    return FileFormatError(f"{path}: line {number}: {found}")


def _parsed(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise _wrong(path, number, f"{shown(line[:60])} is not JSON") from None


def _is_count(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _header(path: Path, line: bytes) -> Header:
    """The first line, checked key by key."""
    if not line.startswith(b"{") or not line.endswith(b"\n"):
        raise _wrong(path, 1, f"a trace begins with a line {{{json.dumps(KEYS[0])}: {VERSION}, …}}")
    found = _parsed(path, 1, line)
    if missing := [key for key in KEYS if key not in found]:
        raise _wrong(path, 1, f"the key {missing[0]!r} is missing, expected {', '.join(KEYS)}")
    version, model, layers, experts, used, expert_nbytes = (found[key] for key in KEYS)
    if version != VERSION or type(version) is not int:
        raise _wrong(path, 1, f"localmoe_trace is {shown(version)}, expected {VERSION}")
    if not isinstance(model, str):
        raise _wrong(path, 1, f"model is {shown(model)}, expected a name")
    limits = {"layers": (layers, LAYER_LIMIT), "experts": (experts, EXPERT_LIMIT), "used": (used, EXPERT_LIMIT)}
    for name, (value, limit) in limits.items():
        if not _is_count(value, 1, limit):
            raise _wrong(path, 1, f"{name} is {shown(value)}, expected 1 to {limit}")
    if used > experts or layers * experts > ARRAY_LIMIT:
        raise _wrong(path, 1, f"{used} used of {experts} experts in {layers} layers is not possible")
    if not isinstance(expert_nbytes, list) or len(expert_nbytes) != layers:
        raise _wrong(path, 1, f"expert_nbytes is {shown(expert_nbytes)}, expected {layers} sizes")
    if wrong := [n for n in expert_nbytes if not _is_count(n, 1, NBYTES_LIMIT)]:
        raise _wrong(path, 1, f"an expert of {shown(wrong[0])} bytes, expected 1 to {NBYTES_LIMIT}")
    return Header(model, layers, experts, used, tuple(expert_nbytes))


def _choices(path: Path, file: BinaryIO, header: Header) -> Iterator[Choice]:
    step, layer, tokens = 0, header.layers - 1, 0
    for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT + 1), b""), 2):
        if not line.endswith(b"\n"):
            if len(line) > LINE_LIMIT:
                raise _wrong(path, number, f"longer than {LINE_LIMIT} bytes")
            return  # the process was killed while it wrote
        found = _parsed(path, number, line)
        if not isinstance(found, list) or len(found) != 4 or not isinstance(found[3], list):
            raise _wrong(path, number, f"{shown(line[:60])}, expected [step, tokens, layer, [ids]]")
        if not all(_is_count(value, 0, STEP_LIMIT) for value in found[:3]):
            raise _wrong(path, number, f"{shown(found[:3])}, expected step, tokens and layer as whole numbers")
        if (found[0], found[2]) <= (step, layer if found[0] == step else -1) or found[2] >= header.layers:
            raise _wrong(path, number, f"step {found[0]}, layer {found[2]} after step {step}, layer {layer}")
        if found[1] < 1 or (found[0] == step and found[1] != tokens):
            raise _wrong(path, number, f"{found[1]} tokens in step {found[0]}")
        step, tokens, layer = found[:3]
        yield Choice(step, layer, _ids(path, number, tokens, found[3], header))


def _ids(path: Path, number: int, tokens: int, listed: list[Any], header: Header) -> Ids:
    if len(listed) != tokens * header.used:
        raise _wrong(path, number, f"{len(listed)} ids, expected {tokens} times {header.used}")
    if set(map(type, listed)) != {int} or min(listed) < 0 or max(listed) >= header.experts:
        raise _wrong(path, number, f"an id that is not a whole number from 0 to {header.experts - 1}")
    ids = np.array(listed, np.int32).reshape(tokens, header.used)
    if header.used > 1 and not np.diff(np.sort(ids, axis=1), axis=1).all():
        raise _wrong(path, number, "a token that chooses an expert twice")
    return ids
