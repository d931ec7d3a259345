"""Which model, on which device, with which cache: what must be equal for kept rows to be the model's own; must not know
where they are kept."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from localmoe.loader.files import MappedFile, place
from localmoe.model import Model
from localmoe.prompt_cache.segment import VERSION

MOST_HEADER = 32 << 20  # bytes before the first tensor of a file: metadata, tensor names, a vocabulary
UNKNOWN_HEADER = 1 << 20  # of a file of which no tensor is a view, as all of them are made
SAMPLES, LEAST_SAMPLES, SAMPLE_NBYTES = 128, 4, 512  # of all files together, of each, evenly spread
SETTINGS = ("config.json", "params.json")  # of a folder


def identity(model: Model) -> bytes:
    """32 bytes: of sizes, times, headers and samples of the weight files, of what is computed with them and of how rows
    are laid out. Reads the headers, which were read when the model was opened, and about 128 pages. Raises OSError."""
    digest = hashlib.sha256(json.dumps(_described(model), sort_keys=True).encode())
    if model.source.path.is_dir():
        for path in (model.source.path / name for name in SETTINGS):
            digest.update(path.read_bytes() if path.is_file() else b"\0")
    files = model.source.files
    first: dict[MappedFile, int] = {}
    for view in (view for weight in model.network.tensors.values() for view in weight.views(0)):
        if found := place(files, view.ctypes.data, view.nbytes):
            first[found[0]] = min(first.get(found[0], MOST_HEADER), found[1])
    for file in files:
        header = first.get(file, UNKNOWN_HEADER)
        digest.update(_sampled(file, header, max(SAMPLES // len(files), LEAST_SAMPLES)))
    return digest.digest()


def _described(model: Model) -> dict[str, Any]:
    """What is computed, and with which weights: a change of context can change a rope, `quantize` the formats."""
    program = model.network.program(1)
    ropes = {id(op.attributes["table"]): op.attributes["table"] for op in program.ops if op.name == "rope"}
    return {
        "version": (VERSION, _own_version(), _own_sources()),
        "architecture": model.architecture,
        "device": model.device.name,
        "kv": model.kv_format,
        "layout": model.cache_state.layout,
        "ropes": [table.frequencies(model.context).tolist() for table in ropes.values()],
        "tensors": [(name, weight.shape, weight.format.name) for name, weight in sorted(model.network.tensors.items())],
        "files": [(file.nbytes, file.identity.changed) for file in model.source.files],
    }


def _own_sources() -> list[tuple[str, int, int]]:
    """Of what computes rows: names, sizes and times. A checkout that is changed or pulled keeps its version."""
    package = Path(__file__).parent.parent
    found = [path for part in ("arch", "kernels") for path in sorted((package / part).rglob("*.py"))]
    states = [(path, path.stat()) for path in found]
    return [(path.relative_to(package).as_posix(), state.st_size, state.st_mtime_ns) for path, state in states]


def _own_version() -> str:
    """Another version may compute other rows."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("localmoe")
    except PackageNotFoundError:  # run from a checkout
        return ""


def _sampled(file: MappedFile, header: int, samples: int) -> bytes:
    """The digest of a file's beginning and of pieces from all over it."""
    with open(file.place, "rb", buffering=0) as opened:
        if (found := os.fstat(opened.fileno())).st_size != file.nbytes or found.st_mtime_ns != file.identity.changed:
            raise OSError(f"{file.path} has changed since it was opened")
        digest = hashlib.sha256(opened.read(header))
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # a page each time, and nothing beside it
        for at in np.linspace(header, max(file.nbytes - SAMPLE_NBYTES, header), samples, dtype=np.int64).tolist():
            opened.seek(at)
            digest.update(opened.read(SAMPLE_NBYTES))
    return digest.digest()
