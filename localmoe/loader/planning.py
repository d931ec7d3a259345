"""A model planned from its settings alone: config.json or params.json, with the names of tensors where an index lists
them; must not know any architecture.

A family asks for its tensors by name and shape, as it always does; here each is made as it is asked for, without bytes.
So a plan says what the family's own code says, and nothing twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localmoe.errors import FileFormatError
from localmoe.formats import BF16, F8_E4M3, F16, F32, FORMATS, Bytes, Format, Scales, Weight
from localmoe.loader.config_json import Makers
from localmoe.loader.huggingface import SMALL, gguf_names
from localmoe.loader.huggingface_config import FAMILIES, config_keys, quantization_of, text_settings
from localmoe.loader.mistral import FILES, PARAMS, hugging_face, renamed
from localmoe.loader.quantised import quantised_names
from localmoe.loader.safetensors import MATRIX_LIMIT, read_json, weight_map
from localmoe.loader.source import PlannedTensors, Source, require_file

FLOATS = {"float32": F32, "float16": F16, "bfloat16": BF16}
# What no quantisation of a folder touches: embeddings, output and routers.
KEPT = ("token_embd.weight", "output.weight", "position_embd.weight")
ROUTER = "ffn_gate_inp.weight"
SIGMOID = 2
# Families whose embedding is the output where config.json is silent, and those that have biases then.
TIED = frozenset({"gemma2", "gemma3_text", "cohere", "cohere2", "gpt2", "starcoder2", "smollm3", "granite"})
BIASED = frozenset({"starcoder2"})
NO_BYTE = np.zeros(1, np.uint8)


@dataclass(frozen=True)
class Storage:
    """How a folder's matrices are stored: `packed` those of layers (of experts alone where `experts_only`), in tiles of
    one scale where there are tiles; `floats` all else."""

    floats: Format
    packed: Format
    tile: tuple[int, int] | None = None
    experts_only: bool = False

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """A tensor of this name without bytes: its slabs have a size, and no memory behind them."""
        kept = name in KEPT or name.endswith(ROUTER) or (self.experts_only and "_exps" not in name)
        plain = len(shape) < 2 or kept
        format = self.floats if plain or shape[-1] % self.packed.elements else self.packed
        if name.endswith("exp_probs_b.bias"):
            format = F32
        matrices, rows = (shape[0], shape[-2]) if len(shape) > 2 else (1, shape[0] if len(shape) > 1 else 1)
        slab: Bytes = np.broadcast_to(NO_BYTE, rows * format.row_nbytes(shape[-1]))
        scales: tuple[Scales, ...] = ()
        if format == F8_E4M3:
            height, width = self.tile or (rows, shape[-1])
            grid = (-(-rows // height), -(-shape[-1] // width))
            scales = (Scales(np.broadcast_to(np.zeros(1, np.float32), grid), height, width),) * matrices
        return Weight(name, shape, format, (slab,) * matrices, scales)


def is_plan(path: Path) -> bool:
    """Whether there are settings and no weights: a .json file, or a folder without any model file."""
    if path.suffix == ".json" and not path.is_dir():
        return True
    files = ("config.json", PARAMS)
    return any((path / f).is_file() for f in files) and not any(
        next(path.glob(f"*{suffix}"), None) for suffix in (".safetensors", ".gguf")
    )


def open_plan(path: Path) -> Source:
    """A Source without bytes from config.json, Mistral's params.json, or a folder that holds one, and perhaps an index.

    Raises: FileFormatError, UnsupportedError, as opening the folder itself would.
    """
    folder, file = (path, None) if path.is_dir() else (path.parent, path)
    native = file.name == PARAMS if file else not (folder / "config.json").is_file()
    file = file or folder / (PARAMS if native else "config.json")
    require_file(file)
    found, origin = read_json(file, SMALL), str(file)
    config: Mapping[str, Any] = text_settings(found)
    more: Mapping[str, Any] = {}
    if native or ("model_type" not in found and "n_layers" in found):
        config, more = hugging_face(found, origin)
    architecture, keys, tied = config_keys(config, origin)
    _check_sizes(keys, architecture, origin)
    family, plain = FAMILIES[config["model_type"]], {k.removeprefix(f"{architecture}."): v for k, v in keys.items()}
    made: Makers = {}
    if family.rewrite:
        family.rewrite(made, plain)  # it may make tensors of settings
    index = folder / f"{FILES if native else 'model'}.safetensors.index.json"
    if path.is_dir() and os.path.isfile(index):
        names = quantised_names(weight_map(index), quantization_of(config, origin))
        named = [renamed(name) for name in names] if native else names
        known: frozenset[str] | None = gguf_names(named, architecture, plain["block_count"])
        if tied and known:
            known -= {"output.weight"}
    else:
        known = None
    holds = known.__contains__ if known is not None else _guess(config, plain, tied)
    tensors = PlannedTensors(_storage(config, origin).weight, holds, made, known or frozenset())
    metadata = {"general.architecture": architecture, "general.name": folder.resolve().name, **keys}
    metadata |= {f"{architecture}.{name}": value for name, value in more.items()}
    return Source(path, "mistral" if native else "folder", metadata, tensors, 0)


def _check_sizes(keys: Mapping[str, Any], architecture: str, origin: str) -> None:
    """Counts that are gone through one by one, and that no file's size bounds."""
    for name in ("expert_count", "attention.head_count"):
        if keys.get(f"{architecture}.{name}", 0) > MATRIX_LIMIT:
            raise FileFormatError(f"{origin}: {name} is {keys[f'{architecture}.{name}']}, at most {MATRIX_LIMIT}")


def _storage(config: Mapping[str, Any], origin: str) -> Storage:
    """Of what torch_dtype and quantization_config say; 16 bits where they say nothing."""
    floats = FLOATS.get(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch."))
    if floats is None:
        raise FileFormatError(
            f"{origin}: torch_dtype is {config.get('torch_dtype')!r:.40}, expected one of {[*FLOATS]}"
        )
    quantization = quantization_of(config, origin)
    if quantization is None:
        own = config.get("quantization_config") is not None  # gpt-oss's, which its family sees to
        return Storage(floats, FORMATS["MXFP4"], experts_only=True) if own else Storage(floats, floats)
    if quantization.form == "float8":
        return Storage(floats, F8_E4M3, quantization.tile)
    sym = config["quantization_config"].get("sym") is True if quantization.form == "gptq" else quantization.symmetric
    return Storage(floats, FORMATS["Q4_0" if sym else "Q4_1"])


def _guess(config: Mapping[str, Any], keys: Mapping[str, Any], tied: bool | None) -> Callable[[str], bool]:
    """Whether a file of these settings has an optional tensor. Where it errs it is by biases and norms of heads."""
    kind = config["model_type"]
    output = not (tied if tied is not None else kind in TIED)
    bias = config.get("attention_bias", config.get("use_bias", kind in BIASED))
    corrected = keys.get("expert_gating_func") == SIGMOID or ("moe" in kind and kind.startswith("ernie"))

    def holds(name: str) -> bool:
        last = name.removeprefix("blk.").split(".")[-2]
        if name == "output.weight":
            return output
        if name.endswith("exp_probs_b.bias"):
            return corrected
        if name.endswith(".bias"):
            return bool(bias)
        if last in ("attn_q_norm", "attn_k_norm"):
            return bool(config.get("use_qk_norm", False))
        return last.endswith("_exps") and "gate_up" not in last

    return holds
