"""GGUF files, versions 2 and 3, little endian: the header alone is read; must not know any architecture.

Source of the layout: the GGUF specification (ggml, docs/gguf.md). Every count, length and offset is checked against the
file before it is used. Names and keys must be UTF-8; in string values, tokens among them, other bytes become U+FFFD.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from localmoe.errors import FileFormatError, LocalMoeError, UnsupportedError
from localmoe.formats import F32, FORMAT_BY_ID, FORMATS, SCALED, Format, Scales, Weight
from localmoe.loader.files import MappedFile, by_address
from localmoe.loader.source import LazyWeights, Source, map_file, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Bounds far above any real model (a header of 6 MB with 1,025 tensors is much), so that a hostile file stays cheap.
HEADER_LIMIT = 1 << 28
KEY_LIMIT, TENSOR_LIMIT, NAME_LIMIT, MATRIX_LIMIT = 1 << 16, 1 << 20, (1 << 16) - 1, 1 << 16
KEY_NBYTES, TENSOR_NBYTES = 13, 32  # least bytes that one key and value, and one tensor record, can take

# Metadata value types by id: name and struct format (strings, 8, and arrays, 9, are read apart).
SCALARS = {
    0: ("uint8", "<B"), 1: ("int8", "<b"), 2: ("uint16", "<H"), 3: ("int16", "<h"), 4: ("uint32", "<I"),
    5: ("int32", "<i"), 6: ("float32", "<f"), 7: ("bool", "<B"), 10: ("uint64", "<Q"), 11: ("int64", "<q"),
    12: ("float64", "<d"),
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9
UINT32, UINT64 = struct.Struct("<I"), struct.Struct("<Q")

# Formats that exist but are refused, for the message: types withdrawn from ggml.h, and ik_llama.cpp's own (its ggml.h).
FOREIGN = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8", 133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K",
    141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT",
    155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT",
}  # fmt: skip
OLDER = {b"tjgg": "GGJT", b"lmgg": "GGML", b"fmgg": "GGMF", b"algg": "GGLA"}
SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Record:
    """Where one tensor lies: `start` counts from the beginning of the file, `shape` is in numpy's order."""

    name: str
    shape: tuple[int, ...]
    format: Format
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Part:
    """One GGUF file: its mapping, its metadata and its tensor records."""

    path: Path
    file: MappedFile
    metadata: dict[str, Any]
    records: list[Record]


class Header:
    """A cursor over the header; every step is checked against the end before it is taken."""

    def __init__(self, path: Path, data: mmap.mmap, *, words: bool = True) -> None:
        """`words` false: strings of lists are counted and not read, which leaves as many empty ones."""
        self.path, self.data, self.at, self.words = path, data, 0, words
        self.view = memoryview(data)
        self.end = min(len(data), HEADER_LIMIT)

    def error(self, found: str, at: int | None = None) -> FileFormatError:
        return FileFormatError(f"{self.path}: at byte {self.at if at is None else at}: {found}")

    def step(self, nbytes: int, what: str) -> int:
        """Moves over `nbytes` and returns where they begin."""
        start, left = self.at, self.end - self.at
        if nbytes > left:
            limit = "the file" if self.end == len(self.data) else f"a header ({HEADER_LIMIT} bytes at most)"
            raise self.error(f"expected {what} of {nbytes} bytes, {limit} has {left} left")
        self.at = start + nbytes
        return start

    def uint32(self, what: str) -> int:
        return int(UINT32.unpack_from(self.view, self.step(4, what))[0])

    def uint64(self, what: str) -> int:
        return int(UINT64.unpack_from(self.view, self.step(8, what))[0])

    def count(self, what: str, least_nbytes: int, limit: int) -> int:
        """A count of things to come, refused when the rest of the file cannot hold them."""
        found = self.uint64(f"the number of {what}")
        possible = min(limit, (self.end - self.at) // least_nbytes)
        if found > possible:
            raise self.error(f"{found} {what} announced, expected at most {possible}", self.at - 8)
        return found

    def name(self, what: str) -> str:
        nbytes = self.uint64(f"the length of {what}")
        if nbytes > NAME_LIMIT:
            raise self.error(f"{what} of {nbytes} bytes, expected at most {NAME_LIMIT}", self.at - 8)
        start = self.step(nbytes, what)
        try:
            return str(self.view[start : self.at], "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} {shown(bytes(self.view[start : self.at]))} is not UTF-8", start) from None

    def value(self, key: str) -> Any:
        kind = self.uint32(f"the type of key {shown(key)}")
        if kind == ARRAY:
            return self.array(key)
        if kind == STRING:
            nbytes = self.uint64(f"the length of key {shown(key)}")
            start = self.step(nbytes, f"the string of key {shown(key)}")
            return str(self.view[start : self.at], "utf-8", "replace")
        if kind not in SCALARS:
            raise self.error(f"key {shown(key)} has value type {kind}, expected 0 to 12", self.at - 4)
        name, layout = SCALARS[kind]
        start = self.step(struct.calcsize(layout), f"the {name} of key {shown(key)}")
        (found,) = struct.unpack_from(layout, self.view, start)
        if kind == BOOL and found > 1:
            raise self.error(f"key {shown(key)} is a bool with value {found}, expected 0 or 1", self.at - 1)
        return bool(found) if kind == BOOL else found

    def array(self, key: str) -> Any:
        """A list of strings, or a numpy array that views the file."""
        kind = self.uint32(f"the element type of key {shown(key)}")
        if kind == STRING:
            count = self.count(f"strings in key {shown(key)}", 8, HEADER_LIMIT)
            return self.strings(count, key) if self.words else self.counted(count, key)
        if kind not in SCALARS:
            found = "an array of arrays" if kind == ARRAY else f"an array of value type {kind}"
            raise self.error(f"key {shown(key)} is {found}, expected numbers, bools or strings", self.at - 4)
        dtype = np.dtype(SCALARS[kind][1])
        count = self.count(f"elements in key {shown(key)}", dtype.itemsize, HEADER_LIMIT)
        start = self.step(count * dtype.itemsize, f"the array of key {shown(key)}")
        numbers = np.frombuffer(self.view, dtype, count, start)
        return numbers != 0 if kind == BOOL else numbers

    def strings(self, count: int, key: str) -> list[str]:
        """The hot loop of opening a file: 150,000 tokens and as many merges pass here."""
        view, end, at, length = self.view, self.end, self.at, UINT64.unpack_from
        found: list[str] = []
        append = found.append
        for index in range(count):
            start = at + 8
            if start > end:
                raise self.error(f"string {index} of {count} in key {shown(key)} lies beyond the end", at)
            at = start + length(view, at)[0]
            if at > end:
                found_nbytes = f"{at - start} bytes, {end - start} are left"
                raise self.error(f"string {index} of {count} in key {shown(key)} has {found_nbytes}", start)
            append(str(view[start:at], "utf-8", "replace"))
        self.at = at
        return found

    def counted(self, count: int, key: str) -> list[str]:
        """Steps over strings, in a quarter of the time that reading them takes."""
        view, end, at, length = self.view, self.end - 8, self.at, UINT64.unpack_from
        for index in range(count):
            if at > end:
                raise self.error(f"string {index} of {count} in key {shown(key)} lies beyond the end", at)
            at += 8 + length(view, at)[0]
        self.at, start = at, self.at
        if at > self.end:
            raise self.error(f"the last string of key {shown(key)} ends beyond the end", start)
        return [""] * count


def read_part(path: Path, *, words: bool = True) -> Part:
    """The header of one file, checked whole: keys, tensor records, their formats, places and sizes; without `words`,
    lists of strings have their length and empty strings."""
    file = map_file(path)
    header = Header(path, file.data, words=words)
    _check_version(header)
    tensor_count = header.count("tensors", TENSOR_NBYTES, TENSOR_LIMIT)
    metadata: dict[str, Any] = {}
    for _ in range(header.count("metadata keys", KEY_NBYTES, KEY_LIMIT)):
        start, key = header.at, header.name("a metadata key")
        if key in metadata:
            raise header.error(f"key {shown(key)} appears twice", start)
        metadata[key] = header.value(key)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise FileFormatError(f"{path}: general.alignment is {shown(alignment)}, expected a power of two from 8")
    found = [_tensor_record(header) for _ in range(tensor_count)]
    begin = (header.at + alignment - 1) // alignment * alignment
    records = _placed(path, found, begin, alignment, file.nbytes)
    return Part(path, file, metadata, records)


def _check_version(header: Header) -> None:
    magic = bytes(header.view[:4])
    if magic != MAGIC:
        older = f" (an older {OLDER[magic]} file: convert it again)" if magic in OLDER else ""
        raise header.error(f"expected {MAGIC!r}, found {shown(magic)}{older}: not a GGUF file")
    header.step(4, "the magic")
    version = header.uint32("the version")
    if version in VERSIONS:
        return
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version > 0xFFFF and swapped <= 0xFFFF:
        raise UnsupportedError(f"{header.path}: big-endian GGUF, version {swapped}; only little-endian can be read")
    raise UnsupportedError(f"{header.path}: GGUF version {version}; versions 2 and 3 can be read")


def _tensor_record(header: Header) -> Record:
    """One tensor record, its start still counted from the beginning of the tensor data."""
    at = header.at
    name = header.name("a tensor name")
    axes = header.uint32(f"the number of axes of tensor {shown(name)}")
    if not 1 <= axes <= 4:
        raise header.error(f"tensor {shown(name)} has {axes} axes, expected 1 to 4", header.at - 4)
    shape = tuple(header.uint64(f"an axis of tensor {shown(name)}") for _ in range(axes))[::-1]
    id = header.uint32(f"the type of tensor {shown(name)}")
    start = header.uint64(f"the offset of tensor {shown(name)}")
    if id not in FORMAT_BY_ID:
        label = f"type {id} ({FOREIGN[id]})" if id in FOREIGN else f"type {id}"
        raise UnsupportedError(f"{header.path}: tensor {shown(name)} has {label}; possible are {', '.join(FORMATS)}")
    format = FORMAT_BY_ID[id]
    if min(shape) < 1 or prod(shape[:-2]) > MATRIX_LIMIT:
        expected = f"axes from 1 and at most {MATRIX_LIMIT} matrices"
        raise header.error(f"tensor {shown(name)} has shape {shape}, expected {expected}", at)
    if shape[-1] % format.elements:
        expected = f"a multiple of {format.elements} for {format.name}"
        raise header.error(f"tensor {shown(name)} has rows of {shape[-1]}, expected {expected}", at)
    return Record(name, shape, format, start, start + prod(shape[:-1]) * format.row_nbytes(shape[-1]))


def _placed(path: Path, records: list[Record], begin: int, alignment: int, size: int) -> list[Record]:
    """The records with places in the file, after a look at names, alignment, the end of the file and overlaps."""
    placed: dict[str, Record] = {}
    for r in records:
        tensor = f"{path}: tensor {shown(r.name)}"
        if r.name in placed:
            raise FileFormatError(f"{tensor} appears twice")
        if r.start % alignment:
            raise FileFormatError(f"{tensor} has offset {r.start}, expected a multiple of {alignment}")
        if begin + r.stop > size:
            raise FileFormatError(
                f"{tensor} ends at byte {begin + r.stop}, the file at {size}: is the download complete?"
            )
        placed[r.name] = Record(r.name, r.shape, r.format, begin + r.start, begin + r.stop)
    for one, next_one in pairwise(sorted(placed.values(), key=lambda r: r.start)):
        if next_one.start < one.stop:
            names = f"{shown(one.name)} and {shown(next_one.name)}"
            raise FileFormatError(f"{path}: tensors {names} overlap at byte {next_one.start}")
    return list(placed.values())


def open_gguf(path: Path, *, words: bool = True) -> Source:
    """Opens a GGUF file, or all parts of a split one when any part is named; reads no tensor byte. Without `words`, it
    is to be described alone: lists of strings, the vocabulary above all, have their length and empty strings.

    Metadata values are int, float, bool, str, list[str] or numpy arrays; a split file has its first part's.

    Raises: FileFormatError (broken, truncated, a part missing), UnsupportedError (version, byte order, block format).
    """
    part = read_part(path, words=words)
    parts = _all_parts(part) if part.metadata.get("split.count", 1) != 1 else [part]
    makers: dict[str, Callable[[], Weight]] = {}
    for p in parts:
        for record in p.records:
            if record.name in makers:
                raise FileFormatError(f"{p.path}: tensor {shown(record.name)} is in an earlier part too")
            makers[record.name] = partial(_weight, record, p.file.data)
    total = parts[0].metadata.get("split.tensors.count", len(makers))
    if total != len(makers):
        raise FileFormatError(f"{path}: the parts hold {len(makers)} tensors, split.tensors.count says {shown(total)}")
    for name in [r.name for p in parts for r in p.records if r.format.name in SCALED and r.name.endswith(".weight")]:
        head = name.removesuffix("weight")
        if f"{head}scale" in makers:
            makers[name] = partial(_scaled, path, makers[name], makers.pop(f"{head}scale"))
        makers.pop(f"{head}input_scale", None)  # how activations were to be rounded, which they are not here
    files = by_address(p.file for p in parts)
    return Source(path, "gguf", parts[0].metadata, LazyWeights(makers), sum(file.nbytes for file in files), files=files)


def _scaled(path: Path, make: Callable[[], Weight], make_scales: Callable[[], Weight]) -> Weight:
    """NVFP4 with the float32 that llama.cpp keeps beside it: one a matrix, or one for all of them."""
    weight, beside = make(), make_scales()
    if beside.format != F32 or len(beside.slabs) != 1 or beside.elements not in (1, len(weight.slabs)):
        found = f"{path}: tensor {shown(beside.name)} is {beside.format.name} {beside.shape}"
        raise FileFormatError(f"{found}, expected F32 of {len(weight.slabs)} for {shown(weight.name)}")
    values = np.broadcast_to(beside.slabs[0].view(np.float32), len(weight.slabs))
    scales = [Scales(values[i : i + 1, None], weight.rows, weight.columns) for i in range(len(weight.slabs))]
    return replace(weight, scales=tuple(scales))


def _weight(record: Record, data: mmap.mmap) -> Weight:
    piece = np.frombuffer(data, np.uint8, record.stop - record.start, record.start)
    return Weight.whole(record.name, record.shape, record.format, piece)


def _all_parts(opened: Part) -> list[Part]:
    """Every part of a split file in order, the opened one among them."""
    path, count = opened.path, opened.metadata["split.count"]
    match = SPLIT_NAME.fullmatch(path.name)
    if not match:
        raise FileFormatError(f"{path}: one of {shown(count)} parts, expected a name like model-00001-of-00003.gguf")
    if count != int(match["count"]) or count < 1:
        raise FileFormatError(f"{path}: split.count is {shown(count)}, the file's name says {int(match['count'])}")
    names = [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not os.path.exists(path.parent / name)]
    if missing:
        raise FileFormatError(f"{path.parent / missing[0]}: no such file: {len(missing)} of {count} parts are missing")
    parts = [opened if name == path.name else read_part(path.parent / name) for name in names]
    for number, part in enumerate(parts):
        found = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if found != (number, count):
            raise FileFormatError(f"{part.path}: split.no and split.count are {found}, expected {(number, count)}")
    return parts


def is_gguf(path: Path) -> bool:
    """Whether a file that can be opened begins as GGUF does."""
    try:
        return map_file(path).data[:4] == MAGIC
    except LocalMoeError:
        return False
