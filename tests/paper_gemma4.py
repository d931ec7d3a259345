"""Gemma 4's formula in float64. It shares no line with localmoe; every trap is a field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from paper import Array, Formula, Tensors, rms, rotated, shares, softmax
from paper_mixtures import Layer


@dataclass(frozen=True, eq=False)
class Gemma4(Formula):
    """Tuples hold a value for each layer. `frequencies` are those of layers without a window."""

    windows: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()  # whose keys and values a layer reads
    local_frequencies: Array | None = None
    values_normed: bool = True
    keys_as_values: str = "raw"  # raw, normed: where there is no matrix for values
    layer_inputs: bool = True
    by_id: float = 1.0  # of a layer input's two parts
    by_embedding: float = 1.0
    layers_scaled: bool = True
    dense: bool = True  # beside experts
    router_scaled: bool = True
    router_normed: bool = True
    router_sees: str = "residual"  # residual, normed
    factors: bool = True
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0


def forward(f: Gemma4, tensors: Tensors, ids: Sequence[int]) -> Array:
    """Token ids (T,) -> logits (T, V)."""
    embedding = tensors["token_embd.weight"].astype(np.float64)
    x = embedding[list(ids)] * f.embedding_scale
    inputs = layer_inputs(f, tensors, ids, x) if "per_layer_token_embd.weight" in tensors else None
    cached: list[tuple[Array, Array]] = []
    for i in range(f.blocks):
        b = Layer(tensors, i)
        branch = attention(f, b, i, normed(f, b, "attn_norm", x), cached)
        x = x + normed(f, b, "post_attention_norm", branch)
        branch = geglu(b, normed(f, b, "ffn_norm", x)) if f.dense or not b.has("ffn_gate_inp.weight") else x * 0
        if b.has("ffn_gate_inp.weight"):
            branch = normed(f, b, "post_ffw_norm_1", branch) + normed(f, b, "post_ffw_norm_2", experts(f, b, x))
        x = x + normed(f, b, "post_ffw_norm", branch)
        if inputs is not None and f.layer_inputs:
            gated = gelu(x @ b("inp_gate.weight").T) * inputs[:, i]
            x = x + normed(f, b, "post_norm", gated @ b("proj.weight").T)
        if f.layers_scaled:
            x = x * b("layer_output_scale.weight")
    y = rms(x, tensors["output_norm.weight"], f.epsilon) @ embedding.T
    return f.logit_softcap * np.tanh(y / f.logit_softcap) if f.logit_softcap else y


def normed(f: Gemma4, b: Layer, name: str, x: Array) -> Array:
    return rms(x, b(f"{name}.weight"), f.epsilon)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def geglu(b: Layer, x: Array) -> Array:
    return (gelu(x @ b("ffn_gate.weight").T) * (x @ b("ffn_up.weight").T)) @ b("ffn_down.weight").T


def layer_inputs(f: Gemma4, tensors: Tensors, ids: Sequence[int], x: Array) -> Array:
    """(T, L, P)"""
    table = tensors["per_layer_token_embd.weight"].astype(np.float64)[list(ids)].reshape(len(ids), f.blocks, -1)
    projected = (x @ tensors["per_layer_model_proj.weight"].T / x.shape[1] ** 0.5).reshape(table.shape)
    projected = rms(projected, tensors["per_layer_proj_norm.weight"], f.epsilon)
    return (f.by_embedding * projected + f.by_id * table * table.shape[2] ** 0.5) * 0.5**0.5


def attention(f: Gemma4, b: Layer, i: int, x: Array, cached: list[tuple[Array, Array]]) -> Array:
    local = f.local_frequencies if f.windows[i] and f.local_frequencies is not None else f.frequencies
    turns = replace(f, frequencies=local)
    width = b("attn_q_norm.weight").size

    def heads(name: str) -> Array:
        return (x @ b(f"attn_{name}.weight").T).reshape(len(x), -1, width)

    q = rotated(turns, rms(heads("q"), b("attn_q_norm.weight"), f.epsilon))
    if f.sources[i] == i:
        raw = heads("k")
        k = rms(raw, b("attn_k_norm.weight"), f.epsilon)
        v = heads("v") if b.has("attn_v.weight") else k if f.keys_as_values == "normed" else raw
        cached.append((rotated(turns, k), rms(v, np.ones(1), f.epsilon) if f.values_normed else v))
    else:
        cached.append(cached[f.sources[i]])
    k, v = (np.repeat(y, f.heads // y.shape[1], axis=1) for y in cached[i])
    at = np.arange(len(x))
    seen = at[:, None] >= at[None, :]
    if f.windows[i]:
        seen &= at[:, None] - at[None, :] < f.windows[i]
    out = [softmax(np.where(seen, q[:, h] @ k[:, h].T * f.scale, -np.inf)) @ v[:, h] for h in range(f.heads)]
    return np.concatenate(out, axis=1) @ b("attn_output.weight").T


def experts(f: Gemma4, b: Layer, x: Array) -> Array:
    h = normed(f, b, "ffn_norm", x) if f.router_sees == "normed" else x
    h = rms(h, np.ones(1), f.epsilon) if f.router_normed else h
    h = h * b("ffn_gate_inp.scale") / x.shape[1] ** 0.5 if f.router_scaled else h
    logits, entered, y = h @ b("ffn_gate_inp.weight").T, normed(f, b, "pre_ffw_norm_2", x), np.zeros_like(x)
    gate_up, down, factors = b("ffn_gate_up_exps.weight"), b("ffn_down_exps.weight"), b("ffn_down_exps.scale")
    for t, row in enumerate(logits):
        for e, share in shares(f, row, np.zeros(len(row))).items():
            gate, up = np.split(gate_up[e] @ entered[t], 2)
            y[t] += share * (factors[e] if f.factors else 1.0) * (down[e] @ (gelu(gate) * up))
    return y
