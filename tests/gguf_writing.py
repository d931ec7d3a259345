"""GGUF and safetensors bytes written by hand, wrong ones included; knows the layouts and nothing of the reader."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from localmoe.formats import FORMATS

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
LAYOUT = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


@dataclass(frozen=True)
class Typed:
    """A metadata value of a stated type; `of` is the element type of an array."""

    kind: int
    value: Any
    of: int = 0


@dataclass(frozen=True)
class Tensor:
    """A tensor record; `shape` in numpy's order, `type_id` and `offset` only to say something wrong."""

    name: str | bytes
    shape: tuple[int, ...]
    format: str = "F32"
    data: bytes | None = None
    type_id: int | None = None
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        kind = FORMATS[self.format]
        return prod(self.shape) // kind.elements * kind.nbytes


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(found: Any) -> bytes:
    """The type and the bytes of one metadata value, numbers as uint32 and float32 unless a type is stated."""
    if isinstance(found, Typed) and found.kind == ARRAY:
        body = b"".join(
            string(v) if found.of == STRING else struct.pack("<" + LAYOUT[found.of], v) for v in found.value
        )
        return struct.pack("<IIQ", ARRAY, found.of, len(found.value)) + body
    if isinstance(found, Typed):
        return struct.pack("<I", found.kind) + struct.pack("<" + LAYOUT[found.kind], found.value)
    if isinstance(found, list):
        of = STRING if isinstance(found[0], (str, bytes)) else FLOAT32 if isinstance(found[0], float) else INT32
        return value(Typed(ARRAY, found, of))
    if isinstance(found, (str, bytes)):
        return struct.pack("<I", STRING) + string(found)
    return value(Typed(BOOL if isinstance(found, bool) else UINT32 if isinstance(found, int) else FLOAT32, found))


def gguf_bytes(
    metadata: Mapping[str, Any] | Sequence[tuple[str | bytes, Any]] = (),
    tensors: Sequence[Tensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    tensor_count: int | None = None,
    key_count: int | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    pairs = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    counts = (len(tensors) if tensor_count is None else tensor_count, len(pairs) if key_count is None else key_count)
    head = [magic, struct.pack("<IQQ", version, *counts)]
    head += [string(key) + value(found) for key, found in pairs]
    body = b""
    for tensor in tensors:
        body += bytes(-len(body) % alignment)
        type_id = FORMATS[tensor.format].id if tensor.type_id is None else tensor.type_id
        axes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        offset = len(body) if tensor.offset is None else tensor.offset
        head.append(string(tensor.name) + axes + struct.pack("<IQ", type_id, offset))
        body += bytes(tensor.nbytes) if tensor.data is None else tensor.data
    header = b"".join(head)
    return header + bytes(-len(header) % alignment) + body if body else header


def write_sparse(path: Path, metadata: Mapping[str, Any], tensors: Sequence[Tensor], alignment: int = 32) -> Path:
    """A file whose header is whole and whose tensors are one hole: it has their size and takes no room on the disk."""
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    head += [string(key) + value(found) for key, found in metadata.items()]
    end = 0
    for tensor in tensors:
        axes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        start = -(-end // alignment) * alignment
        head.append(string(tensor.name) + axes + struct.pack("<IQ", FORMATS[tensor.format].id, start))
        end = start + tensor.nbytes
    header = b"".join(head)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(-(-len(header) // alignment) * alignment + end)
    return path


def write_gguf(path: Path, *arguments: Any, **options: Any) -> Path:
    path.write_bytes(gguf_bytes(*arguments, **options))
    return path


def safetensors_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], **changes: Any) -> bytes:
    """Tensors as (dtype, shape, data), in order; `changes` replace the header's entries by name."""
    header: dict[str, Any] = {}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps({**header, **changes}).encode()
    return struct.pack("<Q", len(text)) + text + body
