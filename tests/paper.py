"""The families' formulas in float64 as the papers write them: whole texts, keys and values per head, no cache, nothing
absorbed. It shares no line with localmoe; every trap is a field, so that a sprung one can be computed too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log, pi

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Tensors = Mapping[str, npt.NDArray[np.float32]]
Block = Callable[[str], Array]


@dataclass(frozen=True, eq=False)
class Formula:
    """One family's settings; the defaults are llama's. `frequencies` are those of rope, in radians per position."""

    blocks: int
    heads: int
    kv_heads: int
    width: int
    frequencies: Array
    scale: float
    epsilon: float = 1e-5
    layout: str = "halves"
    amplitude: float = 1.0
    window: int = 0
    temperature: tuple[float, int, int] | None = None  # scale, length, offset of the position
    biased: bool = True
    head_norm: str = "none"  # none, head, full
    norm_before_rope: bool = True
    used: int = 0
    score: str = "softmax"
    normalise: bool = False
    share_scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    group_score: str = "max"
    masked: float = -np.inf
    biased_shares: bool = False
    jitter: float = 0.01
    mixed_over: str = "near"  # near, all: what a share of sparse mixing is a softmax of
    shared: str = "none"  # none, plain, gated
    latent: int = 0
    nope: int = 0
    latent_epsilon: float = 1e-5
    latent_normed: bool = True
    rope_normed: bool = False


def plain_frequencies(dimensions: int, base: float) -> Array:
    return base ** (-np.arange(0, dimensions, 2) / dimensions)


def yarn_frequencies(
    dimensions: int, base: float, factor: float, original: int, fast: float = 32, slow: float = 1
) -> Array:
    """Peng et al. 2023: where a frequency turns `fast` times within the original context it stays, below `slow` not."""
    plain = plain_frequencies(dimensions, base)

    def index(turns: float) -> float:
        return dimensions / 2 * log(original / (2 * pi * turns)) / log(base)

    low, high = max(floor(index(fast)), 0), min(ceil(index(slow)), dimensions - 1)
    stretched = np.clip((np.arange(plain.size) - low) / max(high - low, 0.001), 0, 1)
    return plain / factor * stretched + plain * (1 - stretched)


def llama3_divisors(dimensions: int, base: float, factor: float, original: int, low: float, high: float) -> Array:
    """What `rope_freqs` holds: 1 for short waves, `factor` for long ones, and the blend between them."""
    divisors = []
    for frequency in plain_frequencies(dimensions, base):
        wave = 2 * pi / frequency
        if wave < original / high:
            divisors.append(1.0)
        elif wave > original / low:
            divisors.append(factor)
        else:
            kept = (original / wave - low) / (high - low)
            divisors.append(1 / ((1 - kept) / factor + kept))
    return np.array(divisors)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * log(factor) + 1


def forward(f: Formula, tensors: Tensors, ids: Sequence[int]) -> Array:
    """Token ids (T,) -> logits (T, V)."""
    x = tensors["token_embd.weight"].astype(np.float64)[list(ids)]
    for i in range(f.blocks):

        def block(name: str, number: int = i) -> Array:
            return tensors[f"blk.{number}.{name}"].astype(np.float64)

        h = rms(x, block("attn_norm.weight"), f.epsilon)
        x = x + (latent_attention if f.latent else attention)(f, block, h)
        h = rms(x, block("ffn_norm.weight"), f.epsilon)
        sparse = f"blk.{i}.ffn_gate_inp.weight" in tensors
        x = x + (mixture(f, block, h, f"blk.{i}.exp_probs_b.bias" in tensors) if sparse else swiglu(block, h, "ffn"))
    head = tensors.get("output.weight", tensors["token_embd.weight"]).astype(np.float64)
    return rms(x, tensors["output_norm.weight"].astype(np.float64), f.epsilon) @ head.T


def rms(x: Array, weight: Array, epsilon: float) -> Array:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weight


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rotated(f: Formula, x: Array) -> Array:
    """x (T, H, d), the first 2n elements of each head turned as complex numbers."""
    n = f.frequencies.size
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if f.layout == "pairs" else (slice(n), slice(n, 2 * n))
    turns = np.exp(1j * np.arange(len(x))[:, None] * f.frequencies) * f.amplitude
    z = (x[..., first] + 1j * x[..., second]) * turns[:, None, :]
    y = x.copy()
    y[..., first], y[..., second] = z.real, z.imag
    return y


def attend(f: Formula, q: Array, k: Array, v: Array) -> Array:
    """q and k (T, H, d), v (T, H, e) -> (T, H · e); every head has keys and values of its own."""
    at = np.arange(len(q))
    if f.temperature:
        scale, length, offset = f.temperature
        q = q * (1 + scale * np.log(1 + (at + offset) // length))[:, None, None]
    seen = at[:, None] >= at[None, :]
    if f.window:
        seen &= at[:, None] - at[None, :] < f.window
    heads = [softmax(np.where(seen, q[:, h] @ k[:, h].T * f.scale, -np.inf)) @ v[:, h] for h in range(q.shape[1])]
    return np.concatenate(heads, axis=1)


def attention(f: Formula, b: Block, x: Array) -> Array:
    def projected(name: str, heads: int) -> Array:
        y = x @ b(f"attn_{name}.weight").T
        if f.biased:
            y = y + b(f"attn_{name}.bias")
        return y.reshape(len(x), heads, -1)

    def normed(y: Array, name: str) -> Array:
        if f.head_norm == "none":
            return y
        weight, width = b(f"attn_{name}_norm.weight"), y.shape[1] * y.shape[2]
        if f.head_norm == "full":
            return rms(y.reshape(len(y), -1), np.resize(weight, width), f.epsilon).reshape(y.shape)
        return rms(y, weight[: y.shape[2]], f.epsilon)

    def placed(y: Array, name: str) -> Array:
        return rotated(f, normed(y, name)) if f.norm_before_rope else normed(rotated(f, y), name)

    q, k = placed(projected("q", f.heads), "q"), placed(projected("k", f.kv_heads), "k")
    v = projected("v", f.kv_heads)
    group = f.heads // f.kv_heads
    return attend(f, q, np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)) @ b("attn_output.weight").T


def latent_attention(f: Formula, b: Block, x: Array) -> Array:
    """DeepSeek-V2, equations 9 to 19: the latent is expanded into keys and values of every head."""
    try:
        q = rms(x @ b("attn_q_a.weight").T, b("attn_q_a_norm.weight"), f.latent_epsilon) @ b("attn_q_b.weight").T
    except KeyError:
        q = x @ b("attn_q.weight").T
    q = q.reshape(len(x), f.heads, -1)
    compressed = x @ b("attn_kv_a_mqa.weight").T
    latent, turned = compressed[:, : f.latent], compressed[:, f.latent :]
    if f.latent_normed:
        latent = rms(latent, b("attn_kv_a_norm.weight"), f.latent_epsilon)
    if f.rope_normed:
        turned = rms(turned, np.ones(turned.shape[1]), f.latent_epsilon)
    expanded = (latent @ b("attn_kv_b.weight").T).reshape(len(x), f.heads, -1)
    shared = np.repeat(rotated(f, turned[:, None, :]), f.heads, axis=1)
    k = np.concatenate([expanded[..., : f.nope], shared], axis=2)
    q = np.concatenate([q[..., : f.nope], rotated(f, q[..., f.nope :])], axis=2)
    return attend(f, q, k, expanded[..., f.nope :]) @ b("attn_output.weight").T


def swiglu(b: Block, x: Array, prefix: str, suffix: str = "") -> Array:
    gate = x @ b(f"{prefix}_gate{suffix}.weight").T
    return (gate * sigmoid(gate) * (x @ b(f"{prefix}_up{suffix}.weight").T)) @ b(f"{prefix}_down{suffix}.weight").T


def mixture(f: Formula, b: Block, x: Array, has_bias: bool) -> Array:
    logits = x @ b("ffn_gate_inp.weight").T
    bias = b("exp_probs_b.bias") if has_bias else np.zeros(logits.shape[1])
    gate, up, down = (b(f"ffn_{name}_exps.weight") for name in ("gate", "up", "down"))
    y = np.zeros_like(x)
    for t, row in enumerate(logits):
        for e, share in shares(f, row, bias).items():
            g = gate[e] @ x[t]
            y[t] += share * (down[e] @ (g * sigmoid(g) * (up[e] @ x[t])))
    if f.shared != "none":
        extra = swiglu(b, x, "ffn", "_shexp")
        y = y + (extra * sigmoid(x @ b("ffn_gate_inp_shexp.weight").reshape(-1, 1)) if f.shared == "gated" else extra)
    return y


def shares(f: Formula, logits: Array, bias: Array) -> dict[int, float]:
    """One token's chosen experts and their shares; DeepSeek-V3, equations 12 to 16."""
    if f.score == "sparsemixer":
        return mixed(f, logits)
    score = softmax(logits) if f.score == "softmax" else sigmoid(logits)
    standing = score + bias
    per_group = len(score) // f.groups
    strengths = []
    for g in range(f.groups):
        best = sorted(standing[g * per_group : (g + 1) * per_group], reverse=True)
        strengths.append(best[0] if f.group_score == "max" else best[0] + best[1])
    kept = sorted(range(f.groups), key=lambda g: -strengths[g])[: f.groups_used]
    limited = [s if e // per_group in kept else f.masked for e, s in enumerate(standing)]
    chosen = sorted(range(len(score)), key=lambda e: -limited[e])[: f.used]
    weights = {e: float((standing if f.biased_shares else score)[e]) for e in chosen}
    total = sum(weights.values()) if f.normalise else 1.0
    return {e: w / total * f.share_scale for e, w in weights.items()}


def mixed(f: Formula, logits: Array) -> dict[int, float]:
    """Liu et al. 2024, section 2.2: one expert after the other; those far below the best do not count."""
    left, found = list(enumerate(logits)), {}
    for _ in range(f.used):
        chosen, best = max(left, key=lambda one: one[1])
        near = [x for _, x in left if (best - x) / max(abs(x), best) <= 2 * f.jitter or f.mixed_over == "all"]
        found[chosen] = float(1 / np.exp(np.array(near) - best).sum())
        left = [one for one in left if one[0] != chosen]
    return found
