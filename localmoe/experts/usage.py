"""Which experts of a model earlier sessions used: a small file for each model in the user's cache; must not know
policies.

Whatever is wrong with the file or its folder costs what was learned, and nothing else: `problem` says it in one line.

    {"localmoe_usage": 1, "model": …, "layers": L, "experts": E, "uses": [[… E counts] … L rows]}
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from localmoe.errors import FileFormatError
from localmoe.experts.history import Counts, Scores
from localmoe.kernels.cpu.build import cache_folder
from localmoe.loader.source import Source, read_small_file, shown

VERSION = 1
MEMORY = 1 << 17  # choices of a layer that count; the older ones fade as new ones come
ARRAY_LIMIT, COUNT_LIMIT, FILE_LIMIT = 1 << 19, 1 << 40, 1 << 23  # experts, tokens, bytes
KEPT_FILES = 64  # of the models used last
HEADER_NBYTES = 1 << 20  # of a model file, for its fingerprint
SETTINGS = ("config.json", "params.json")  # of a folder
SUFFIX = ".usage.json"


def usage_folder() -> Path:
    """Beside the compiled kernels."""
    return cache_folder().parent / "usage"


def fingerprint(source: Source) -> str:
    """Of a model's name, size and header; its weights are not read. Raises OSError."""
    files = [source.path / name for name in SETTINGS] if source.path.is_dir() else [source.path]
    digest = hashlib.sha256(f"{source.path.name}\0{source.nbytes}\0".encode("utf-8", "surrogateescape"))
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                digest.update(file.read(HEADER_NBYTES))
    return digest.hexdigest()[:24]


class Usage:
    """What is known of one model's experts, (L, E)."""

    def __init__(self, source: Source, layers: int, experts: int, folder: Path | None = None) -> None:
        """Reads the model's file, if there is one, in `folder` or the user's cache."""
        self.problem = ""
        self._model, self._shape = source.path.name, (layers, experts)
        self._path: Path | None = None
        self._uses = np.zeros(self._shape)
        if layers * experts > ARRAY_LIMIT:
            self.problem = f"what sessions use is not kept for more than {ARRAY_LIMIT} experts"
            return
        try:
            self._path = (folder or usage_folder()) / (fingerprint(source) + SUFFIX)
        except (OSError, RuntimeError) as error:  # no home folder
            self.problem = f"what this session uses cannot be kept: {error}"
            return
        self._read(self._path)

    @property
    def prior(self) -> Scores:
        """Each expert's share of its layer's choices, zeros where nothing is known."""
        shares: Scores = self._uses / np.maximum(self._uses.sum(axis=1, keepdims=True), 1)
        return shares

    def learn(self, uses: Counts) -> None:
        """Adds what a session counted since it learned last, for later sessions."""
        assert uses.shape == self._shape
        if self._path is None or not uses.any():
            return
        self._read(self._path)  # another session may have ended in between
        new, known = uses.sum(axis=1).max(), max(self._uses.sum(axis=1).max(), 1.0)
        counted = min(new, MEMORY)
        self._uses = self._uses * min(1.0, (MEMORY - counted) / known) + uses * (counted / new)
        try:
            self._write(self._path)
        except OSError as error:
            self.problem = f"{self._path}: what this session used cannot be kept ({error.strerror or error})"

    def _read(self, path: Path) -> None:
        try:
            if os.path.lexists(path):
                self._uses = counts_of(path, read_small_file(path, FILE_LIMIT), self._shape)
        except FileFormatError as error:
            self.problem = f"what earlier sessions used is not known: {error}"

    def _write(self, path: Path) -> None:
        """A reader sees all of it or nothing; only the user sees it."""
        counts = np.rint(self._uses).astype(np.int64).tolist()
        layers, experts = self._shape
        content = {
            "localmoe_usage": VERSION,
            "model": self._model,
            "layers": layers,
            "experts": experts,
            "uses": counts,
        }
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".new")  # readable by the user alone
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                json.dump(content, file, separators=(",", ":"))
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        with suppress(OSError):  # another session forgets at the same time
            files = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
            for old in files[KEPT_FILES:]:
                old.unlink()


def counts_of(path: Path, data: bytes, shape: tuple[int, int]) -> Scores:
    """The counts in a usage file. Raises FileFormatError."""

    def wrong(found: str) -> FileFormatError:
        return FileFormatError(f"{path}: {found}; it will be written anew")

    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise wrong("it is not JSON") from None
    if not isinstance(content, dict):
        raise wrong("it is not a usage file")
    layers, experts = shape
    for key, value in (("localmoe_usage", VERSION), ("layers", layers), ("experts", experts)):
        if type(content.get(key)) is not int or content[key] != value:
            raise wrong(f"{key} is {shown(content.get(key))}, expected {value}")
    rows = content.get("uses")
    if not isinstance(rows, list) or len(rows) != layers:
        raise wrong(f"expected {layers} rows of uses")
    for row in rows:
        if not isinstance(row, list) or len(row) != experts or set(map(type, row)) != {int}:
            raise wrong(f"expected {experts} whole numbers a row")
        if min(row) < 0 or max(row) > COUNT_LIMIT:
            raise wrong(f"a count that is not between 0 and {COUNT_LIMIT}")
    return np.array(rows, float)
