"""Where models are kept on this machine, by us and by other programs; must not know what lies there.

Conventions: the Hub's local cache (huggingface.co/docs/hub/local-cache), ollama (docs/faq, "where are models stored"),
LM Studio (`downloadsFolder` of its settings), llama.cpp (common/: LLAMA_CACHE, which newer versions fill as the Hub's).
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from localmoe.errors import FileFormatError
from localmoe.loader.locate import bundled
from localmoe.loader.source import read_small_file

Layout = Literal["folder", "published", "Hugging Face", "ollama", "llama.cpp"]
JSON_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """A folder, how models lie in it, and what that is called: `title` is for people.

    "folder": files and folders, named as they are; "published": publisher/repository/file, as LM Studio keeps them.
    """

    title: str
    path: Path
    layout: Layout
    depth: int = 3
    entries: int = 20_000  # that are looked at; a folder of models has some dozens


def models_folder() -> Path:
    """The user's own models: $LOCALMOE_MODELS, else localmoe/models of the data folder (XDG; %LOCALAPPDATA%)."""
    if chosen := os.environ.get("LOCALMOE_MODELS"):
        return Path(chosen).expanduser()
    named = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_DATA_HOME")
    return (Path(named) if named else _home() / ".local" / "share") / "localmoe" / "models"


def usual_places() -> list[Place]:
    """Every place that is looked at, whether it is there or not; an earlier one gives a model its name."""
    return [
        Place("here", Path(), "folder", 2, 4000),
        Place("models", Path("models"), "folder"),
        *_bundled(),
        Place("models folder", models_folder(), "folder"),
        Place("Hugging Face", _huggingface(), "Hugging Face"),
        *(Place("ollama", path, "ollama") for path in _ollama()),
        *(Place("LM Studio", path, "published") for path in _lm_studio()),
        Place("llama.cpp", _llama_cpp(), "llama.cpp"),
        Place("llama.cpp", _llama_cpp(), "Hugging Face"),
    ]


def json_object(path: Path) -> dict[str, Any]:
    """A small JSON object; empty for what is missing, too long, or anything else."""
    try:
        found = json.loads(read_small_file(path, JSON_LIMIT))
    except (FileFormatError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _bundled() -> list[Place]:
    try:
        return [Place("bundled", bundled().parent, "folder", 1)]
    except FileFormatError:
        return []


def _home() -> Path:
    """The home folder; the current one for a user who has none."""
    try:
        return Path.home()
    except RuntimeError:
        return Path()


def _named(*variables: str) -> Path | None:
    found = next((value for name in variables if (value := os.environ.get(name))), None)
    return Path(found).expanduser() if found else None


def _cache_root() -> Path:
    return _named("XDG_CACHE_HOME") or _home() / ".cache"


def _huggingface() -> Path:
    direct = _named("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    return direct or (_named("HF_HOME") or _cache_root() / "huggingface") / "hub"


def _ollama() -> list[Path]:
    """The user's, then that of the service, which on Linux has a user of its own."""
    chosen = _named("OLLAMA_MODELS")
    return [chosen] if chosen else [_home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def _lm_studio() -> list[Path]:
    """Folders of models that LM Studio keeps, the one that its settings name first."""
    pointer = _home() / ".lmstudio-home-pointer"
    homes = [_home() / ".lmstudio", _cache_root() / "lm-studio"]
    with suppress(FileFormatError, UnicodeDecodeError):
        homes.insert(0, Path(read_small_file(pointer, 4096).decode().strip()))
    chosen = [json_object(home / "settings.json").get("downloadsFolder") for home in homes]
    named = [Path(folder) for folder in chosen if isinstance(folder, str) and os.path.isabs(folder)]
    return list(dict.fromkeys([*named, *(home / "models" for home in homes)]))


def _llama_cpp() -> Path:
    if chosen := _named("LLAMA_CACHE"):
        return chosen
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "llama.cpp"
    if os.name == "nt":
        return (_named("LOCALAPPDATA") or _home()) / "llama.cpp"
    return _cache_root() / "llama.cpp"
