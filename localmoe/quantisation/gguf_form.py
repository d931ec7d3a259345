"""A Hugging Face folder in the form that llama.cpp wants of a GGUF file: keys, order of rows, tensors cut as there.

What our own reader of folders leaves to a family, because both forms can be run from where they lie: q and k in
adjacent rope pairs, kv_b apart, gate and up apart, value heads in turns, llama3's rope as divisors. Source: llama.cpp,
conversion/*.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from localmoe.arch.rope import Rope
from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.formats import F32, Weight
from localmoe.loader.checkpoint import PREDICTOR, SKIPPABLE
from localmoe.loader.config_json import Makers
from localmoe.loader.metadata import Metadata
from localmoe.loader.source import LazyWeights, Source, shown
from localmoe.quantisation.rearranging import (
    Order,
    from_array,
    is_planned,
    with_columns,
    with_rows,
    without_bytes,
    written_out,
)

# Architectures whose q and k rows a GGUF file has in adjacent pairs and a folder in halves.
PAIRED = frozenset({"llama", "deepseek", "granite", "granitemoe", "smollm3", "mistral3"})
DIVIDED = frozenset({"llama", "llama4"})  # those with a place for rope_freqs
LATENT = frozenset({"deepseek2", "mistral4", "deepseek32", "glm-dsa"})
TILED = frozenset({"qwen35", "qwen35moe"})  # value heads of delta nets take turns with key heads
HALVES = ("gate", "up")


def gguf_form(source: Source) -> Source:
    """The folder as a source of kind "gguf"; a GGUF file as it is. Tensors are still made when asked for.

    Raises UnsupportedError for a rope that GGUF files of the architecture cannot say.
    """
    if source.kind == "gguf":
        return source
    architecture = source.metadata["general.architecture"]
    keys = dict(source.metadata)
    makers: Makers = {name: partial(source.tensors.__getitem__, name) for name in kept_names(source)}
    if keys.get(f"{architecture}.rope.scaling.type") == "llama3":
        makers["rope_freqs.weight"] = partial(_divisors, _rope(source), "rope_freqs.weight")
        for key in ("type", "factor", "low_freq_factor", "high_freq_factor", "original_context_length"):
            keys.pop(f"{architecture}.rope.scaling.{key}", None)
    for factors in ("factors", "factors_short", "factors_long"):  # what is computed with stands in tensors
        keys.pop(f"{architecture}.rope.{factors}", None)
    _add_widths(keys, architecture)
    if architecture in PAIRED and not source.rope_permuted:
        _pair(makers, int(keys[f"{architecture}.attention.key_length"]))
    if architecture in LATENT:
        _cut_latent(makers, keys, architecture)
    if architecture in TILED:
        _tile_values(makers, keys, architecture)
    _part_gate_and_up(makers)
    for name in [name for name in makers if name.endswith("ffn_gate_inp_shexp.weight")]:
        makers[name] = partial(_flat, makers[name])
    return Source(source.path, "gguf", keys, LazyWeights(makers), source.nbytes, source.tokenizer_folder, source.files)


def _add_widths(keys: dict[str, Any], architecture: str) -> None:
    """Keys that say again what others imply, and without which llama.cpp does not open a file."""
    width = keys.get(f"{architecture}.expert_feed_forward_length")
    if width is not None:
        keys.setdefault(f"{architecture}.feed_forward_length", width)
    if architecture == "ernie4_5-moe" and (shared := keys.get(f"{architecture}.expert_shared_count")):
        keys.setdefault(f"{architecture}.expert_shared_feed_forward_length", width * shared)
    if architecture == "phi3":
        keys.setdefault(f"{architecture}.attention.sliding_window", 0)
    if architecture in TILED:  # of pictures, in frequencies: a third each for time, rows and columns, as released
        turning = keys[f"{architecture}.rope.dimension_count"] // 2
        keys.setdefault(f"{architecture}.rope.dimension_sections", [*((turning + i) // 3 for i in (2, 1, 0)), 0])


def kept_names(source: Source) -> list[str]:
    """Names without those that are skipped: vision towers, layers that predict further tokens."""
    predictors = tuple({match[1] for name in source.tensors if (match := PREDICTOR.fullmatch(name))})
    return [name for name in source.tensors if not SKIPPABLE.fullmatch(name) and not name.startswith(predictors)]


def _rope(source: Source) -> Rope:
    meta = Metadata(source.metadata, str(source.path))
    if meta.architecture not in DIVIDED:
        possible = f"possible for {', '.join(sorted(DIVIDED))}"
        raise UnsupportedError(
            f"{source.path}: rope_type llama3 has no form in a GGUF file of {meta.architecture}; {possible}"
        )
    return Rope.read(meta, meta.int("attention.key_length"))


def _divisors(rope: Rope, name: str) -> Weight:
    """One divisor for each frequency."""
    plain = replace(rope, scaling="none").table("pairs").inverse_frequencies
    return from_array(name, np.divide(plain, rope.table("pairs").inverse_frequencies, dtype=np.float32))


def _pair(makers: Makers, width: int) -> None:
    """Each head's rows i and i + width / 2 become neighbours."""
    for name in makers:
        if name.rpartition(".")[0].endswith((".attn_q", ".attn_k")):
            makers[name] = partial(_paired, makers[name], width)


def _paired(make: Callable[[], Weight], width: int) -> Weight:
    weight = make()
    rows = weight.shape[0]
    if rows % width or width % 2:
        raise FileFormatError(f"tensor {shown(weight.name)} has {rows} rows, expected heads of {width}")
    return with_rows(lambda: weight, np.arange(rows).reshape(-1, 2, width // 2).swapaxes(1, 2).reshape(-1))


def _tile_values(makers: Makers, keys: dict[str, Any], architecture: str) -> None:
    """Value heads of delta nets one of each key head, then the next of each: wherever they are rows, and in the columns
    of the output."""
    groups, heads, width, inner = (
        int(keys[f"{architecture}.ssm.{key}"]) for key in ("group_count", "time_step_rank", "state_size", "inner_size")
    )
    if heads % groups:
        raise FileFormatError(f"{heads} value heads of delta nets for {groups} key heads, expected a multiple of them")
    turns: Order = np.arange(heads).reshape(groups, -1).T.reshape(-1)
    values = (turns[:, None] * (inner // heads) + np.arange(inner // heads)).reshape(-1)
    channels = np.concatenate([np.arange(2 * groups * width), 2 * groups * width + values])
    orders = {
        "attn_qkv.weight": channels, "ssm_conv1d.weight": channels, "attn_gate.weight": values,
        "ssm_alpha.weight": turns, "ssm_beta.weight": turns, "ssm_a": turns, "ssm_dt.bias": turns,
    }  # fmt: skip
    for name in makers:
        part = name.split(".", 2)[-1]
        if part in orders:
            makers[name] = partial(with_rows, makers[name], orders[part])
        elif part == "ssm_out.weight":
            makers[name] = partial(with_columns, makers[name], turns, inner // heads)


def _cut_latent(makers: Makers, keys: dict[str, Any], architecture: str) -> None:
    """kv_b as k_b (heads, latent, nope) and v_b (heads, value, latent); the cache's widths as a single head's."""
    key = f"{architecture}.attention."
    heads, latent, rope = (
        keys[key + "head_count"],
        keys[key + "kv_lora_rank"],
        keys[f"{architecture}.rope.dimension_count"],
    )
    nope, value = keys[key + "key_length_mla"] - rope, keys[key + "value_length_mla"]
    keys |= {key + "head_count_kv": 1, key + "key_length": latent + rope, key + "value_length": latent}
    for name in [name for name in makers if name.endswith("attn_kv_b.weight")]:
        make = makers.pop(name)
        makers[name.replace("kv_b", "k_b")] = partial(_latent_part, make, heads, slice(nope), True)
        makers[name.replace("kv_b", "v_b")] = partial(_latent_part, make, heads, slice(nope, nope + value), False)


def _latent_part(make: Callable[[], Weight], heads: int, rows: slice, turned: bool) -> Weight:
    """Those rows of each head's matrix, transposed or not."""
    weight = make()
    name = weight.name.replace("kv_b", "k_b" if turned else "v_b")
    if is_planned(weight):
        height = rows.stop - (rows.start or 0)
        shape = (heads, weight.columns, height) if turned else (heads, height, weight.columns)
        return without_bytes(name, shape, F32 if weight.scales else weight.format)
    weight = written_out(weight)
    if weight.format.elements > 1:
        raise UnsupportedError(f"tensor {shown(weight.name)} is {weight.format.name}; to be cut it must be floats")
    (data,) = weight.slabs
    matrices = data.view(f"u{weight.format.nbytes}").reshape(heads, -1, weight.columns)[:, rows]
    part = np.ascontiguousarray(matrices.swapaxes(1, 2) if turned else matrices)
    return Weight.whole(name, part.shape, weight.format, part.view(np.uint8).reshape(-1))


def _part_gate_and_up(makers: Makers) -> None:
    """Fused experts (matrices, 2 · width, columns), and their biases, as two tensors: gate first."""
    for name in [name for name in makers if ".ffn_gate_up_exps." in name]:
        make = makers.pop(name)
        for place, half in enumerate(HALVES):
            makers[name.replace("gate_up", half)] = partial(_half, make, name.replace("gate_up", half), place)


def _half(make: Callable[[], Weight], name: str, place: int) -> Weight:
    weight = make()
    rows = weight.rows // 2
    return replace(weight.part(place * rows, (place + 1) * rows), name=name)


def _flat(make: Callable[[], Weight]) -> Weight:
    """(1, columns) as (columns,), as the converter of llama.cpp writes it."""
    weight = make()
    return replace(weight, shape=(weight.elements,)) if weight.shape[0] == 1 else weight
