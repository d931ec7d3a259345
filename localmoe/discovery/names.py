"""From what a person types to one model's path: a path, or a name of a model that was found; opens no model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from localmoe.discovery.folders import Found
from localmoe.discovery.places import Place
from localmoe.discovery.search import find_models
from localmoe.errors import FileFormatError
from localmoe.loader.source import listed, shown

SUFFIXES = (".gguf", ".safetensors", ".json")
LONG_PATH = 160  # characters of one in a message


def resolve(name: str, places: Sequence[Place] | None = None) -> Path:
    """The path of a model by its path, or by its name, the beginning or a part of its name.

    What exists wins. What looks like a path and leads nowhere is given back as it is, for opening to refuse it. Raises
    FileFormatError: several models of that name, none (with the nearest names), or none at that path while one of its
    name lies elsewhere.
    """
    path = Path(os.path.expanduser(name))
    if _exists(path):
        return path
    models = find_models(places)
    if found := _matching(name, models):
        return _only(name, found).path
    if looks_like_path(name):
        beside = [model for model in models if path.name in model.names or path.name == model.path.name]
        if beside:
            raise FileFormatError(f"{path}: no such file; {_shown_path(beside[0].path)} is a model of that name")
        return path
    near = _nearest(name, models)
    hint = f"the nearest are {listed([shown(n) for n in near])}" if near else "`localmoe models` lists those that are"
    raise FileFormatError(f"{shown(name)} is neither a file nor a model that is known here; {hint}")


def looks_like_path(name: str) -> bool:
    """Whether nobody would give such a name to a model that he means by name alone."""
    separators = (os.sep, os.altsep or os.sep)
    rooted = name.startswith((".", "~", *separators)) or name.endswith(separators)
    return rooted or name.lower().endswith(SUFFIXES) or (name.count("/") > 1 and ":" not in name)


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):
        return False


def _matching(name: str, models: Sequence[Found]) -> list[Found]:
    """Those that `name` means at the first of these levels at which it means any: as it is, in any case, as the
    beginning of a name, as a part of one."""
    small = name.lower()
    levels: tuple[Callable[[set[str]], bool], ...] = (
        lambda known: name in known,
        lambda known: small in {n.lower() for n in known},
        lambda known: any(n.lower().startswith(small) for n in known),
        lambda known: any(small in n.lower() for n in known),
    )
    if not small.strip():
        return []
    for fits in levels:
        if found := [model for model in models if fits({model.name, *model.names})]:
            return found
    return []


def _nearest(name: str, models: Sequence[Found]) -> list[str]:
    """Names of up to three models that begin nearly so."""
    begun = {known.lower()[: len(name) + 1]: model.name for model in models for known in (model.name, *model.names)}
    return list(dict.fromkeys(begun[near] for near in get_close_matches(name.lower(), begun, n=3, cutoff=0.6)))


def _only(name: str, found: list[Found]) -> Found:
    if len(found) == 1:
        return found[0]
    names = [model.name for model in found]
    told = [shown(n) if names.count(n) == 1 else _shown_path(m.path) for n, m in zip(names, found, strict=True)]
    raise FileFormatError(f"{shown(name)} may be any of {len(found)} models: {listed(told)}")


def _shown_path(path: Path) -> str:
    """Its end, by which files of one name differ, where it is too long for a message."""
    text = str(path)
    return shown(text if len(text) <= LONG_PATH else "…" + text[1 - LONG_PATH :], 4 * LONG_PATH)
