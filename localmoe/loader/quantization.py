"""config.json's quantization_config: how a folder's matrices are stored; knows no tensor and no architecture.

Everything that alters a weight's value is read or refused by name. How activations and the KV cache are to be rounded
is left out of account: here activations keep more than 8-bit floats hold, and the cache has a setting of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from localmoe.errors import UnsupportedError
from localmoe.loader.config_json import Settings
from localmoe.loader.source import shown

Form = Literal["float8", "packed", "gptq", "awq"]
WHOLE_ROW = -1
A_ROW = (1, (1 << 31) - 1)  # the tile of one scale a row


@dataclass(frozen=True, slots=True)
class Quantization:
    """`tile`: rows and columns that share a scale of 8-bit floats, where the scales' shape alone does not say it.
    `group`: columns that share a scale of 4-bit numbers. `symmetric`: their zero is 8. `zero_added`: what a stored zero
    lacks."""

    form: Form
    tile: tuple[int, int] | None = None
    group: int = WHOLE_ROW
    symmetric: bool = True
    zero_added: int = 0


def read_quantization(found: Any, origin: str) -> Quantization:
    """Raises UnsupportedError for a method or setting that is not implemented, FileFormatError for a broken one."""
    values = found if isinstance(found, dict) else {"quant_method": found}
    settings = Settings(values, f"{origin}: quantization_config")
    method = settings.take("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        possible = f"{', '.join(METHODS)}, or a GGUF file"
        raise UnsupportedError(f"{origin}: weights quantised by {shown(method)}; possible are {possible}")
    return METHODS[method](settings)


def _fp8(settings: Settings) -> Quantization:
    """DeepSeek's, transformers' and vLLM's: one scale a tile, or one a matrix."""
    settings.expect("fmt", "e4m3", "float8_e4m3fn")
    settings.expect("scale_fmt", "ue8m0", "float")
    settings.take("activation_scheme", "modules_to_not_convert", "ignored_layers", "dequantize", "kv_cache_scheme")
    tile = _tile(settings, "weight_block_size")
    settings.finish()
    return Quantization("float8", tile)


def _fbgemm(settings: Settings) -> Quantization:
    """Meta's: one scale a row."""
    settings.take("activation_scale_ub", "modules_to_not_convert")
    settings.finish()
    return Quantization("float8", A_ROW)


def _compressed(settings: Settings) -> Quantization:
    """vLLM's compressed-tensors: 8-bit floats, or 4-bit numbers in words of 32 bits; all groups of layers alike."""
    settings.expect("format", "float-quantized", "naive-quantized", "pack-quantized")
    settings.expect("quantization_status", "compressed", "frozen")
    settings.take("ignore", "kv_cache_scheme", "global_compression_ratio", "version")
    sparsity = settings.take("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(f"{settings.origin}: sparsity_config is {shown(sparsity)}; possible is format 'dense'")
    groups = settings.take("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise settings.wrong("config_groups", groups, "groups of layers")
    settings.finish()
    packed = settings.values.get("format") == "pack-quantized"
    read = [_group(settings, name, group, packed) for name, group in groups.items()]
    if any(other != read[0] for other in read):
        raise UnsupportedError(f"{settings.origin}: groups of layers that differ: {shown(list(groups))}")
    return read[0]


def _group(settings: Settings, name: str, group: Any, packed: bool) -> Quantization:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise settings.wrong(f"config_groups.{name}.weights", weights, "an object")
    inner = Settings(weights, f"{settings.origin}: {shown(name)}")
    _require(inner, "num_bits", 4 if packed else 8)
    _require(inner, "type", "int" if packed else "float")
    inner.expect("actorder", "weight", "static", False)  # others permute the columns
    inner.expect("dynamic", False)
    inner.take("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    symmetric = inner.flag("symmetric", True)
    strategy, tile = inner.take("strategy"), _tile(inner, "block_structure")
    size = inner.take("group_size")
    if strategy not in ("tensor", "channel", "block", "group", None) or (packed and strategy in ("tensor", "block")):
        raise UnsupportedError(f"{inner.origin}: strategy is {shown(strategy)}; possible are channel and group")
    if packed:
        found = Quantization("packed", group=_group_size(inner, size), symmetric=symmetric)
    else:
        inner.expect("symmetric", True)
        tile = {"channel": A_ROW, "group": (1, _group_size(inner, size))}.get(str(strategy), tile)
        found = Quantization("float8", tile)
    inner.finish()
    return found


def _gptq(settings: Settings) -> Quantization:
    """Zeros lack 1 in the first format. A real order of columns shows in g_idx, and is refused there."""
    _require(settings, "bits", 4)
    settings.expect("checkpoint_format", "gptq", "gptq_v2", "")
    settings.take("desc_act", "sym", "static_groups", "true_sequential", "damp_percent", "damp_auto_increment", "meta")
    settings.take("model_name_or_path", "model_file_base_name", "model_seqlen", "block_name_to_quantize", "backend")
    settings.take("modules_in_block_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id")
    settings.take("dataset", "tokenizer", "use_cuda_fp16", "exllama_config", "use_exllama", "disable_exllama")
    settings.take("max_input_length", "cache_block_outputs", "lm_head", "is_marlin_format", "pack_dtype", "quant_type")
    group = _group_size(settings, settings.take("group_size"))
    added = 0 if settings.values.get("checkpoint_format") == "gptq_v2" else 1
    settings.finish()
    return Quantization("gptq", group=group, symmetric=False, zero_added=added)


def _awq(settings: Settings) -> Quantization:
    _require(settings, "bits", 4)
    settings.expect("version", "gemm", "GEMM")
    settings.expect("zero_point", True)
    settings.take("modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse")
    settings.take("exllama_config")
    group = _group_size(settings, settings.take("group_size", "q_group_size"))
    settings.finish()
    return Quantization("awq", group=group, symmetric=False)


def _require(settings: Settings, name: str, value: Any) -> None:
    found = settings.take(name)
    if found != value:
        raise UnsupportedError(f"{settings.origin}: {name} is {shown(found)}; possible is {value!r}")


def _tile(settings: Settings, name: str) -> tuple[int, int] | None:
    found = settings.take(name)
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or any(type(n) is not int or not 0 < n < 1 << 31 for n in found):
        raise settings.wrong(name, found, "two whole numbers from 1")
    return found[0], found[1]


def _group_size(settings: Settings, found: Any) -> int:
    """GGUF's blocks have 32 columns: a group must be made of whole ones."""
    if found is None or found == WHOLE_ROW:
        return WHOLE_ROW
    if type(found) is not int or not 0 < found < 1 << 31:
        raise settings.wrong("group_size", found, "a whole number from 1, or -1")
    if found % 32 and settings.values.get("type") != "float":
        raise UnsupportedError(f"{settings.origin}: group_size is {found}; possible are multiples of 32, and -1")
    return found


METHODS = {"fp8": _fp8, "fbgemm_fp8": _fbgemm, "compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq}
