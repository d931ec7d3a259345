"""`localmoe convert`: a model of any form here, written as one GGUF file of a chosen type; prints nothing.

Memory stays bounded by one tensor and the pieces under way: matrices are read, encoded and written in turn.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from localmoe.conversion.gguf_file import (
    file_nbytes,
    header_bytes,
    require_length,
    require_place,
    require_space,
    stored_values,
    typed,
    whole_file,
    write_padding,
)
from localmoe.conversion.tokenizer_keys import tokenizer_keys
from localmoe.kernels.program import Progress
from localmoe.loader.locate import open_source
from localmoe.loader.source import Source
from localmoe.memory import readable_size
from localmoe.network import Network
from localmoe.quantisation.file_types import file_type
from localmoe.quantisation.gguf_form import kept_names
from localmoe.quantisation.planning import Plan, plan
from localmoe.quantisation.quantiser import Quantiser
from localmoe.tokenizer import Tokenizer

QUANTISATION_VERSION = 2  # of ggml: general.quantization_version
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
NAMED_TEMPLATE = re.compile(r"tokenizer\.chat_template\.(?P<name>.+)")


@dataclass(frozen=True, slots=True)
class Written:
    """What a conversion came to."""

    path: Path
    nbytes: int
    weights: int
    weights_nbytes: int
    seconds: float
    left_out: int
    has_tokenizer: bool

    @property
    def summary(self) -> str:
        """Size, bits per weight, seconds, in one line."""
        bits = f"{8 * self.weights_nbytes / self.weights:.2f} bits per weight"
        speed = f"{self.weights / 1e6 / max(self.seconds, 1e-9):.0f} M weights/s"
        left_out = f"; {self.left_out} tensors left out (vision, audio or prediction layers)" if self.left_out else ""
        mute = "" if self.has_tokenizer else "; the model has no tokenizer, so that nobody can chat with the file"
        return f"{self.path}: {readable_size(self.nbytes)}, {bits}, {self.seconds:.1f} s ({speed}){left_out}{mute}"


def convert(
    model: Path,
    path: Path,
    type: str,
    *,
    threads: int | None = None,
    force: bool = False,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write `model`, a folder or a GGUF file, to `path` as `type`. `progress` hears of weights done and their rate.

    Raises: SettingError (type, place, too little space), UnsupportedError (what a GGUF file cannot say, or weights that
    are quantised already), FileFormatError (broken files, weights that are not finite).
    """
    started = time.monotonic()
    kind = file_type(type)
    source = open_source(model)
    require_place(path, _files(source), force=force)
    planned = plan(source, kind, requantise=allow_requantize)
    if source.kind != "gguf":
        Network(planned.unread())  # everything that would be refused when the file is opened is refused now
    values = _values(source, planned)
    tensors = list(planned.tensors.values())
    header = header_bytes(values, tensors)
    nbytes = file_nbytes(header, tensors)
    require_space(path, nbytes)
    with Quantiser(threads, progress) as quantiser, whole_file(path, force=force) as file:
        file.write(header)
        _write_tensors(planned, quantiser, file, progress)
    left_out = 0 if source.kind == "gguf" else len(source.tensors) - len(kept_names(source))
    speaks = "tokenizer.ggml.tokens" in values
    return Written(path, nbytes, planned.elements, planned.nbytes, time.monotonic() - started, left_out, speaks)


def _files(source: Source) -> Iterator[Path]:
    """What must not be overwritten."""
    if source.path.is_dir():
        yield from (file for file in source.path.iterdir() if file.suffix != ".gguf")
    else:
        yield source.path
        yield from source.path.parent.glob("*.gguf") if source.metadata.get("split.count", 1) != 1 else ()


def _write_tensors(planned: Plan, quantiser: Quantiser, file: BinaryIO, progress: Progress | None) -> None:
    done, started = 0, time.monotonic()
    for name, tensor in planned.tensors.items():
        written = 0
        for count, piece in quantiser.pieces(planned.form.tensors[name], tensor.wanted):
            file.write(piece.data)
            written, done = written + piece.size, done + count
            if progress:
                speed = done / 1e6 / max(time.monotonic() - started, 1e-9)
                progress(f"writing {planned.kind.name}, {speed:.0f} M weights/s", done, planned.elements)
        require_length(tensor, written)
        write_padding(file, written)


def _values(source: Source, planned: Plan) -> dict[str, bytes]:
    """The file's metadata: a folder's keys and its tokenizer; a GGUF file's own, bit by bit."""
    kind = {
        "general.file_type": typed(planned.kind.id),
        "general.quantization_version": typed(QUANTISATION_VERSION),
    }
    if source.kind == "gguf":
        stored = stored_values(_first_part(source))
        changed = ("general.alignment", *(key for key in stored if key.startswith("split.")))
        return {**{key: value for key, value in stored.items() if key not in changed}, **kind}
    folder = source.tokenizer_folder
    assert folder is not None
    architecture = source.metadata["general.architecture"]
    rows = planned.tensors["token_embd.weight"].shape[0]
    keys: dict[str, Any] = {"general.architecture": architecture, "general.type": "model", **planned.form.metadata}
    if any((folder / file).exists() for file in TOKENIZER_FILES):
        keys |= tokenizer_keys(Tokenizer.from_folder(folder), folder, rows, architecture)
    else:
        keys |= {"tokenizer.ggml.model": "none", f"{architecture}.vocab_size": rows}
    if named := [match["name"] for key in keys if (match := NAMED_TEMPLATE.fullmatch(key))]:
        keys["tokenizer.chat_templates"] = named
    return {**{key: typed(value) for key, value in keys.items()}, **kind}


def _first_part(source: Source) -> Path:
    """The part of a split file that has the metadata."""
    count = source.metadata.get("split.count", 1)
    if count == 1:
        return source.path
    return source.path.with_name(re.sub(r"-\d{5}-of-(\d{5})\.gguf$", r"-00001-of-\1.gguf", source.path.name))
