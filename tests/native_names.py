"""Hugging Face's tensor names as Mistral's own, and folders with params.json; knows nothing of the reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf_writing import safetensors_bytes


def native(name: str) -> str:
    """The way back, for these tests."""
    words = {
        "self_attn": "attention", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1", "down_proj": "w2",
        "up_proj": "w3", "q_a_proj": "wq_a", "q_b_proj": "wq_b", "kv_b_proj": "wkv_b", "q_a_layernorm": "q_a_norm",
        "kv_a_proj_with_mqa": "wkv_a_with_mqa", "kv_a_layernorm": "kv_a_norm",
    }  # fmt: skip
    outside = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    head = name.rpartition(".")[0]
    if head in outside:
        return name.replace(head, outside[head])
    parts = [words.get(part, part) for part in name.removeprefix("model.").split(".")]
    sparse = parts[2] == "mlp" and parts[3] in ("gate", "experts", "shared_experts")
    return ".".join(part if part != "mlp" else "feed_forward" for part in parts if not (sparse and part == "mlp"))


def write_native(folder: Path, tensors: dict[str, Any], params: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "consolidated.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head as adjacent pairs, from halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
