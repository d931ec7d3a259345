"""What a model that was found is, from its header alone: sizes, parameters, whether it can be run and fits; opens no
weight, and no model makes it raise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from localmoe.discovery.folders import Found
from localmoe.errors import LocalMoeError, UnsupportedError
from localmoe.experts.residence import SHARE
from localmoe.experts.sizes import Sizes
from localmoe.inspection import parameters, readable_count
from localmoe.loader.locate import open_source
from localmoe.loader.source import Source
from localmoe.memory import readable_size
from localmoe.network import DEFAULT_CONTEXT, Network

Kind = Literal["model", "unsupported", "broken", "adapter", "projector", "importance matrix", "embedding", "vocabulary"]
# general.file_type of GGUF files: llama.cpp's llama.h, llama_ftype.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip
TYPES: Mapping[object, Kind] = {
    "adapter": "adapter", "mmproj": "projector", "imatrix": "importance matrix", "vocab": "vocabulary",
}  # fmt: skip
# Architectures of encoders, whose vectors no chat can use (gguf's constants).
ENCODERS = frozenset(
    "bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 modern-bert eurobert gemma-embedding t5encoder "
    "llama-embed wavtokenizer-dec".split()
)


@dataclass(frozen=True, slots=True)
class Described:
    """Sizes in bytes, None where nobody knows. `needs`: to have all in memory, at the context of a usual chat;
    `least`: to run it with experts in slots, None for a model without any. `why` it cannot be run, or empty."""

    found: Found
    kind: Kind
    architecture: str = ""
    quantisation: str = ""
    parameters: int | None = None
    active: int | None = None
    trained_context: int | None = None
    needs: int | None = None
    least: int | None = None
    why: str = ""

    def fits(self, free: int) -> str:
        """In a word or two, whether it runs where so many bytes are free."""
        if self.kind != "model" or self.needs is None:
            return "not supported" if self.kind == "unsupported" else self.kind
        budget = int(SHARE * free)
        if self.needs <= budget:
            return "fits"
        return "slots" if self.least is not None and self.least <= budget else "too large"

    def verdict(self, free: int) -> str:
        """The same as a line, with the numbers."""
        if self.kind != "model" or self.needs is None:
            return self.why or f"{self.kind}, no model that could talk"
        sizes = f"{readable_size(self.needs)} needed, {readable_size(free)} free"
        if (word := self.fits(free)) == "slots":
            return f"larger than memory ({sizes}): experts are read into slots as they are chosen"
        return f"fits: {sizes}" if word == "fits" else f"does not fit: {sizes}"

    @property
    def size(self) -> str:
        """Parameters, with the active ones where they are fewer."""
        if self.parameters is None:
            return ""
        whole = readable_count(self.parameters)
        return whole if self.active in (None, self.parameters) else f"{whole}/{readable_count(self.active or 0)}"


def describe(found: Found) -> Described:
    """What the header says; a file that is broken or unknown is described as that."""
    try:
        source = open_source(found.path, words=False)
    except (LocalMoeError, OSError) as error:
        return Described(found, _refused(error), why=found.note or str(error))
    metadata = source.metadata
    architecture = str(metadata.get("general.architecture", ""))
    kind = _kind(source, architecture)
    quantisation = _quantisation(source) if kind not in ("vocabulary", "broken") else ""
    if kind != "model":
        return Described(found, kind, architecture, quantisation)
    try:
        network = Network(source)
        total, active = parameters(network)
        context = min(network.trained_context, DEFAULT_CONTEXT)
        sizes, beside = Sizes.of(network.tensors, network.program(1)), network.needed(context, "f16").resident
    except (LocalMoeError, OSError) as error:
        counted = None if source.kind != "gguf" else sum(weight.elements for weight in source.tensors.values())
        return Described(found, _refused(error), architecture, quantisation, counted, why=str(error))
    least = sizes.least + beside if sizes.layers else None
    return Described(
        found, "model", architecture, quantisation, total, active, network.trained_context,
        sizes.weights + beside, least,
    )  # fmt: skip


def _refused(error: Exception) -> Kind:
    return "unsupported" if isinstance(error, UnsupportedError) else "broken"


def _kind(source: Source, architecture: str) -> Kind:
    said = source.metadata.get("general.type")
    if isinstance(said, str) and said in TYPES:
        return TYPES[said]
    if architecture == "clip":
        return "projector"
    if architecture == "imatrix":
        return "importance matrix"
    if architecture in ENCODERS or f"{architecture}.pooling_type" in source.metadata:
        return "embedding"
    folder = source.tokenizer_folder
    if folder is not None and (folder / "modules.json").is_file():  # of sentence-transformers
        return "embedding"
    return "model" if len(source.tensors) else "vocabulary"


def _quantisation(source: Source) -> str:
    """What the file says of itself, else the format that most bytes have."""
    said: Any = source.metadata.get("general.file_type")
    if isinstance(said, int) and said in FILE_TYPES:
        return FILE_TYPES[said]
    try:
        nbytes: Counter[str] = Counter()
        for weight in source.tensors.values():
            nbytes[weight.format.name] += weight.nbytes
    except (LocalMoeError, OSError):
        return ""
    return nbytes.most_common(1)[0][0] if nbytes else ""
