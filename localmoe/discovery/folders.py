"""Models that lie in a folder and those below it, found by names and sizes alone: no model file is opened.

A folder may be anything: an endless tree, links in a circle, a million files, a pipe that is called model.gguf.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from localmoe.loader.gguf import SPLIT_NAME

MODELS_LIMIT = 1000
# Which quantisation a file's name says, as publishers write it: Model-Q4_K_M.gguf, model.IQ2_XXS, UD-Q4_K_XL, BF16.
LABEL = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|BF16|F16|F32|FP16|FP32|MXFP4(?:_MOE)?|NVFP4))(?=[-.]|$)",
    re.IGNORECASE | re.ASCII,
)
# Projectors of vision models, importance matrices, vocabularies of llama.cpp's tests: GGUF files, and no models.
OTHER = re.compile(r".*(mmproj|imatrix).*|ggml-vocab-.*", re.IGNORECASE | re.DOTALL)
UNINTERESTING = frozenset("__pycache__ node_modules site-packages blobs venv".split())


@dataclass(frozen=True, slots=True)
class Found:
    """A model that seems to be there. `name` is what to ask for it by, `names` are others that mean it.

    `origin` is the title of the place; `nbytes` those of all its files; `identity` device and inode of the first;
    `note` says what is wrong with it or left out of it, mostly nothing.
    """

    name: str
    path: Path
    origin: str
    nbytes: int
    identity: tuple[int, int]
    names: frozenset[str] = frozenset()
    note: str = ""


@dataclass
class Walk:
    """One look around: what may still be looked at, which folders were seen, and what could not be read (`notes`)."""

    notes: list[str]
    left: int
    seen: set[tuple[int, int]] = field(default_factory=set)

    def enter(self, folder: Path) -> tuple[Mapping[str, os.stat_result], list[str]] | None:
        """Regular files by name, and the names of folders; None for a folder that was seen, cannot be read, or is too
        much. Symbolic links are what they lead to."""
        try:
            found = os.stat(folder)
            if (found.st_dev, found.st_ino) in self.seen:
                return None
            self.seen.add((found.st_dev, found.st_ino))
            with os.scandir(folder) as entries:
                return self._sorted_out(folder, entries)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            self.notes.append(f"{folder}: cannot be read ({getattr(error, 'strerror', None) or error})")
            return None

    def _sorted_out(
        self, folder: Path, entries: Iterator[os.DirEntry[str]]
    ) -> tuple[Mapping[str, os.stat_result], list[str]]:
        files: dict[str, os.stat_result] = {}
        folders: list[str] = []
        for entry in entries:
            if self.left <= 0:
                self.notes.append(f"{folder}: not searched to its end: too many files")
                break
            self.left -= 1
            try:
                found = entry.stat()
            except OSError:  # a link that leads nowhere, or to itself
                continue
            if stat.S_ISDIR(found.st_mode):
                folders.append(entry.name)
            elif stat.S_ISREG(found.st_mode) and found.st_size:
                files[entry.name] = found
        return files, sorted(folders)


def models_below(walk: Walk, folder: Path, origin: str, depth: int) -> Iterator[Found]:
    """Models of a folder and of those below it, down to `depth` folders in all; hidden ones are passed over."""
    inside = walk.enter(folder)
    if inside is None:
        return
    files, folders = inside
    if model := folder_model(folder, files, origin):
        yield model
    yield from gguf_models(folder, files, origin)
    if depth > 1:
        for name in folders:
            if not name.startswith(".") and name not in UNINTERESTING:
                yield from models_below(walk, folder / name, origin, depth - 1)


def folder_model(folder: Path, files: Mapping[str, os.stat_result], origin: str) -> Found | None:
    """The folder itself, where it is a model in safetensors."""
    weights = [name for name in files if name.endswith(".safetensors")]
    native = "params.json" in files and any(name.startswith("consolidated") for name in weights)
    if not weights or not (native or "config.json" in files):
        return None
    place = os.stat(folder)
    size = sum(files[name].st_size for name in weights)
    name = folder.name or folder.resolve().name
    return Found(name, folder, origin, size, (place.st_dev, place.st_ino), frozenset({name}))


def gguf_models(folder: Path, files: Mapping[str, os.stat_result], origin: str) -> Iterator[Found]:
    """GGUF files, split ones once, by the first part that is there."""
    parts: dict[tuple[str, int], list[str]] = {}
    for name in sorted(files):
        if not name.lower().endswith(".gguf") or OTHER.fullmatch(name):
            continue
        match = SPLIT_NAME.fullmatch(name)
        parts.setdefault((match["stem"], int(match["count"])) if match else (name[:-5], 0), []).append(name)
    for (stem, count), names in parts.items():
        first = files[names[0]]
        note = f"{count - len(names)} of {count} parts are missing" if count > len(names) else ""
        size = sum(files[name].st_size for name in names)
        known = frozenset({stem, *names})
        yield Found(stem, folder / names[0], origin, size, (first.st_dev, first.st_ino), known, note)


def label(stem: str) -> str:
    """The quantisation that a file's name says, in capitals; empty where it says none."""
    found = LABEL.findall(stem)
    return found[-1].upper() if found else ""
