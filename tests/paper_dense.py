"""The dense families' formulas in float64: what `paper.py` has, and windows by layer, soft caps, norms after a branch,
branches side by side, multipliers. It shares no line with localmoe; every trap is a field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from paper import Array, Formula, Tensors, rms, rotated, sigmoid, softmax
from paper_mixtures import Layer


@dataclass(frozen=True, eq=False)
class Dense(Formula):
    """Tuples hold a value for each layer; empty ones mean that no layer has it."""

    windows: tuple[int, ...] = ()
    turned: tuple[bool, ...] = ()  # layers with rope; empty: all of them
    local_frequencies: Array | None = None  # of layers with a window, where theirs differ
    norm: str = "rms"  # rms, layer
    raised: float = 0.0  # added to every norm's weight
    before_normed: bool = True
    after_normed: bool = True  # where there are such norms
    parallel: bool = False
    activation: str = "silu"
    gate_first: bool = True
    positions: bool = True  # where they are learned
    softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0


def forward(f: Dense, tensors: Tensors, ids: Sequence[int]) -> Array:
    """Token ids (T,) -> logits (T, V)."""
    x = tensors["token_embd.weight"].astype(np.float64)[list(ids)] * f.embedding_scale
    if f.positions and "position_embd.weight" in tensors:
        x = x + tensors["position_embd.weight"].astype(np.float64)[: len(ids)]
    for i in range(f.blocks):
        b = Layer(tensors, i)
        h = normed(f, b, "attn_norm", x) if f.before_normed else x
        branch = attention(f, b, i, h)
        if f.parallel:
            x = x + branch + feed(f, b, h)
            continue
        x = x + after(f, b, "post_attention_norm", branch) * f.residual_scale
        h = normed(f, b, "ffn_norm", x) if f.before_normed else x
        x = x + after(f, b, "post_ffw_norm", feed(f, b, h)) * f.residual_scale
    last = {n.replace("output_norm", "blk.0.norm"): array for n, array in tensors.items() if "output_norm" in n}
    head = tensors.get("output.weight", tensors["token_embd.weight"]).astype(np.float64)
    y = normed(f, Layer(last, 0), "norm", x) @ head.T * f.logit_scale
    return f.logit_softcap * np.tanh(y / f.logit_softcap) if f.logit_softcap else y


def normed(f: Dense, b: Layer, name: str, x: Array) -> Array:
    """x as it is where the block has no such norm."""
    if not b.has(f"{name}.weight"):
        return x
    weight = b(f"{name}.weight") + f.raised
    if f.norm == "rms":
        return rms(x, weight, f.epsilon)
    y = rms(x - x.mean(axis=-1, keepdims=True), weight, f.epsilon)
    return y + b(f"{name}.bias") if f.biased and b.has(f"{name}.bias") else y


def after(f: Dense, b: Layer, name: str, branch: Array) -> Array:
    return normed(f, b, name, branch) if f.after_normed else branch


def attention(f: Dense, b: Layer, i: int, x: Array) -> Array:
    width = b("attn_output.weight").shape[1] // f.heads
    counts = {"q": f.heads, "k": f.kv_heads, "v": f.kv_heads}
    if b.has("attn_qkv.weight"):
        ends = np.cumsum([count * width for count in counts.values()])[:-1]
        parts = dict(zip(counts, np.split(b.linear(x, "attn_qkv", f.biased), ends, axis=1), strict=True))
    else:
        parts = {name: b.linear(x, f"attn_{name}", f.biased) for name in counts}
    window = f.windows[i] if f.windows else f.window
    local = window and f.local_frequencies is not None
    rope = replace(f, frequencies=f.local_frequencies) if local else f

    def placed(name: str) -> Array:
        y = parts[name]
        if f.head_norm == "full":
            y = rms(y, np.resize(b(f"attn_{name}_norm.weight"), y.shape[1]), f.epsilon)
        y = y.reshape(len(x), counts[name], width)
        if f.head_norm == "head":
            y = rms(y, b(f"attn_{name}_norm.weight")[:width] + f.raised, f.epsilon)
        if f.head_norm == "heads":  # a layer norm, each head with its own weights
            y = normed(replace(f, norm="layer"), b, f"attn_{name}_norm", y)
        if f.head_norm == "rows":  # the first head's weights for all
            y = rms(y - y.mean(axis=-1, keepdims=True), b(f"attn_{name}_norm.weight")[0], f.epsilon)
        return rotated(rope, y) if not f.turned or f.turned[i] else y

    q, k, v = placed("q"), placed("k"), parts["v"].reshape(len(x), f.kv_heads, width)
    group = f.heads // f.kv_heads
    return b.linear(
        attend(f, window, q, np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)), "attn_output", f.biased
    )


def attend(f: Dense, window: int, q: Array, k: Array, v: Array) -> Array:
    """q and k (T, H, d), v (T, H, e) -> (T, H · e)."""
    at = np.arange(len(q))
    if f.temperature:
        scale, length, offset = f.temperature
        q = q * (1 + scale * np.log(1 + (at + offset) // length))[:, None, None]
    seen = at[:, None] >= at[None, :]
    if window:
        seen &= at[:, None] - at[None, :] < window
    out = []
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h].T * f.scale
        if f.softcap:
            scores = f.softcap * np.tanh(scores / f.softcap)
        out.append(softmax(np.where(seen, scores, -np.inf)) @ v[:, h])
    return np.concatenate(out, axis=1)


def feed(f: Dense, b: Layer, x: Array) -> Array:
    up, inner = b.linear(x, "ffn_up", f.biased), b("ffn_down.weight").shape[1]
    if b.has("ffn_gate.weight"):
        up = activated(f, b.linear(x, "ffn_gate", f.biased)) * up
    elif up.shape[1] == 2 * inner:
        first, second = up[:, :inner], up[:, inner:]
        up = activated(f, first) * second if f.gate_first else first * activated(f, second)
    else:
        up = activated(f, up)
    return b.linear(up, "ffn_down", f.biased)


def activated(f: Dense, x: Array) -> Array:
    if f.activation == "gelu":
        return x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    with np.errstate(over="ignore"):  # of a sprung trap
        return x * sigmoid(x)
