"""llama.cpp as a witness: it opens the tiny GGUF files of every family, and its log-probabilities are ours.

Needs $LOCALMOE_LLAMA_PERPLEXITY, a llama-perplexity binary, and the conformance data, whose story model lends its
vocabulary. llama-perplexity stores log-probabilities in 16 bits between the least and the largest.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import logits
from gguf_writing import ARRAY, FLOAT32, STRING, Tensor, Typed, write_gguf
from registry import BY_TOKEN, MODELS, stretched, typed
from tiny import D, H, Tiny, split_heads
from verified import NAME as VERIFIED
from verified import claim

from localmoe.loader.locate import open_source
from localmoe.network import Network

pytestmark = pytest.mark.oracle

TOLERANCE, WITH_GELU = 5e-4, 1e-2
GELU = ("gemma2", "gemma3", "gemma4", "starcoder2", "gpt2")
TOKENS = 64
# What llama.cpp has no key for, or leaves out: the tiny model does without.
YARN = ("type", "factor", "original_context_length", "yarn_log_multiplier")
WHOLE = {"rope.scaling.yarn_log_multiplier": 0.1}  # an mscale of 1, as every released file has it
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3": {"attention.scale": None},
    "gemma2": {"attention.scale": None},
    "phi3": {"attention.sliding_window": None},
    "starcoder2": {"attention.sliding_window": None},
    "mistral3": {"attention.temperature_length": 16, "context_length": 128},
    "gpt_oss": {"rope.scaling.yarn_truncate": True},
    "llama4": dict.fromkeys(f"attention.{n}" for n in ("sliding_window", "temperature_scale", "temperature_length")),
    "deepseek32": WHOLE,
    "mistral4": WHOLE,
    "glm_dsa": dict.fromkeys(f"rope.scaling.{n}" for n in YARN),
}
# Families whose heads llama.cpp takes to be as wide as the model divided by their number.
NARROW = (
    "qwen2", "qwen2moe", "olmo2", "phi3", "command_r", "cohere2", "starcoder2", "bailingmoe2", "deepseek",
)  # fmt: skip
OTHERS = {
    "mistral": "llama.cpp leaves the window of these files out",
    "phimoe": "llama.cpp has another router",
    "deepseek_v2": "llama.cpp takes a group's best two experts",
    "deepseek_lite": "llama.cpp knows such files by their number of layers",
    "olmoe": "llama.cpp wants as many heads of keys as of queries",
    "ernie": "llama.cpp has experts in every layer behind the dense ones",
}


@pytest.fixture(scope="session")
def perplexity() -> str:
    binary = os.environ.get("LOCALMOE_LLAMA_PERPLEXITY")
    if not binary:
        pytest.skip("LOCALMOE_LLAMA_PERPLEXITY names no llama-perplexity")
    return binary


def narrowed(tiny: Tiny, width: int) -> Tiny:
    """Heads of `width` elements, the first of those that there are; norms and rope's factors with them."""
    old = tiny.keys["attention.key_length"]

    def cut(array: np.ndarray, axis: int) -> np.ndarray:
        heads = np.moveaxis(array, axis, 0).reshape(-1, old, *np.delete(array.shape, axis))
        return np.moveaxis(heads[:, :width].reshape(-1, *heads.shape[2:]), 0, axis)

    tensors = {}
    for name, array in tiny.tensors.items():
        if re.search(r"attn_(q|k|v|qkv)\.|attn_(q|k)_norm", name):
            array = array[:, :width] if array.shape[-1] == old and array.ndim > 1 else cut(array, 0)
        elif "attn_output.weight" in name:
            array = cut(array, 1)
        elif "rope_factors" in name:
            array = array[: len(array) * width // old]
        tensors[name] = np.ascontiguousarray(array)
    sizes = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    return tiny.with_tensors(tensors).with_keys(**{name: tiny.keys[name] * width // old for name in sizes})


def narrowed_values(tiny: Tiny) -> Tiny:
    """Delta nets whose values are as wide as their keys."""
    keys, values, width = (tiny.keys[f"ssm.{name}"] for name in ("group_count", "time_step_rank", "state_size"))
    old = tiny.keys["ssm.inner_size"] // values

    def cut(array: np.ndarray) -> np.ndarray:
        return array.reshape(-1, old, *array.shape[1:])[:, :width].reshape(-1, *array.shape[1:])

    tensors = dict(tiny.tensors)
    for name, array in tensors.items():
        if re.search(r"attn_qkv|ssm_conv1d", name):
            before = 2 * keys * width
            tensors[name] = np.concatenate([array[:before], cut(array[before:])])
        elif re.search(r"attn_gate|ssm_norm", name):
            tensors[name] = cut(array)
        elif "ssm_out" in name:
            tensors[name] = np.ascontiguousarray(cut(array.T).T)
    return tiny.with_tensors(tensors).with_keys(**{"ssm.inner_size": values * width})


def with_vocabulary(tiny: Tiny, path: Path, story: Path) -> Path:
    """The tiny model with the story model's vocabulary."""
    source = open_source(story)
    lent = {name: value for name, value in source.metadata.items() if name.startswith("tokenizer.")}
    count = len(lent["tokenizer.ggml.tokens"])
    lent["tokenizer.ggml.scores"] = Typed(ARRAY, np.asarray(lent["tokenizer.ggml.scores"]).tolist(), FLOAT32)
    lent["tokenizer.ggml.tokens"] = Typed(ARRAY, list(lent["tokenizer.ggml.tokens"]), STRING)
    lent = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in lent.items()}
    tensors = {n: stretched(a, count) if n in BY_TOKEN else a for n, a in tiny.tensors.items()}
    keys = {f"{tiny.architecture}.{n}": typed(v) for n, v in tiny.with_keys(vocab_size=count).keys.items()}
    records = [Tensor(n, a.shape, "F32", np.ascontiguousarray(a, np.float32).tobytes()) for n, a in tensors.items()]
    return write_gguf(path, {"general.architecture": tiny.architecture, **keys, **lent}, records)


def stored(path: Path) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """For each chunk of llama-perplexity's file: its ids, log-probabilities of its second half, and the least kept."""
    raw = path.read_bytes()
    assert raw[:8] == b"_logits_"
    context, vocabulary, chunks = struct.unpack("<iii", raw[8:20])
    ids = np.frombuffer(raw, np.int32, context * chunks, 20).reshape(chunks, context)
    width, rows = 2 * ((vocabulary + 1) // 2) + 4, context - 1 - context // 2
    data = np.frombuffer(raw, np.uint16, width * rows * chunks, 20 + 4 * context * chunks).reshape(chunks, rows, width)
    found = []
    for one, part in zip(ids, data, strict=True):
        scale, least = np.ascontiguousarray(part[:, :4]).view(np.float32).T[:, :, None]
        found.append((one, least + scale * part[:, 4 : 4 + vocabulary].astype(np.float64), least))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_same_log_probabilities(
    name: str, perplexity: str, conformance: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    if name in OTHERS:
        pytest.skip(OTHERS[name])
    tiny = MODELS[name]().with_keys(**CHANGES.get(name, {}))
    if name == "command_r":  # norms of q and k are for files of 64 layers
        tiny = tiny.with_tensors({n: a for n, a in tiny.tensors.items() if not re.search("_(q|k)_norm", n)})
    if name in NARROW:
        tiny = narrowed(tiny, D // H)
    if "ssm.inner_size" in tiny.keys:
        tiny = narrowed_values(tiny)
    if any("attn_kv_b" in tensor for tensor in tiny.tensors):
        tiny = split_heads(tiny)  # llama.cpp no longer runs the older form
    path = with_vocabulary(tiny, tmp_path / "tiny.gguf", conformance / "models/stories260K/stories260K-f32.gguf")
    text, base = tmp_path / "text.txt", tmp_path / "base"
    text.write_text("Once upon a time there was a little girl who liked to play in the park with her big dog. " * 12)
    command = [perplexity, "-m", str(path), "-f", str(text), "--chunks", "2", "--kl-divergence-base", str(base)]
    command += ["-c", str(TOKENS), "-b", str(TOKENS), "-ub", str(TOKENS), "-t", "2", "-ctk", "f32", "-ctv", "f32"]
    run = subprocess.run([*command, "-fa", "off"], capture_output=True, text=True, timeout=120, check=False)
    assert base.exists(), run.stderr[-2000:]
    network, worst = Network(open_source(path)), 0.0
    for ids, right, least in stored(base):
        seen = [1, *ids[1:].tolist()]  # a chunk begins with BOS, whatever stood there
        found = logits(network, seen, "cpu").astype(np.float64)[TOKENS // 2 : -1]
        found -= found.max(axis=1, keepdims=True)
        found -= np.log(np.exp(found).sum(axis=1, keepdims=True))
        worst = max(worst, float(np.abs(np.maximum(found, least) - right).max()))
    assert worst <= (WITH_GELU if tiny.architecture in GELU else TOLERANCE)
    record_property(VERIFIED, claim(network, "llama.cpp", "llama.cpp", worst))
