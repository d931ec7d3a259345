"""Formulas with gated delta nets in float64, token by token: what `paper.py` has, and convolution, rule and gates.
It shares no line with localmoe; every trap is a field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from paper import Array, Block, Formula, Tensors, attend, mixture, rms, rotated, sigmoid, swiglu


@dataclass(frozen=True, eq=False)
class Recurrent(Formula):
    """`full` says for each layer whether it has attention; the rest of the fields are of delta nets but the first."""

    full: tuple[bool, ...] = ()
    output_gate: str = "sigmoid"  # of attention: none, and first: before the query, not behind it
    keys: int = 1
    values: int = 1
    tiled: bool = False  # value head h reads key head h % keys
    convolved: str = "silu"  # plain, none
    taps: str = "last"  # the last tap meets the token itself; first
    unit: bool = True
    query_scaled: bool = True
    corrected: bool = True  # v - Sᵀ k is written, not v
    strength: str = "sigmoid"  # of writing: one
    decay: str = "softplus"  # exponential, none
    biased_decay: bool = True
    decayed: str = "before"  # what is read for the correction; after
    z_gate: str = "silu"  # sigmoid, none
    gated: str = "after"  # the norm; before
    delta_norm: bool = True


def forward(f: Recurrent, tensors: Tensors, ids: Sequence[int]) -> Array:
    """Token ids (T,) -> logits (T, V)."""
    x = tensors["token_embd.weight"].astype(np.float64)[list(ids)]
    for i in range(f.blocks):

        def block(name: str, number: int = i) -> Array:
            return tensors[f"blk.{number}.{name}"].astype(np.float64)

        h = rms(x, block("attn_norm.weight"), f.epsilon)
        x = x + (attention if f.full[i] else delta_net)(f, block, h)
        h = rms(x, block("post_attention_norm.weight"), f.epsilon)
        sparse = f"blk.{i}.ffn_gate_inp.weight" in tensors
        x = x + (mixture(f, block, h, False) if sparse else swiglu(block, h, "ffn"))
    head = tensors.get("output.weight", tensors["token_embd.weight"]).astype(np.float64)
    return rms(x, tensors["output_norm.weight"].astype(np.float64), f.epsilon) @ head.T


def attention(f: Recurrent, b: Block, x: Array) -> Array:
    q = (x @ b("attn_q.weight").T).reshape(len(x), f.heads, 2, -1)
    query, gate = (q[:, :, i] for i in ((1, 0) if f.output_gate == "first" else (0, 1)))
    k, v = ((x @ b(f"attn_{name}.weight").T).reshape(len(x), f.kv_heads, -1) for name in "kv")
    if f.head_norm == "head":
        query, k = (rms(y, b(f"attn_{name}_norm.weight"), f.epsilon) for y, name in ((query, "q"), (k, "k")))
    group = f.heads // f.kv_heads
    k, v = np.repeat(rotated(f, k), group, axis=1), np.repeat(v, group, axis=1)
    y = attend(f, rotated(f, query), k, v)
    if f.output_gate != "none":
        y = y * sigmoid(gate.reshape(len(x), -1))
    return y @ b("attn_output.weight").T


def delta_net(f: Recurrent, b: Block, x: Array) -> Array:
    mixed, z = x @ b("attn_qkv.weight").T, x @ b("attn_gate.weight").T
    mixed = convolution(f, mixed, b("ssm_conv1d.weight"))
    width = (mixed.shape[1] - z.shape[1]) // 2
    q, k, v = mixed[:, :width], mixed[:, width : 2 * width], mixed[:, 2 * width :]
    beta, alpha = gates(f, b, x)
    if f.strength == "one":
        beta = np.ones_like(beta)
    y = delta_rule(f, q.reshape(len(x), f.keys, -1), k.reshape(len(x), f.keys, -1), v, beta, decay(f, b, alpha))
    z = z.reshape(y.shape)
    gate = {"silu": z * sigmoid(z), "sigmoid": sigmoid(z), "none": np.ones_like(z)}[f.z_gate]
    weight = b("ssm_norm.weight") if f.delta_norm else np.ones(y.shape[2])
    y = rms(y * gate, weight, f.epsilon) if f.gated == "before" else rms(y, weight, f.epsilon) * gate
    return y.reshape(len(x), -1) @ b("ssm_out.weight").T


def gates(f: Recurrent, b: Block, x: Array) -> tuple[Array, Array]:
    """Beta and alpha, (T, H) each; in Qwen3-Next in one matrix, by key heads."""
    try:
        both = (x @ b("ssm_ba.weight").T).reshape(len(x), f.keys, 2, -1)
        return both[:, :, 0].reshape(len(x), -1), both[:, :, 1].reshape(len(x), -1)
    except KeyError:
        return x @ b("ssm_beta.weight").T, x @ b("ssm_alpha.weight").T


def convolution(f: Recurrent, x: Array, weight: Array) -> Array:
    if f.convolved == "none":
        return x
    taps = weight.shape[1]
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
    ordered = weight if f.taps == "last" else weight[:, ::-1]
    y = np.stack([(padded[t : t + taps].T * ordered).sum(axis=1) for t in range(len(x))])
    return y * sigmoid(y) if f.convolved == "silu" else y


def decay(f: Recurrent, b: Block, alpha: Array) -> Array:
    """How much of its state each head keeps, (T, H)."""
    step = alpha + b("ssm_dt.bias") if f.biased_decay else alpha
    if f.decay == "none":
        return np.ones_like(alpha)
    return np.exp(b("ssm_a") * (np.log1p(np.exp(step)) if f.decay == "softplus" else np.exp(step)))


def delta_rule(f: Recurrent, q: Array, k: Array, v: Array, beta: Array, kept: Array) -> Array:
    """q and k (T, K, d), v (T, H e) -> (T, H, e)."""
    v = v.reshape(len(v), f.values, -1)
    if f.unit:
        q, k = (y / np.sqrt((y**2).sum(axis=2, keepdims=True) + 1e-6) for y in (q, k))
    if f.query_scaled:
        q = q / np.sqrt(q.shape[2])
    out = np.zeros_like(v)
    for h in range(f.values):
        key = h % f.keys if f.tiled else h // (f.values // f.keys)
        state = np.zeros((q.shape[2], v.shape[2]))
        for t in range(len(v)):
            old = state.T @ k[t, key]
            state = state * kept[t, h]
            said = state.T @ k[t, key] if f.decayed == "before" else old
            new = v[t, h] - said if f.corrected else v[t, h]
            state = state + beta_of(f, beta[t, h]) * np.outer(k[t, key], new)
            out[t, h] = state.T @ q[t, key]
    return out


def beta_of(f: Recurrent, beta: float) -> float:
    return 1.0 if f.strength == "one" else float(sigmoid(np.float64(beta)))
