"""The bytes of one kept file: how it is laid out, written whole or not at all, and read with every byte checked; must
not know where files lie or what is in the model.

    "localmoe", version u32, kind u32 (0 rows, 1 states), model 32 bytes, start u64, tokens u64, H(start) 32 bytes,
    token ids i32 each, CRC-32 of all this, then rows or states, then CRC-32 of everything before it

All numbers are little-endian. The reader knows what every field must be, from the file's name and its own model,
before it opens a file: no size in one is ever believed. A file with one damaged piece of up to 32 bits is always
noticed, any other damage but for one time in 2^32. *Why not SHA-256?* It takes twice as long with the processor's help
and many times as long without, and who can write here can also write a right digest.
"""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from localmoe.formats import Bytes
from localmoe.prompt_cache.entries import Digest, Entry, Ids, named

MAGIC, VERSION = b"localmoe", 1
HEAD = struct.Struct("<8sII32sQQ32s")
CHECKSUM = struct.Struct("<I")
PIECE_NBYTES = 4 << 20  # of states, read and checked while they are in the processor's cache
TEMPORARY = ".new"
NO_WAIT: int = getattr(os, "O_NONBLOCK", 0)


class DamagedError(Exception):
    """A kept file is not what its name says, or not whole; the words say how."""


def header(model: bytes, entry: Entry, before: Digest, tokens: Ids) -> bytes:
    """All that stands before the rows or states."""
    kind = 0 if entry.is_rows else 1
    head = HEAD.pack(MAGIC, VERSION, kind, model, entry.start, tokens.size, before) + tokens.astype("<i4").tobytes()
    return head + CHECKSUM.pack(zlib.crc32(head))


def header_nbytes(entry: Entry) -> int:
    return HEAD.size + 4 * (entry.stop - entry.start) + CHECKSUM.size


def file_nbytes(entry: Entry, content: int) -> int:
    """Of a file with so many bytes of rows or states."""
    return header_nbytes(entry) + content + CHECKSUM.size


def write(path: Path, head: bytes, content: Sequence[Bytes], sound: Callable[[], bool] = lambda: True) -> None:
    """The file at `path`, readable by the user alone: all of it or nothing, and nothing unless what was read of the
    content is `sound`. Raises OSError."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            checksum = 0
            for view in (memoryview(head), *(memoryview(piece.data) for piece in content)):
                checksum = zlib.crc32(view, checksum)
                _write(file, view)
            file.write(CHECKSUM.pack(checksum))
        if sound():
            os.replace(temporary, path)
        else:
            os.unlink(temporary)
    except BaseException:
        os.unlink(temporary)
        raise


def read_tokens(path: Path, model: bytes, entry: Entry) -> Ids:
    """The tokens that a file of rows is about. Raises DamagedError, OSError."""
    with _opened(path) as file:
        head = np.empty(header_nbytes(entry), np.uint8)
        if _read(file, head) < head.size:
            raise DamagedError("it ends in its header")
    return _checked(head, model, entry)


def read_rows(path: Path, model: bytes, entry: Entry, buffer: Bytes, row_nbytes: int) -> tuple[Ids, Bytes]:
    """The tokens that a file of rows is about, and their rows: views of `buffer`, which it must fit.

    Raises DamagedError, OSError.
    """
    size = file_nbytes(entry, (entry.stop - entry.start) * row_nbytes)
    if size > buffer.size:
        raise DamagedError("its name claims more tokens than a file has")
    with _opened(path) as file:
        _expect_size(file, size)
        if _read(file, buffer[:size]) < size:
            raise DamagedError("it was cut while it was read")
    start, end = header_nbytes(entry), size - CHECKSUM.size
    tokens = _checked(buffer[:start], model, entry)
    if CHECKSUM.unpack(buffer[end:size].tobytes())[0] != zlib.crc32(buffer[:end].data):
        raise DamagedError("the checksum is wrong")
    return tokens, buffer[start:end]


def read_states(path: Path, model: bytes, entry: Entry, targets: Sequence[Bytes]) -> None:
    """The states into `targets`, which hold anything when this raises DamagedError or OSError."""
    with _opened(path) as file:
        _expect_size(file, file_nbytes(entry, sum(target.size for target in targets)))
        head, tail = np.empty(header_nbytes(entry), np.uint8), np.empty(CHECKSUM.size, np.uint8)
        starts = [(target, at) for target in targets for at in range(0, target.size, PIECE_NBYTES)]
        checksum = 0
        for piece in (head, *(target[at : at + PIECE_NBYTES] for target, at in starts)):
            if _read(file, piece) < piece.size:
                raise DamagedError("it was cut while it was read")
            checksum = zlib.crc32(piece.data, checksum)
        _read(file, tail)
    _checked(head, model, entry)
    if CHECKSUM.unpack(tail.tobytes())[0] != checksum:
        raise DamagedError("the checksum is wrong")


def _write(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _opened(path: Path) -> FileIO:
    """For reading; without waiting for a writer, if it should be a pipe."""
    return open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | NO_WAIT))


def _expect_size(file: FileIO, size: int) -> None:
    found = os.fstat(file.fileno()).st_size
    if found != size:
        raise DamagedError(f"{found} bytes, expected {size}")


def _read(file: FileIO, target: Bytes) -> int:
    """How many bytes of `target` the file filled."""
    view, done = memoryview(target.data), 0
    while count := file.readinto(view[done:]):
        done += count
    return done


def _checked(head: Bytes, model: bytes, entry: Entry) -> Ids:
    """The tokens of a header that is as it must be."""
    data = head.tobytes()
    magic, version, kind, owner, start, tokens, before = HEAD.unpack_from(data)
    if magic != MAGIC:
        raise DamagedError("it is no kept state")
    if version != VERSION:
        raise DamagedError(f"it has version {version}, expected {VERSION}")
    if CHECKSUM.unpack(data[-CHECKSUM.size :])[0] != zlib.crc32(data[: -CHECKSUM.size]):
        raise DamagedError("the checksum of its header is wrong")
    if owner != model:
        raise DamagedError("it is of another model, or of another layout of its cache")
    expected = (0 if entry.is_rows else 1, entry.start, entry.stop - entry.start, entry.before)
    if (kind, start, tokens, named(before)) != expected:
        raise DamagedError("it is not what its name says")
    return np.frombuffer(data, "<i4", tokens, HEAD.size).astype(np.int32)
