"""From what a person types (a file, a folder, or nothing) to an opened source; must not know what is inside one."""

from __future__ import annotations

import os
from pathlib import Path

from localmoe.errors import FileFormatError
from localmoe.loader.gguf import SPLIT_NAME, is_gguf, open_gguf
from localmoe.loader.source import Source, listed, require_file

BUNDLED = "localmoe-demo.gguf"
POSSIBLE = "a GGUF file, or a folder with config.json (or Mistral's params.json) and safetensors"


def open_source(path: str | Path, *, words: bool = True) -> Source:
    """Opens a GGUF file (any part of a split one), a .safetensors file's folder, or a folder that holds one model.
    Without `words`, the vocabulary of a GGUF file named by itself is counted and not read.

    Raises: FileFormatError, UnsupportedError.
    """
    path = Path(os.path.expanduser(path))
    if os.path.isdir(path):
        return _open_directory(path)
    require_file(path)
    if path.suffix == ".safetensors" and not is_gguf(path):
        if not os.path.isfile(path.parent / "config.json"):
            raise FileFormatError(f"{path}: safetensors need config.json beside them, which is not in {path.parent}")
        return _open_folder(path.parent)
    return open_gguf(path, words=words)


def _open_directory(folder: Path) -> Source:
    """Hugging Face's layout goes first: such folders may hold conversions as well."""
    if (folder / "params.json").is_file():
        from localmoe.loader.mistral import is_native, open_native  # late, as _open_folder is

        if is_native(folder):
            return open_native(folder)
    configured = os.path.isfile(folder / "config.json")
    if configured and next(folder.glob("*.safetensors"), None):
        return _open_folder(folder)
    models = one_per_model(sorted(folder.glob("*.gguf")))
    if len(models) == 1:
        return open_gguf(models[0])
    if models:
        names = listed([model.name for model in models])
        raise FileFormatError(f"{folder}: holds {len(models)} models; name one of {names}")
    if configured:
        raise FileFormatError(f"{folder}: config.json is there, but no .safetensors file; expected {POSSIBLE}")
    raise FileFormatError(f"{folder}: holds no model; expected {POSSIBLE}")


def _open_folder(folder: Path) -> Source:
    from localmoe.loader.huggingface import open_folder  # not needed for most models: a start should not wait for it

    return open_folder(folder)


def one_per_model(files: list[Path]) -> list[Path]:
    """GGUF files, split ones counted once (by the first part that is there)."""
    seen: dict[tuple[str, str], Path] = {}
    for file in files:
        match = SPLIT_NAME.fullmatch(file.name)
        seen.setdefault((match["stem"], match["count"]) if match else (file.name, ""), file)
    return list(seen.values())


def bundled() -> Path:
    """The demo model: in models/ beside the package in the source tree, in data/ inside it where it was installed.

    Raises: FileFormatError where this installation has none.
    """
    package = Path(__file__).resolve().parent.parent
    for place in (package.parent / "models" / BUNDLED, package / "data" / BUNDLED):
        if place.is_file():
            return place
    raise FileFormatError(f"the bundled model {BUNDLED} is not part of this installation; name a model: {POSSIBLE}")
