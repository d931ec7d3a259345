"""The bytes of a GGUF file, version 3, written in one pass: header first, then tensors piece by piece; knows no model.

Source of the layout: the GGUF specification (ggml, docs/gguf.md). The file has its own name only once it is whole.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from localmoe.errors import FileFormatError, SettingError
from localmoe.loader.gguf import ARRAY, BOOL, KEY_LIMIT, KEY_NBYTES, MAGIC, SCALARS, STRING, TENSOR_LIMIT, Header
from localmoe.loader.source import map_file, shown
from localmoe.memory import readable_size
from localmoe.quantisation.planning import Planned

ALIGNMENT, VERSION = 32, 3
UINT32, INT32, FLOAT32 = 4, 5, 6
PART = ".part"


def typed(value: Any) -> bytes:
    """A metadata value with its type before it: whole numbers as uint32 (int32 below 0 and in lists), others as
    float32."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        kind = _kind(value[0], INT32) if value else STRING  # merges of a vocabulary of bytes
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(_bare(kind, element) for element in value)
    kind = _kind(value, UINT32 if isinstance(value, int) and value >= 0 else INT32)
    return struct.pack("<I", kind) + _bare(kind, value)


def _kind(value: Any, whole: int) -> int:
    if isinstance(value, str):
        return STRING
    if isinstance(value, bool):
        return BOOL
    return whole if isinstance(value, int) else FLOAT32


def _bare(kind: int, value: Any) -> bytes:
    if kind != STRING:
        return struct.pack(SCALARS[kind][1], value)
    raw = str(value).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def stored_values(path: Path) -> dict[str, bytes]:
    """The metadata of a GGUF file, each value as its bytes with the type before them."""
    header = Header(path, map_file(path).data)
    header.step(len(MAGIC) + 4, "the magic and the version")
    header.count("tensors", 1, TENSOR_LIMIT)
    found: dict[str, bytes] = {}
    for _ in range(header.count("metadata keys", KEY_NBYTES, KEY_LIMIT)):
        key, start = header.name("a metadata key"), header.at
        header.value(key)
        found[key] = bytes(header.view[start : header.at])
    return found


def header_bytes(values: Mapping[str, bytes], tensors: Sequence[Planned]) -> bytes:
    """Everything before the tensors' bytes, padded; `values` as `typed` makes them."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
    parts += [_bare(STRING, key) + value for key, value in values.items()]
    at = 0
    for tensor in tensors:
        axes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts.append(_bare(STRING, tensor.name) + axes + struct.pack("<IQ", tensor.wanted.id, at))
        at += _padded(tensor.nbytes)
    header = b"".join(parts)
    return header + bytes(_padded(len(header)) - len(header))


def file_nbytes(header: bytes, tensors: Iterable[Planned]) -> int:
    return len(header) + sum(_padded(tensor.nbytes) for tensor in tensors)


def require_place(path: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Raises SettingError where the file must not or cannot be written."""
    if any(_same(path, other) for other in inputs):
        raise SettingError(f"{path}: is the model itself; name another file to write")
    if os.path.isdir(path):
        raise SettingError(f"{path}: is a folder; name the file to write")
    if not os.path.isdir(path.parent):
        raise SettingError(f"{path}: there is no folder {path.parent}")
    if os.path.lexists(path) and not force:
        raise SettingError(f"{path}: is there already; --force overwrites it")


def require_space(path: Path, nbytes: int) -> None:
    """Raises SettingError where the disk has not so many bytes free."""
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        sizes = f"{readable_size(nbytes)} are needed, {readable_size(free)} are free"
        raise SettingError(f"{path}: too little space on the disk: {sizes}")


@contextmanager
def whole_file(path: Path, *, force: bool) -> Iterator[BinaryIO]:
    """A file under another name (PART behind it), which gets its own at the end of the block. Whatever goes wrong or
    interrupts it, nothing is left behind."""
    part = path.with_name(path.name + PART)
    if os.path.lexists(part) and not force:
        raise SettingError(f"{part}: is there already, of a conversion that runs or was killed; --force overwrites it")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


def write_padding(file: BinaryIO, nbytes: int) -> None:
    """What follows a tensor of so many bytes."""
    file.write(bytes(_padded(nbytes) - nbytes))


def require_length(tensor: Planned, written: int) -> None:
    """Raises FileFormatError where a tensor came out otherwise than it was announced in the header."""
    if written != tensor.nbytes:
        raise FileFormatError(
            f"tensor {shown(tensor.name)}: {written} bytes came, expected {tensor.nbytes}: is the model being changed?"
        )


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
