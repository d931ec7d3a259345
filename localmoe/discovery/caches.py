"""Models in the caches of other programs, under the names that these give them; opens manifests, and no model file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from localmoe.discovery.folders import Found, Walk, gguf_models, label, models_below
from localmoe.discovery.places import json_object
from localmoe.errors import FileFormatError
from localmoe.loader.source import read_small_file

REPOSITORY = "models--"
DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})", re.ASCII)
COMMIT = re.compile(r"[0-9a-zA-Z._-]{1,128}", re.ASCII)
MODEL_LAYER, ADAPTER_LAYER = "application/vnd.ollama.image.model", "application/vnd.ollama.image.adapter"
MANIFESTS = ("manifests", "manifests-v2", "manifest-v2")  # the latter of newer versions, under another registry's name
REGISTRIES = ("registry.ollama.ai", "ollama.com")  # which ollama leaves out of a name, as it does the library's
LIBRARY = "library"


def huggingface_models(walk: Walk, hub: Path, origin: str) -> Iterator[Found]:
    """What the Hub's cache holds: `models--org--name/snapshots/<revision>/…`, links to blobs; newest revision first."""
    inside = walk.enter(hub)
    for folder in inside[1] if inside else ():
        if not folder.startswith(REPOSITORY):
            continue
        repository = folder.removeprefix(REPOSITORY).replace("--", "/", 1)
        given: set[str] = set()
        for snapshot in _snapshots(walk, hub / folder):
            for found in models_below(walk, snapshot, origin, 3):
                place = os.path.relpath(found.path, snapshot)
                if place not in given:
                    given.add(place)
                    deeper = found.path.is_dir() and place != "."
                    yield published(found, f"{repository}/{place}" if deeper else repository)


def published_models(walk: Walk, folder: Path, origin: str, depth: int) -> Iterator[Found]:
    """What lies as publisher/repository/file; a file elsewhere goes by its own name."""
    for found in models_below(walk, folder, origin, depth):
        place = found.path if found.path.is_dir() else found.path.parent
        parts = place.relative_to(folder).parts
        yield published(found, "/".join(parts)) if len(parts) == 2 else found


def published(found: Found, repository: str) -> Found:
    """Named after its repository, a GGUF file with its quantisation behind a colon: `org/name:Q4_K_M`."""
    short = repository.rpartition("/")[2]
    if found.path.is_dir():
        return replace(found, name=repository, names=frozenset({repository, short}))
    kind = label(found.name) or found.name
    names = found.names | {f"{repository}:{kind}", f"{short}:{kind}", repository, short}
    return replace(found, name=f"{repository}:{kind}", names=names)


def llama_cpp_models(walk: Walk, folder: Path, origin: str) -> Iterator[Found]:
    """Files that lie side by side as `org_name_file.gguf`; `manifest=org=name=tag.json` tells where to cut."""
    inside = walk.enter(folder)
    walk.seen.clear()  # newer versions keep the Hub's layout in the same folder, which is looked at next
    if inside is None:
        return
    names = [name.split("=") for name in inside[0] if name.startswith("manifest=") and name.endswith(".json")]
    repositories = {f"{parts[1]}_{parts[2]}_": f"{parts[1]}/{parts[2]}" for parts in names if len(parts) >= 4}
    for found in gguf_models(folder, inside[0], origin):
        prefix = max((p for p in repositories if found.name.startswith(p)), key=len, default="")
        if prefix:
            own = found.name.removeprefix(prefix)
            found = published(replace(found, names=found.names | {own, f"{own}.gguf"}), repositories[prefix])
        yield found


def ollama_models(walk: Walk, folder: Path, origin: str) -> Iterator[Found]:
    """What ollama's manifests name: `manifests/<registry>/<namespace>/<name>/<tag>`, JSON with layers by media type."""
    given: set[str] = set()
    for top in MANIFESTS:
        for parts, manifest in _manifests(walk, folder / top):
            name, *others = _ollama_names(*parts)
            if name not in given and (found := _layered(folder, manifest, name, origin)):
                given.add(name)
                yield replace(found, names=frozenset({name, *others}))


def _snapshots(walk: Walk, repository: Path) -> list[Path]:
    """Folders of revisions: the one that `main` is at, then the newest."""
    folder = repository / "snapshots"
    inside = walk.enter(folder)
    if inside is None:
        return []
    try:
        main = read_small_file(repository / "refs" / "main", 256).decode("ascii", "replace").strip()
    except FileFormatError:
        main = ""
    found = [folder / name for name in inside[1] if COMMIT.fullmatch(name)]
    return sorted(found, key=lambda path: (path.name != main, -_changed(path), path.name))


def _changed(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _manifests(walk: Walk, top: Path) -> Iterator[tuple[tuple[str, ...], Path]]:
    """(registry, namespace, name, tag) with the file; names may have more than one part between."""
    pending = [(top, 0)]
    while pending:
        folder, depth = pending.pop()
        inside = walk.enter(folder)
        if inside is None:
            continue
        if depth < 5:
            pending.extend((folder / name, depth + 1) for name in reversed(inside[1]))
        for tag in sorted(inside[0]) if depth >= 2 else ():
            yield (*folder.relative_to(top).parts, tag), folder / tag


def _ollama_names(registry: str, *parts: str) -> list[str]:
    """What ollama calls it, then what else means it: the tag `latest` may be left out."""
    *before, tag = parts
    usual = registry in REGISTRIES
    short = before[1:] if usual and before[0] == LIBRARY and len(before) > 1 else before
    paths = ["/".join(short if usual else [registry, *short])]
    paths += ["/".join(before), "/".join([registry, *before])] if usual else []
    names = [f"{path}:{tag}" for path in paths]
    return names + (paths if tag == "latest" else [])


def _layered(folder: Path, manifest: Path, name: str, origin: str) -> Found | None:
    """The blob of the layer that is the model; None for a manifest that names none which is there."""
    layers = json_object(manifest).get("layers")
    records = [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []
    model = next((layer for layer in records if layer.get("mediaType") == MODEL_LAYER), {})
    digest = DIGEST.fullmatch(str(model.get("digest", "")))
    if not digest:
        return None
    for blob in (f"sha256-{digest[1]}", f"sha256:{digest[1]}"):
        path = folder / "blobs" / blob
        try:
            file = os.stat(path)
        except OSError:
            continue
        if not path.is_file():
            return None
        adapted = any(layer.get("mediaType") == ADAPTER_LAYER for layer in records)
        size = model.get("size")
        note = "without its adapter" if adapted else ""
        if isinstance(size, int) and file.st_size < size:
            note = f"{file.st_size:,} of {size:,} bytes are there"
        return Found(name, path, origin, file.st_size, (file.st_dev, file.st_ino), frozenset({name}), note)
    return None
