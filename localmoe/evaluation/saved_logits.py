"""llama.cpp's file of log probabilities, written and read; must not know any model.

Source: llama.cpp's tools/perplexity/perplexity.cpp, --save-all-logits. "_logits_"; context, vocabulary V and chunks as
int32; the tokens of all chunks as int32; then for each scored position its scale and its lowest log probability
(float32) and V steps of 16 bits, filled up to an even number. Nothing is kept lower than 16 nats below the best.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from localmoe.errors import FileFormatError, SettingError
from localmoe.evaluation.windows import LEAST_CONTEXT, Ids, Windows, scored_of
from localmoe.kernels.program import Floats
from localmoe.loader.source import map_file
from localmoe.memory import readable_size

Steps = npt.NDArray[np.uint16]
MAGIC = b"_logits_"
HEAD = 20
LOWEST = 16  # nats
MOST_STEPS = 65535


def row_steps(vocabulary: int) -> int:
    """16-bit numbers of one position: scale and lowest value take four."""
    return 4 + vocabulary + vocabulary % 2


@dataclass(frozen=True, slots=True)
class Rows:
    """Log probabilities (rows, V) as they are kept: steps · scale + lowest."""

    steps: Steps
    scale: Floats
    lowest: Floats

    def __len__(self) -> int:
        return len(self.steps)

    def part(self, rows: slice) -> Rows:
        return Rows(self.steps[rows], self.scale[rows], self.lowest[rows])

    def values(self) -> Floats:
        found: Floats = self.steps * self.scale[:, None] + self.lowest[:, None]
        return found


def rounded(logits: Floats) -> Rows:
    """Logits (rows, V) as log probabilities in 65,536 steps."""
    best = logits.max(axis=1, keepdims=True)
    low = np.maximum(logits.min(axis=1, keepdims=True), best - np.float32(LOWEST))
    total = np.log(np.exp(logits - best).sum(axis=1, dtype=np.float64)).astype(np.float32)
    scale = (best - low) / np.float32(MOST_STEPS)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    steps = np.rint(np.clip((logits - low) * inverse, 0, MOST_STEPS)).astype(np.uint16)
    return Rows(steps, scale[:, 0], (low - best)[:, 0] - total)


class SavedLogits:
    """A file that was saved, mapped: its head and sizes are checked, nothing is allocated on their word."""

    def __init__(self, path: Path) -> None:
        """Raises FileFormatError for what is no such file, or is shorter or longer than its head says."""
        self.path = path
        data = map_file(path).data
        if len(data) < HEAD or data[:8] != MAGIC:
            raise FileFormatError(f"{path}: it begins with {data[:8]!r}, expected {MAGIC!r} of saved logits")
        self.context, self.vocabulary, self.chunks = (
            int.from_bytes(data[start : start + 4], "little", signed=True) for start in (8, 12, 16)
        )
        sizes = f"context {self.context}, vocabulary {self.vocabulary}, {self.chunks} chunks"
        if self.context < LEAST_CONTEXT or self.vocabulary < 1 or self.chunks < 1:
            raise FileFormatError(f"{path}: its head says {sizes}, which is not possible")
        self.scored, row = scored_of(self.context), row_steps(self.vocabulary)
        tokens_end = HEAD + 4 * self.context * self.chunks
        expected = tokens_end + 2 * row * self.scored * self.chunks
        if len(data) != expected:
            raise FileFormatError(
                f"{path}: {len(data)} bytes, expected {expected} for {sizes}: was it saved to its end?"
            )
        self.tokens: Ids = np.frombuffer(data, "<i4", self.context * self.chunks, HEAD)
        if self.tokens.min() < 0 or self.tokens.max() >= self.vocabulary:
            raise FileFormatError(f"{path}: it has tokens outside its vocabulary of {self.vocabulary}")
        saved = np.frombuffer(data, "<u2", row * self.scored * self.chunks, tokens_end)
        self._rows = saved.reshape(self.chunks, self.scored, row)

    def chunk(self, number: int) -> Rows:
        """What was saved of one chunk. Raises FileFormatError for scales that are no numbers."""
        saved = self._rows[number]
        head = np.ascontiguousarray(saved[:, :4]).view("<f4")
        if not np.isfinite(head).all() or head[:, 0].min() < 0:
            raise FileFormatError(f"{self.path}: chunk {number + 1} has a scale or a lowest value that is no number")
        return Rows(saved[:, 4 : 4 + self.vocabulary], head[:, 0], head[:, 1])


class LogitsWriter:
    """Appends chunks to an open file."""

    def __init__(self, file: BinaryIO, windows: Windows, vocabulary: int) -> None:
        self._file, self._row = file, row_steps(vocabulary)
        file.write(MAGIC + np.array([windows.context, vocabulary, windows.count], "<i4").tobytes())
        file.write(windows.tokens[: windows.count * windows.context].astype("<i4").tobytes())

    def write(self, rows: Rows) -> None:
        saved = np.zeros((len(rows), self._row), "<u2")
        saved[:, :4] = np.stack([rows.scale, rows.lowest], axis=1).astype("<f4").view("<u2")
        saved[:, 4 : 4 + rows.steps.shape[1]] = rows.steps
        self._file.write(saved.tobytes())


def saved_nbytes(windows: Windows, vocabulary: int) -> int:
    return HEAD + 4 * windows.context * windows.count + 2 * row_steps(vocabulary) * windows.scored * windows.count


@contextmanager
def saving(path: Path, windows: Windows, vocabulary: int) -> Iterator[LogitsWriter]:
    """A writer whose file gets its name when it is whole; whatever ends the `with` block early leaves nothing behind.
    Raises SettingError where it cannot be written or has no room."""
    part, wanted = path.with_name(f"{path.name}.{os.getpid()}.part"), saved_nbytes(windows, vocabulary)
    try:
        free = shutil.disk_usage(path.parent).free
        if wanted > free:
            raise SettingError(
                f"{path}: logits of {windows.count} chunks take {readable_size(wanted)}, and {readable_size(free)} are "
                "free; --chunks asks for fewer"
            )
        with part.open("xb") as file:
            yield LogitsWriter(file, windows, vocabulary)
        os.replace(part, path)
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()
