"""Archives of kernels emitted ahead of time (`ahead.py` writes them, they come in the wheel), one per target; knows no
compiler.

An archive is MAGIC, the length of an index (uint32), the index as JSON {fingerprint, kernels: {name: [start, nbytes,
SHA-256]}}, and the objects, whose starts count from the end of the index.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "objects"
SUFFIX = ".objects"
MAGIC = b"localmoe kernels\n"
LENGTH = struct.Struct("<I")


class Archive:
    """The kernels of one archive. One that is absent, damaged or of another fingerprint is empty."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._index: dict[str, tuple[int, int, str]] = {}
        self._objects = b""
        try:
            stored = path.read_bytes()
            begin = len(MAGIC) + LENGTH.size
            (length,) = LENGTH.unpack(stored[len(MAGIC) : begin])
            index: Any = json.loads(stored[begin : begin + length])
            if stored.startswith(MAGIC) and index["fingerprint"] == fingerprint:
                self._index, self._objects = index["kernels"], stored[begin + length :]
        except (OSError, ValueError, TypeError, KeyError, struct.error):
            return

    def names(self) -> tuple[str, ...]:
        return tuple(self._index)

    def object(self, name: str) -> bytes | None:
        """The object of kernel `name`; None where it is not there whole."""
        start, nbytes, digest = self._index.get(name, (0, 0, ""))
        code = self._objects[start : start + nbytes]
        return code if hashlib.sha256(code).hexdigest() == digest else None


def write_archive(path: Path, fingerprint: str, objects: Mapping[str, bytes]) -> None:
    """Put the archive in place at once: a reader sees all of it or the one before. Raises OSError."""
    kernels, at = {}, 0
    for name, code in sorted(objects.items()):
        kernels[name] = (at, len(code), hashlib.sha256(code).hexdigest())
        at += len(code)
    index = json.dumps({"fingerprint": fingerprint, "kernels": kernels}, separators=(",", ":")).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".new")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines((MAGIC, LENGTH.pack(len(index)), index, *(code for _, code in sorted(objects.items()))))
        os.chmod(temporary, 0o644)  # a wheel is for every user
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
