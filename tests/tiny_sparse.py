"""Tiny random models of the families with a sparse indexer, as GGUF keys and tensors, beside their formula."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
from paper_sparse import Sparse
from tiny import D, R, Tiny, deepseek_v3, random_tensors

INDEXER_HEADS, INDEXER, CHOSEN, LAYERS = 32, 64, 5, 4  # llama.cpp turns keys by 64; few heads would give ties of zero
KEYS = {
    "block_count": LAYERS, "attention.indexer.head_count": INDEXER_HEADS, "attention.indexer.key_length": INDEXER,
    "attention.indexer.top_k": CHOSEN,
}  # fmt: skip
SHAPES = {
    "indexer.attn_q_b.weight": (INDEXER_HEADS * INDEXER, R), "indexer.attn_k.weight": (INDEXER, D),
    "indexer.k_norm.weight": (INDEXER,), "indexer.k_norm.bias": (INDEXER,), "indexer.proj.weight": (INDEXER_HEADS, D),
}  # fmt: skip


def sparse(architecture: str, layers: tuple[int, ...], **formula: Any) -> Tiny:
    """DeepSeek-V3 of four layers, with indexers in some."""
    base = deepseek_v3()
    made = dict(base.tensors)
    for source, target in ((1, 2), (1, 3)):  # other experts would show as well, but these are at hand
        made |= {
            name.replace(f"blk.{source}.", f"blk.{target}."): np.roll(array, target, 0)
            for name, array in base.tensors.items()
            if name.startswith(f"blk.{source}.")
        }
    made |= random_tensors({f"blk.{i}.{name}": shape for i in layers for name, shape in SHAPES.items()}, 5)
    known = {field.name: getattr(base.formula, field.name) for field in fields(base.formula)}
    right = Sparse(**known | {"blocks": LAYERS, "chosen": CHOSEN, "indexer_heads": INDEXER_HEADS} | formula)
    return Tiny(architecture, {**base.keys, **KEYS}, made, right)


def deepseek32() -> Tiny:
    return sparse("deepseek32", (0, 1, 2, 3))


def glm_dsa() -> Tiny:
    """GLM-5.2: the second and third layers share the first one's choice."""
    types = (True, False, False, True)
    tiny = sparse("glm-dsa", (0, 3), indexer_layout="pairs", indexed=types)
    return replace(tiny, keys={**tiny.keys, "attention.indexer.types": np.array(types)})


MODELS = {f.__name__: f for f in (deepseek32, glm_dsa)}
