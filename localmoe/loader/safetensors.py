"""Safetensors files: the JSON header alone is read; must not know any architecture.

Source of the layout: the safetensors specification. Eight bytes hold the header's length; offsets count from its end.
"""

from __future__ import annotations

import json
import mmap
import os
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.formats import F8_E4M3, FORMATS, Bytes, Format, Weight
from localmoe.loader.files import MappedFile
from localmoe.loader.source import map_file, read_small_file, shown

HEADER_LIMIT = 100_000_000  # the reference implementation's own bound
MATRIX_LIMIT = 1 << 16
READABLE = ("F32", "F16", "BF16")
PACKED = {"U8": "I8"}  # bytes that only some families can make sense of
# Bytes of an element, where the file must have as many as the shape says; 8-bit floats and whole numbers: quantised.py.
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I32": 4, "I64": 8}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: `start` and `stop` count from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    file: MappedFile

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def data(self) -> mmap.mmap:
        return self.file.data

    @property
    def bytes(self) -> Bytes:
        """A view of the mapping."""
        return np.frombuffer(self.data, np.uint8, self.stop - self.start, self.start)

    @property
    def format(self) -> Format:
        return F8_E4M3 if self.dtype == "F8_E4M3" else FORMATS[PACKED.get(self.dtype, self.dtype)]

    def require_readable(self) -> None:
        """Raises: UnsupportedError for a dtype without a format here (integers, and float8 without its scales)."""
        if self.dtype not in READABLE:
            dtype = f"tensor {shown(self.name)} has dtype {shown(self.dtype)}"
            raise UnsupportedError(f"{self.path}: {dtype}; possible are {', '.join(READABLE)}")

    def weight(self, name: str) -> Weight:
        """The tensor under GGUF's name, as views of the mapping."""
        return Weight.whole(name, self.shape or (1,), self.format, self.bytes)


def read_safetensors(path: Path) -> dict[str, Entry]:
    """The tensors of one file by name, checked against the file: sizes, places, no two of them overlapping."""
    file = map_file(path)
    data = file.data
    if len(data) < 8:
        raise FileFormatError(f"{path}: {len(data)} bytes, expected at least the 8 of the header's length")
    nbytes = int.from_bytes(data[:8], "little")
    if nbytes > len(data) - 8:
        raise FileFormatError(f"{path}: at byte 0: a header of {nbytes} bytes, the file has {len(data) - 8} left")
    if nbytes > HEADER_LIMIT:
        raise FileFormatError(f"{path}: at byte 0: a header of {nbytes} bytes, expected at most {HEADER_LIMIT}")
    header = parse_json(data[8 : 8 + nbytes], f"{path}: header")
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, found, 8 + nbytes) for name, found in header.items()}
    for one, after in pairwise(sorted(entries.values(), key=lambda e: (e.start, e.stop))):
        if after.start < one.stop:
            names = f"{shown(one.name)} and {shown(after.name)}"
            raise FileFormatError(f"{path}: tensors {names} overlap at byte {after.start}")
    return entries


def _entry(file: MappedFile, name: str, found: Any, begin: int) -> Entry:
    def error(what: str) -> FileFormatError:
        return FileFormatError(f"{file.path}: tensor {shown(name)} {what}")

    if not isinstance(found, dict) or found.keys() != {"dtype", "shape", "data_offsets"}:
        raise error(f"is {shown(found)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(dtype, str):
        raise error(f"has dtype {shown(dtype)}, expected a name")
    if not _whole_numbers(shape) or len(shape) > 8 or 0 in shape:
        raise error(f"has shape {shown(shape)}, expected whole numbers from 1")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise error(f"has data_offsets {shown(offsets)}, expected a start and an end")
    start, stop = begin + offsets[0], begin + offsets[1]
    if stop > file.nbytes:
        raise error(f"ends at byte {stop}, the file at {file.nbytes}: is the download complete?")
    # Packed experts have axes for their rows and blocks: the first one alone counts matrices.
    if prod(shape[:1] if dtype in PACKED and len(shape) > 2 else shape[:-2]) > MATRIX_LIMIT:
        raise error(f"has shape {shown(shape)}, expected at most {MATRIX_LIMIT} matrices")
    if dtype in SIZES and prod(shape) * SIZES[dtype] != stop - start:
        expected = f"{prod(shape) * SIZES[dtype]} bytes for {dtype} {tuple(shape)}"
        raise error(f"has {stop - start} bytes, expected {expected}")
    return Entry(name, dtype, tuple(shape), start, stop, file)


def read_shards(folder: Path, stem: str = "model") -> dict[str, Entry]:
    """All tensors of a folder, single file or sharded by its index."""
    index = f"{stem}.safetensors.index.json"
    wanted = weight_map(folder / index) if os.path.exists(folder / index) else {}
    files = sorted(set(wanted.values())) or [_only_file(folder, stem)]
    missing = [name for name in files if not os.path.exists(folder / name)]
    if missing:
        raise FileFormatError(f"{folder / missing[0]}: no such file: {len(missing)} of {len(files)} shards are missing")
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_safetensors(folder / file).items():
            if name in entries:
                raise FileFormatError(f"{entry.path}: tensor {shown(name)} is in {entries[name].path.name} too")
            entries[name] = entry
    for name, file in wanted.items():
        if name not in entries or entries[name].path.name != file:
            raise FileFormatError(f"{folder / file}: tensor {shown(name)} is not in it, though {index} says so")
    return entries


def _only_file(folder: Path, stem: str) -> str:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if f"{stem}.safetensors" in files:
        return f"{stem}.safetensors"
    if len(files) != 1:
        found = f"{len(files)} .safetensors files" if files else "no .safetensors file"
        raise FileFormatError(
            f"{folder}: {found}, expected {stem}.safetensors, or shards with {stem}.safetensors.index.json"
        )
    return files[0]


def weight_map(index: Path) -> dict[str, str]:
    """Tensor names and the files that hold them; a file name that leaves the folder is refused."""
    found = read_json(index, HEADER_LIMIT).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise FileFormatError(f"{index}: weight_map is {shown(found)}, expected tensors and their files")
    for name in found.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\0" in name:
            raise FileFormatError(f"{index}: {shown(name)} is named as a shard, expected a file name without a folder")
    return found


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes."""
    return parse_json(read_small_file(path, limit), str(path))


def parse_json(text: bytes, origin: str) -> dict[str, Any]:
    """A JSON object in which no key appears twice. Raises FileFormatError naming `origin` and the place."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise FileFormatError(f"{origin}: key {shown(twice)} appears twice")
        return found

    def number(name: str) -> Any:
        raise FileFormatError(f"{origin}: the number {name} is not JSON")

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=number)
    except json.JSONDecodeError as error:
        raise FileFormatError(f"{origin}: not JSON: {error.msg} at character {error.pos}") from None
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{origin}: not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError):
        raise FileFormatError(f"{origin}: JSON beyond all measure (nesting or a number's digits)") from None
    if not isinstance(found, dict):
        raise FileFormatError(f"{origin}: {shown(found)}, expected a JSON object")
    return found


def _whole_numbers(found: Any) -> bool:
    return isinstance(found, list) and {int}.issuperset(map(type, found)) and min(found, default=0) >= 0
