"""The newer mixtures' formulas in float64: what `paper.py` has, and sinks, chunks, unturned layers, biased experts,
scaled branches. It shares no line with localmoe; every trap is a field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from paper import Array, Formula, Tensors, rms, rotated, shares, sigmoid, softmax, swiglu


@dataclass(frozen=True, eq=False)
class Mixture(Formula):
    """Tuples hold a value for each layer; empty ones mean that no layer has it."""

    windows: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()
    turned: tuple[bool, ...] = ()  # layers with rope; empty: all of them
    normed: tuple[bool, ...] = ()  # layers with head norms; empty: all of them
    warmed: tuple[bool, ...] = ()  # layers with temperature
    norm: str = "rms"  # rms, layer
    sinks: bool = True  # of those that are there
    router_biased: bool = True
    experts_biased: bool = True
    activation: str = "silu"
    limit: float = 7.0
    slope: float = 1.702
    shift: float = 1.0
    share_on: str = "output"
    choice_biased: bool = True
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0


class Layer:
    """The tensors of one block; `has` says which there are."""

    def __init__(self, tensors: Tensors, number: int) -> None:
        self.tensors, self.number = tensors, number

    def __call__(self, name: str) -> Array:
        return self.tensors[f"blk.{self.number}.{name}"].astype(np.float64)

    def has(self, name: str) -> bool:
        return f"blk.{self.number}.{name}" in self.tensors

    def linear(self, x: Array, name: str, biased: bool = True) -> Array:
        y = x @ self(f"{name}.weight").T
        return y + self(f"{name}.bias") if biased and self.has(f"{name}.bias") else y


def forward(f: Mixture, tensors: Tensors, ids: Sequence[int]) -> Array:
    """Token ids (T,) -> logits (T, V)."""
    x = tensors["token_embd.weight"].astype(np.float64)[list(ids)] * f.embedding_scale
    for i in range(f.blocks):
        b = Layer(tensors, i)
        x = x + attention(f, b, i, normed(f, b, "attn_norm", x)) * f.residual_scale
        before = "ffn_norm" if b.has("ffn_norm.weight") else "post_attention_norm"
        h = normed(f, b, before, x)
        x = x + (mixture(f, b, h) if b.has("ffn_gate_inp.weight") else swiglu(b, h, "ffn")) * f.residual_scale
    tensors = {"output.weight": tensors["token_embd.weight"], **tensors}
    last = Layer(
        {n.replace("output", "blk.0.output"): array for n, array in tensors.items() if n.startswith("output")}, 0
    )
    return last.linear(normed(f, last, "output_norm", x), "output") * f.logit_scale


def normed(f: Mixture, b: Layer, name: str, x: Array) -> Array:
    if f.norm == "rms":
        return rms(x, b(f"{name}.weight"), f.epsilon)
    y = rms(x - x.mean(axis=-1, keepdims=True), b(f"{name}.weight"), f.epsilon)
    return y + b(f"{name}.bias") if f.biased else y


def attention(f: Mixture, b: Layer, i: int, x: Array) -> Array:
    def heads(name: str, count: int) -> Array:
        y = b.linear(x, f"attn_{name}", f.biased) if b.has(f"attn_{name}.weight") else parted(name, count)
        if f.head_norm == "full" and name != "v":
            y = rms(y, b(f"attn_{name}_norm.weight"), f.epsilon)
        return y.reshape(len(x), count, -1)

    def parted(name: str, count: int) -> Array:
        """q, k and v are the rows of one matrix, one after the other."""
        weight, width = b("attn_qkv.weight"), b("attn_output.weight").shape[1] // f.heads
        start = {"q": 0, "k": f.heads, "v": f.heads + f.kv_heads}[name]
        return x @ weight[start * width : (start + count) * width].T

    def normed(y: Array, name: str) -> Array:
        if f.head_norm in ("none", "full") or (f.normed and not f.normed[i]):
            return y
        return rms(y, b(f"attn_{name}_norm.weight")[: y.shape[2]] if f.head_norm == "head" else np.ones(1), f.epsilon)

    def turned(y: Array) -> Array:
        return y if f.turned and not f.turned[i] else rotated(f, y)

    def placed(name: str, count: int) -> Array:
        y = heads(name, count)
        return turned(normed(y, name)) if f.norm_before_rope else normed(turned(y), name)

    group = f.heads // f.kv_heads
    k, v = (np.repeat(y, group, axis=1) for y in (placed("k", f.kv_heads), heads("v", f.kv_heads)))
    return b.linear(attend(f, b, i, placed("q", f.heads), k, v), "attn_output", f.biased)


def attend(f: Mixture, b: Layer, i: int, q: Array, k: Array, v: Array) -> Array:
    """q and k (T, H, d), v (T, H, e) -> (T, H · e)."""
    at = np.arange(len(q))
    if f.temperature and f.warmed[i]:
        scale, length, offset = f.temperature
        q = q * (1 + scale * np.log(1 + (at + offset) // length))[:, None, None]
    seen = at[:, None] >= at[None, :]
    if f.windows and f.windows[i]:
        seen &= at[:, None] - at[None, :] < f.windows[i]
    if f.chunks and f.chunks[i]:
        seen &= at[None, :] // f.chunks[i] == at[:, None] // f.chunks[i]
    out = []
    for h in range(q.shape[1]):
        scores = np.where(seen, q[:, h] @ k[:, h].T * f.scale, -np.inf)
        if f.sinks and b.has("attn_sinks.weight"):
            sink = np.full((len(q), 1), b("attn_sinks.weight")[h])
            out.append(softmax(np.concatenate([scores, sink], axis=1))[:, :-1] @ v[:, h])
        else:
            out.append(softmax(scores) @ v[:, h])
    return np.concatenate(out, axis=1)


def opened(f: Mixture, gate: Array, up: Array) -> Array:
    if f.activation == "clamped":
        gate, up = np.minimum(gate, f.limit), np.clip(up, -f.limit, f.limit)
        return gate * sigmoid(f.slope * gate) * (up + f.shift)
    return gate * sigmoid(gate) * up


def mixture(f: Mixture, b: Layer, x: Array) -> Array:
    logits = b.linear(x, "ffn_gate_inp", f.router_biased)
    bias = b("exp_probs_b.bias") if f.choice_biased and b.has("exp_probs_b.bias") else np.zeros(logits.shape[1])
    gate, up, down = (b(f"ffn_{name}_exps.weight") for name in ("gate", "up", "down"))
    added = [
        b(f"ffn_{name}_exps.bias") if f.experts_biased and b.has(f"ffn_{name}_exps.bias") else w[:, :, 0] * 0
        for name, w in (("gate", gate), ("up", up), ("down", down))
    ]
    y = np.zeros_like(x)
    for t, row in enumerate(logits):
        for e, share in shares(f, row, bias).items():
            h = x[t] * (share if f.share_on == "input" else 1.0)
            middle = opened(f, gate[e] @ h + added[0][e], up[e] @ h + added[1][e])
            y[t] += (down[e] @ middle + added[2][e]) * (share if f.share_on == "output" else 1.0)
    return y if f.shared == "none" else y + swiglu(b, x, "ffn", "_shexp")
