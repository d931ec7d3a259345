"""A model as found on disk: metadata under GGUF's keys, tensors under GGUF's names; must not know any architecture.

Opening reads headers only. Tensors are made when asked for, as views of memory-mapped files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from localmoe.errors import FileFormatError
from localmoe.formats import Weight
from localmoe.loader.files import MappedFile


class LazyWeights(Mapping[str, Weight]):
    """Tensors by name, each made on access: a header that claims a million slabs costs nothing until someone asks."""

    def __init__(self, makers: Mapping[str, Callable[[], Weight]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Weight:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class PlannedTensors(Mapping[str, Weight]):
    """Tensors that come into being when they are asked for by name and shape: those of a model that is planned.

    `known` are the names that an index lists, none where there is no index; `made` tensors that settings alone give.
    """

    def __init__(
        self,
        make: Callable[[str, tuple[int, ...]], Weight],
        holds: Callable[[str], bool],
        made: Mapping[str, Callable[[], Weight]],
        known: frozenset[str],
    ) -> None:
        self._make, self._holds, self._known = make, holds, known
        self._given = {name: maker() for name, maker in made.items()}

    def wanted(self, name: str, shape: tuple[int, ...]) -> Weight:
        """The tensor of that name, in that shape. Raises KeyError where an index lists none of that name."""
        if self._known and name not in self._known and name not in self._given:
            raise KeyError(name)
        return self._given.setdefault(name, self._make(name, shape))

    def __getitem__(self, name: str) -> Weight:
        return self._given[name]

    def __contains__(self, name: object) -> bool:
        return name in self._given or (isinstance(name, str) and self._holds(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._given.keys() | self._known)

    def __len__(self) -> int:
        return len(self._given.keys() | self._known)


@dataclass(frozen=True)
class Source:
    """An opened model; `nbytes` counts the weight files, `tokenizer_folder` is None where metadata has the tokens.

    `files` are those that tensors are views of, by address; none of a plan.
    """

    path: Path
    kind: Literal["gguf", "folder", "mistral"]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Weight]
    nbytes: int
    tokenizer_folder: Path | None = None
    files: tuple[MappedFile, ...] = ()

    @property
    def rope_permuted(self) -> bool:
        """Whether q and k of the llama family lie as adjacent rope pairs: as Meta and Mistral train them, and as
        llama.cpp's converter puts them back; Hugging Face's converter permutes them."""
        return self.kind != "folder"

    @property
    def value_heads_tiled(self) -> bool:
        """Whether value heads of Qwen3.5's delta nets take turns with the key heads (llama.cpp's converter reorders
        them), or each key head's follow one another."""
        return self.kind == "gguf"


def shown(text: object, limit: int = 80) -> str:
    """Text from a file made safe for a one-line message: quoted, escaped, cut."""
    plain = ascii(text) if isinstance(text, bytes) else repr(str(text))
    return plain if len(plain) <= limit else plain[: limit - 4] + "…" + plain[-1]


def listed(names: list[str], limit: int = 6) -> str:
    """The first names of a list and how many more there are, for a message."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def require_file(path: Path) -> int:
    """The size in bytes of a regular file that is not empty; a folder, FIFO or device is refused unopened."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path}: {_reason(error)}") from None
    if stat.S_ISDIR(found.st_mode):
        raise FileFormatError(f"{path}: is a folder, expected a file")
    if not stat.S_ISREG(found.st_mode):
        raise FileFormatError(f"{path}: is a pipe, socket or device, expected a regular file")
    if found.st_size == 0:
        raise FileFormatError(f"{path}: the file is empty")
    return found.st_size


def map_file(path: Path) -> MappedFile:
    """The file memory-mapped, read only; nothing of it is read."""
    require_file(path)
    try:
        return MappedFile.of(path)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path}: {_reason(error)}") from None


def read_small_file(path: Path, limit: int) -> bytes:
    """The bytes of a file that has no business being longer than `limit` bytes."""
    size = require_file(path)
    if size > limit:
        raise FileFormatError(f"{path}: {size} bytes, expected at most {limit}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileFormatError(f"{path}: {_reason(error)}") from None


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "permission denied"
    return f"cannot be opened ({getattr(error, 'strerror', None) or error})"
