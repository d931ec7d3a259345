"""The formula of families with a sparse indexer in float64: `paper.py`'s latent attention, its mask a choice. It shares
no line with localmoe; every trap is a field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from paper import Array, Formula, Tensors, mixture, rms, rotated, softmax, swiglu
from paper_mixtures import Layer


@dataclass(frozen=True, eq=False)
class Sparse(Formula):
    """`chosen` positions of each token, by an indexer of `indexer_heads` heads."""

    chosen: int = 5
    indexer_heads: int = 3
    indexer_layout: str = "halves"
    indexer_frequencies: Array | None = None  # where they differ
    indexer_epsilon: float = 1e-6
    normed_keys: bool = True
    biased_keys: bool = True
    cut_at_zero: bool = True
    weighted: bool = True
    indexed: tuple[bool, ...] = ()  # layers that choose for themselves; empty: all of them


def forward(f: Sparse, tensors: Tensors, ids: Sequence[int]) -> Array:
    """Token ids (T,) -> logits (T, V)."""
    x = tensors["token_embd.weight"].astype(np.float64)[list(ids)]
    seen = np.zeros(0, bool)
    for i in range(f.blocks):
        b = Layer(tensors, i)
        h = rms(x, b("attn_norm.weight"), f.epsilon)
        q_latent = rms(h @ b("attn_q_a.weight").T, b("attn_q_a_norm.weight"), f.latent_epsilon)
        if not f.indexed or f.indexed[i]:
            seen = choice(f, b, h, q_latent)
        x = x + attention(f, b, h, q_latent, seen)
        h = rms(x, b("ffn_norm.weight"), f.epsilon)
        sparse = b.has("ffn_gate_inp.weight")
        x = x + (mixture(f, b, h, b.has("exp_probs_b.bias")) if sparse else swiglu(b, h, "ffn"))
    return rms(x, tensors["output_norm.weight"].astype(np.float64), f.epsilon) @ tensors["output.weight"].T


def choice(f: Sparse, b: Layer, x: Array, q_latent: Array) -> Array:
    """(T, T): which positions a token sees. DeepSeek-V3.2, equations 1 and 2."""
    turns = replace(f, layout=f.indexer_layout)
    if f.indexer_frequencies is not None:
        turns = replace(turns, frequencies=f.indexer_frequencies)
    k = x @ b("indexer.attn_k.weight").T
    if f.normed_keys:
        k = rms(k - k.mean(axis=1, keepdims=True), b("indexer.k_norm.weight"), f.indexer_epsilon)
        k = k + b("indexer.k_norm.bias") * f.biased_keys
    k = rotated(turns, k[:, None, :])[:, 0]
    q = rotated(turns, (q_latent @ b("indexer.attn_q_b.weight").T).reshape(len(x), f.indexer_heads, -1))
    weights = x @ b("indexer.proj.weight").T if f.weighted else np.ones((len(x), f.indexer_heads))
    products = np.einsum("tid,sd->tis", q, k)
    scores = np.einsum("ti,tis->ts", weights, np.maximum(products, 0) if f.cut_at_zero else products)
    seen = np.zeros((len(x), len(x)), bool)
    for t in range(len(x)):
        seen[t, sorted(range(t + 1), key=lambda s: (-scores[t, s], s))[: f.chosen]] = True
    return seen


def attention(f: Sparse, b: Layer, x: Array, q_latent: Array, seen: Array) -> Array:
    """The latent is expanded into keys and values of every head."""
    q = (q_latent @ b("attn_q_b.weight").T).reshape(len(x), f.heads, -1)
    compressed = x @ b("attn_kv_a_mqa.weight").T
    latent = rms(compressed[:, : f.latent], b("attn_kv_a_norm.weight"), f.latent_epsilon)
    expanded = (latent @ b("attn_kv_b.weight").T).reshape(len(x), f.heads, -1)
    turned = np.repeat(rotated(f, compressed[:, None, f.latent :]), f.heads, axis=1)
    k = np.concatenate([expanded[..., : f.nope], turned], axis=2)
    q = np.concatenate([q[..., : f.nope], rotated(f, q[..., f.nope :])], axis=2)
    v = expanded[..., f.nope :]
    heads = [softmax(np.where(seen, q[:, h] @ k[:, h].T * f.scale, -np.inf)) @ v[:, h] for h in range(f.heads)]
    return np.concatenate(heads, axis=1) @ b("attn_output.weight").T
