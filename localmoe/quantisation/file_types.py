"""Types of GGUF files (q4_K_M, q8_0, f16 …): which format each tensor gets; knows names and sizes, reads no weight.

Names, ids and the choice are llama.cpp's (llama.h, llama_ftype; llama-quant.cpp), so that a file written here has the
same formats as one from llama-quantize: matrices to which errors matter most (output, v, down, first and last layers)
get more bits, norms, biases and routers are left alone, and rows of no whole block fall back to smaller blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from localmoe.errors import SettingError
from localmoe.formats import FORMATS, Format

# name: (general.file_type, format of most matrices)
_TABLE = {
    "f32": (0, "F32"), "f16": (1, "F16"), "bf16": (32, "BF16"), "q8_0": (7, "Q8_0"), "q4_0": (2, "Q4_0"),
    "q4_1": (3, "Q4_1"), "q5_0": (8, "Q5_0"), "q5_1": (9, "Q5_1"), "q2_K": (10, "Q2_K"),
    "q3_K_S": (11, "Q3_K"), "q3_K_M": (12, "Q3_K"), "q3_K_L": (13, "Q3_K"), "q4_K_S": (14, "Q4_K"),
    "q4_K_M": (15, "Q4_K"), "q5_K_S": (16, "Q5_K"), "q5_K_M": (17, "Q5_K"), "q6_K": (18, "Q6_K"),
}  # fmt: skip
_SHORT = {"q3_k": "q3_K_M", "q4_k": "q4_K_M", "q5_k": "q5_K_M"}
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# Small and delicate: left alone whatever the type.
_KEPT = re.compile(
    r".*(_norm|ffn_gate_inp|ffn_gate_tid2eid|ssm_conv1d|shortconv\.conv|attn_rel_b|indexer\.[kq]_proj)\.weight"
    r"|(position_embd|token_types|rope_.*)\.weight|.*(altup|laurel|per_layer_model_proj|time_mix_).*"
)
_VALUES = re.compile(r".*\.attn_(v|qkv|kv_b)\.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class FileType:
    """`name` as llama.cpp writes it, `id` for general.file_type, `format` of most matrices."""

    name: str
    id: int
    format: Format


FILE_TYPES = {name: FileType(name, id, FORMATS[format]) for name, (id, format) in _TABLE.items()}


def file_type(name: str) -> FileType:
    """The type of that name, in any case; "q4_k" means q4_K_M. Raises SettingError with the names that there are."""
    wanted = _SHORT.get(name.lower(), name).lower()
    for known, found in FILE_TYPES.items():
        if known.lower() == wanted:
            return found
    raise SettingError(f"file type {name!r} is not known; possible are {', '.join(FILE_TYPES)}")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the choice depends on beside names and shapes. `grouping`: query heads for each key head."""

    architecture: str
    blocks: int
    experts: int
    grouping: int

    @property
    def is_70b(self) -> bool:
        """Llama 2 and 3, and Qwen 2, of 80 layers: eight heads share a v matrix, so that bits for it cost little."""
        grouped = self.architecture == "qwen2" or (self.architecture == "llama" and self.grouping > 1)
        return grouped and self.blocks == 80


def formats(kind: FileType, shapes: Mapping[str, tuple[int, ...]], sizes: Sizes) -> dict[str, Format]:
    """The format of each tensor that the type concerns (not norms, biases, routers), by name; shapes are numpy's."""
    values = sorted((name for name in shapes if _VALUES.fullmatch(name)), key=_layer)
    places = {name: place for place, name in enumerate(values)}
    tied = "output.weight" not in shapes
    found: dict[str, Format] = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or not name.endswith("weight") or _KEPT.fullmatch(name):
            continue
        if kind.format.elements == 1:
            found[name] = kind.format
        else:
            wanted = _wanted(kind, name, shape[-1], sizes, (places.get(name, 0), len(places)), tied)
            found[name] = _fitting(FORMATS[wanted], shape[-1])
    return found


def _wanted(kind: FileType, name: str, columns: int, sizes: Sizes, place: tuple[int, int], tied: bool) -> str:
    """The name of the format, before a look at the length of the rows."""
    usual, type = kind.format.name, kind.name
    part = name.removesuffix(".weight").rpartition(".")[2]
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q8_0" if columns % kind.format.elements or usual == "Q8_0" else "Q6_K"
    if _VALUES.fullmatch(name):
        return _for_values(kind, sizes, *place)
    if part == "attn_k" and sizes.experts == 8:
        return "Q8_0"
    if "ffn_down" in name:
        return _for_down(kind, _layer(name), sizes.blocks)
    if part == "attn_output":
        few = sizes.experts == 8
        if few and type in ("q2_K", "q3_K_S", "q3_K_M", "q4_K_S", "q4_K_M"):
            return "Q5_K"
        return usual if few else {"q2_K": "Q3_K", "q3_K_M": "Q4_K", "q3_K_L": "Q5_K"}.get(type, usual)
    return usual


def _for_values(kind: FileType, sizes: Sizes, place: int, count: int) -> str:
    """v, fused qkv and kv_b: the `place`-th of `count`."""
    type, wanted = kind.name, kind.format.name
    if type == "q2_K":
        wanted = "Q4_K" if sizes.grouping >= 4 else "Q3_K"
    elif type == "q3_K_M":
        wanted = "Q5_K" if place < 2 else "Q4_K"
    elif type == "q3_K_L" or (type == "q4_K_S" and place < 4):
        wanted = "Q5_K"
    elif type in ("q4_K_M", "q5_K_M") and _more_bits(place, count):
        wanted = "Q6_K"
    if sizes.is_70b and wanted in ("Q3_K", "Q4_K"):
        wanted = "Q5_K"
    return "Q8_0" if sizes.experts == 8 else wanted


def _for_down(kind: FileType, layer: int, layers: int) -> str:
    type, usual = kind.name, kind.format.name
    if type in ("q2_K", "q3_K_L"):
        return {"q2_K": "Q3_K", "q3_K_L": "Q5_K"}[type]
    if type == "q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if type == "q4_K_S" and layer < layers // 8:
        return "Q5_K"
    if type in ("q4_K_M", "q5_K_M") and _more_bits(layer, layers):
        return "Q6_K"
    return usual


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _fitting(wanted: Format, columns: int) -> Format:
    """The format, or one of smaller blocks that divide a row."""
    if columns % wanted.elements == 0:
        return wanted
    smaller = FORMATS[_FALLBACKS.get(wanted.name, wanted.name)]
    return smaller if columns % smaller.elements == 0 else FORMATS["F16"]


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else 0
