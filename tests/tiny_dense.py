"""Tiny random models of the newer dense families, as GGUF keys and tensors, beside the formula they should follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from paper import plain_frequencies, yarn_frequencies
from paper_dense import Dense
from tiny import (
    ATTENTION,
    BASE,
    BIASES,
    COMMON,
    FACTOR,
    FEED,
    FULL_NORMS,
    HEAD_NORMS,
    D,
    F,
    H,
    K,
    Tiny,
    V,
    d,
    random_tensors,
)

SPAN, CONTEXT, LOCAL = 5, 16, 500.0  # a window's tokens, original context, rope base of layers with windows
PLAIN = Dense(2, H, K, d, plain_frequencies(d, BASE), d**-0.5)
PARTIAL = {"rope.dimension_count": d // 2}
HALF = plain_frequencies(d // 2, BASE)
NORM, SECOND_NORM = {"attn_norm.weight": (D,)}, {"ffn_norm.weight": (D,)}
AFTER = {"post_attention_norm.weight": (D,), "post_ffw_norm.weight": (D,)}
FUSED = {"ffn_up.weight": (2 * F, D), "ffn_down.weight": (D, F)}
QKV = {"attn_qkv.weight": ((H + 2 * K) * d, D), "attn_output.weight": (D, H * d)}
SHORT = np.linspace(1, 2, d // 4).astype(np.float32)
LONG = np.linspace(2, 9, d // 4).astype(np.float32)


def made(*parts: Mapping[str, tuple[int, ...]], blocks: int = 2, tied: bool = False, **more: Any) -> dict[str, Any]:
    """The tensors of `parts` in every block, and those of `more` outside of them."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output_norm.weight": (D,), **more}
    if not tied:
        shapes["output.weight"] = (V, D)
    for i in range(blocks):
        shapes |= {f"blk.{i}.{name}": shape for part in parts for name, shape in part.items()}
    return random_tensors(shapes)


def biased(*parts: Mapping[str, tuple[int, ...]]) -> tuple[Mapping[str, tuple[int, ...]], ...]:
    """The parts, and a bias for each weight."""
    return tuple(
        {**part, **{name.replace("weight", "bias"): shape[:1] for name, shape in part.items()}} for part in parts
    )


def gemma3() -> Tiny:
    """Five layers with windows, one without; a softmax scale that is no head's."""
    keys = {**COMMON, "block_count": 6, "attention.sliding_window": SPAN, "attention.scale": 0.3}
    keys |= {"rope.freq_base_swa": LOCAL, "final_logit_softcapping": 4.0}
    formula = replace(
        PLAIN, blocks=6, scale=0.3, head_norm="head", windows=(SPAN,) * 5 + (0,), embedding_scale=D**0.5,
        local_frequencies=plain_frequencies(d, LOCAL), activation="gelu", logit_softcap=4.0,
    )  # fmt: skip
    parts = (NORM, ATTENTION, HEAD_NORMS, SECOND_NORM, FEED, AFTER)
    return Tiny("gemma3", keys, made(*parts, blocks=6, tied=True), formula)


def gemma2() -> Tiny:
    caps = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0}
    keys = {**COMMON, **caps, "attention.sliding_window": SPAN, "attention.scale": 0.3}
    formula = replace(
        PLAIN, scale=0.3, windows=(SPAN, 0), embedding_scale=D**0.5, activation="gelu", softcap=1.5, logit_softcap=4.0
    )
    return Tiny("gemma2", keys, made(NORM, ATTENTION, SECOND_NORM, FEED, AFTER, tied=True), formula)


def phi3() -> Tiny:
    """Its original context is shorter than the text, so that the long factors count."""
    keys = {**COMMON, **PARTIAL, "rope.scaling.original_context_length": CONTEXT, "rope.scaling.attn_factor": 1.3}
    tensors = made(NORM, QKV, SECOND_NORM, FUSED)
    tensors |= {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG}
    formula = replace(PLAIN, frequencies=HALF / LONG, amplitude=1.3, window=12)
    return Tiny("phi3", {**keys, "attention.sliding_window": 12}, tensors, formula)


def olmo2() -> Tiny:
    return Tiny("olmo2", COMMON, made(ATTENTION, FULL_NORMS, FEED, AFTER), replace(PLAIN, head_norm="full"))


def granite() -> Tiny:
    scales = {"embedding_scale": 3.0, "attention.scale": 0.3, "residual_scale": 0.5, "logit_scale": 6.0}
    formula = replace(PLAIN, layout="pairs", embedding_scale=3.0, scale=0.3, residual_scale=0.5, logit_scale=1 / 6)
    return Tiny("granite", {**COMMON, **scales}, made(NORM, ATTENTION, SECOND_NORM, FEED), formula)


def glm4() -> Tiny:
    formula = replace(PLAIN, layout="pairs", frequencies=HALF)
    parts = (NORM, ATTENTION, BIASES, SECOND_NORM, FUSED, AFTER)
    return Tiny("glm4", {**COMMON, **PARTIAL}, made(*parts), formula)


def smollm3() -> Tiny:
    formula = replace(PLAIN, blocks=4, layout="pairs", turned=(True, True, True, False))
    keys = {**COMMON, "block_count": 4}
    return Tiny("smollm3", keys, made(NORM, ATTENTION, SECOND_NORM, FEED, blocks=4, tied=True), formula)


def mistral3() -> Tiny:
    """YaRN with both mscales 1, queries warmed from the length on."""
    keys = {
        **COMMON, "rope.scaling.type": "yarn", "rope.scaling.factor": FACTOR, "rope.scaling.yarn_log_multiplier": 1.0,
        "rope.scaling.original_context_length": CONTEXT, "attention.temperature_scale": 0.4,
        "attention.temperature_length": 6,
    }  # fmt: skip
    frequencies = yarn_frequencies(d, BASE, FACTOR, CONTEXT)
    formula = replace(PLAIN, layout="pairs", frequencies=frequencies, temperature=(0.4, 6, 0))
    return Tiny("mistral3", keys, made(NORM, ATTENTION, SECOND_NORM, FEED), formula)


def layer_normed(keys: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in keys.items() if name != "attention.layer_norm_rms_epsilon"}
    return {**kept, "attention.layer_norm_epsilon": 1e-5}


def command_r() -> Tiny:
    """R+, with norms of q and k."""
    norms = {"attn_q_norm.weight": (H, d), "attn_k_norm.weight": (K, d)}
    formula = replace(PLAIN, layout="pairs", norm="layer", parallel=True, head_norm="heads", logit_scale=0.25)
    keys = layer_normed({**COMMON, "logit_scale": 0.25})
    return Tiny("command-r", keys, made(NORM, ATTENTION, norms, FEED, tied=True), formula)


def cohere2() -> Tiny:
    formula = replace(
        PLAIN, blocks=4, layout="pairs", norm="layer", parallel=True, logit_scale=0.25,
        windows=(SPAN, SPAN, SPAN, 0), turned=(True, True, True, False),
    )  # fmt: skip
    keys = layer_normed({**COMMON, "logit_scale": 0.25, "block_count": 4, "attention.sliding_window": SPAN})
    return Tiny("cohere2", keys, made(NORM, ATTENTION, FEED, blocks=4, tied=True), formula)


UNGATED = {"ffn_up.weight": (F, D), "ffn_down.weight": (D, F)}
OUTER_BIAS = {"output_norm.bias": (D,)}


def starcoder2() -> Tiny:
    keys = layer_normed({**COMMON, "attention.sliding_window": SPAN})
    tensors = made(*biased(NORM, ATTENTION, SECOND_NORM, UNGATED), **OUTER_BIAS)
    return Tiny("starcoder2", keys, tensors, replace(PLAIN, norm="layer", activation="gelu", window=SPAN))


def gpt2() -> Tiny:
    """As many heads of keys as of queries, each of D / H; no rope."""
    fused = {"attn_qkv.weight": (3 * D, D), "attn_output.weight": (D, D)}
    tensors = made(*biased(NORM, fused, SECOND_NORM, UNGATED), **OUTER_BIAS, **{"position_embd.weight": (64, D)})
    kept = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    keys = {name: COMMON[name] for name in (*kept, "vocab_size")} | {"attention.layer_norm_epsilon": 1e-5}
    formula = replace(
        PLAIN, kv_heads=H, width=D // H, scale=(D // H) ** -0.5, norm="layer", activation="gelu",
        turned=(False, False),
    )  # fmt: skip
    return Tiny("gpt2", keys, tensors, formula)


MODELS = {
    f.__name__: f
    for f in (
        gemma3, gemma2, phi3, olmo2, granite, glm4, smollm3, mistral3, command_r, cohere2, starcoder2, gpt2,
    )
}  # fmt: skip
