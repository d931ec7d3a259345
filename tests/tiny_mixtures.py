"""Tiny random models of the newer mixtures, as GGUF keys and tensors, beside the formula that they should follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from paper import plain_frequencies, yarn_frequencies, yarn_magnitude
from paper_mixtures import Mixture
from tiny import (
    ATTENTION,
    BASE,
    BIASES,
    CHOSEN,
    COMMON,
    EXPERTS,
    FACTOR,
    FULL_NORMS,
    HEAD_NORMS,
    SHARED,
    D,
    E,
    F,
    H,
    K,
    S,
    Tiny,
    V,
    d,
    random_tensors,
    tensors,
)

SPAN, CONTEXT, WIDE = 5, 16, 48  # a window's or chunk's tokens, YaRN's original context, width of dense layers
MOE = {**CHOSEN, "expert_feed_forward_length": F}
PLAIN = Mixture(2, H, K, d, plain_frequencies(d, BASE), d**-0.5, used=3)
SHORT, LONG = (np.linspace(1, most, d // 2).astype(np.float32) for most in (2, 9))
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": FACTOR, "rope.scaling.original_context_length": CONTEXT}


def renamed(made: Mapping[str, np.ndarray], old: str, new: str) -> dict[str, np.ndarray]:
    return {name.replace(old, new): array for name, array in made.items()}


def gpt_oss() -> Tiny:
    """Experts so large that the clamp counts."""
    biases = {**BIASES, "attn_output.bias": (D,), "ffn_gate_inp.bias": (E,), "ffn_gate_exps.bias": (E, F)}
    biases |= {"ffn_up_exps.bias": (E, F), "ffn_down_exps.bias": (E, D)}
    made = tensors({**ATTENTION, **EXPERTS, **biases, "attn_sinks.weight": (H,)})
    made = {name: array * 4 if "gate_exps" in name or "up_exps" in name else array for name, array in made.items()}
    formula = Mixture(
        2, H, K, d, ramp(truncated=False), d**-0.5, used=3, normalise=True, windows=(SPAN, 0), activation="clamped",
        amplitude=yarn_magnitude(FACTOR),
    )  # fmt: skip
    keys = {**COMMON, **MOE, **YARN, "attention.sliding_window": SPAN}
    return Tiny("gpt-oss", keys, renamed(made, "ffn_norm", "post_attention_norm"), formula)


def ramp(truncated: bool) -> np.ndarray:
    """YaRN's frequencies with the ends of the ramp rounded to whole dimensions, or not."""
    if truncated:
        return yarn_frequencies(d, BASE, FACTOR, CONTEXT)
    plain = plain_frequencies(d, BASE)
    low, high = (d / 2 * np.log(CONTEXT / (2 * np.pi * turns)) / np.log(BASE) for turns in (32, 1))
    low, high = max(low, 0), min(high, d - 1)
    stretched = np.clip((np.arange(d // 2) - low) / (high - low), 0, 1)
    return plain / FACTOR * stretched + plain * (1 - stretched)


def llama4() -> Tiny:
    """Maverick's alternation of dense and sparse layers, Scout's norms; one layer of four without rope."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(4):
        width, suffix = (F, "_shexp") if i % 2 else (WIDE, "")
        block = {"attn_norm.weight": (D,), "ffn_norm.weight": (D,), **ATTENTION, **(EXPERTS if i % 2 else {})}
        block |= {f"ffn_{part}{suffix}.weight": (width, D) for part in ("gate", "up")}
        block[f"ffn_down{suffix}.weight"] = (D, width)
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    made = {name: array for name, array in tensors({}, 0).items() if not name.startswith("blk")}
    keys = {
        **COMMON, **MOE, "block_count": 4, "feed_forward_length": WIDE, "expert_used_count": 1,
        "interleave_moe_layer_step": 2, "attention.sliding_window": SPAN, "attention.temperature_scale": 0.4,
        "attention.temperature_length": 6,
    }  # fmt: skip
    formula = Mixture(
        4, H, K, d, plain_frequencies(d, BASE), d**-0.5, layout="pairs", used=1, score="sigmoid", shared="plain",
        chunks=(SPAN, SPAN, SPAN, 0), turned=(True, True, True, False), normed=(True, True, True, False),
        warmed=(False, False, False, True), temperature=(0.4, 6, 1), head_norm="plain", norm_before_rope=False,
        share_on="input",
    )  # fmt: skip
    return Tiny("llama4", keys, {**made, **random_tensors(shapes)}, formula)


GROUPS = {
    "expert_group_count": 4, "expert_group_used_count": 2, "expert_weights_scale": 2.5, "expert_weights_norm": True,
    "expert_gating_func": 2, "expert_shared_count": 2, "leading_dense_block_count": 1,
}  # fmt: skip
PARTIAL = {"rope.dimension_count": d // 2}
GROUPED = Mixture(
    2, H, K, d, plain_frequencies(d // 2, BASE), d**-0.5, used=3, score="sigmoid", normalise=True, share_scale=2.5,
    groups=4, groups_used=2, group_score="top2", shared="plain", head_norm="head",
)  # fmt: skip
CHOICE_BIAS = {"exp_probs_b.bias": (E,)}


def glm4moe() -> Tiny:
    made = tensors({**ATTENTION, **BIASES, **HEAD_NORMS, **EXPERTS, **SHARED, **CHOICE_BIAS}, 2, 0)
    keys = {**COMMON, **MOE, **GROUPS, **PARTIAL}
    return Tiny("glm4moe", keys, renamed(made, "ffn_norm", "post_attention_norm"), GROUPED)


def bailingmoe2() -> Tiny:
    """q, k and v in one matrix."""
    fused = {"attn_qkv.weight": (H * d + 2 * K * d, D), "attn_output.weight": (D, H * d)}
    made = tensors({**fused, **HEAD_NORMS, **EXPERTS, **SHARED, **CHOICE_BIAS}, 2, 0)
    return Tiny("bailingmoe2", {**COMMON, **MOE, **GROUPS, **PARTIAL}, made, GROUPED)


def deepseek() -> Tiny:
    keys = {**COMMON, **MOE, "expert_shared_count": 2, "leading_dense_block_count": 1, "expert_weights_scale": 1.0}
    made = tensors({**ATTENTION, **EXPERTS, **SHARED}, 2, 0)
    return Tiny("deepseek", keys, made, replace(PLAIN, layout="pairs", shared="plain"))


def granitemoe() -> Tiny:
    """Files name the experts' width feed_forward_length."""
    scales = {"embedding_scale": 3.0, "attention.scale": 0.3, "residual_scale": 0.5, "logit_scale": 6.0}
    keys = {**COMMON, **CHOSEN, **scales, "expert_shared_feed_forward_length": S}
    formula = replace(
        PLAIN, layout="pairs", shared="plain", normalise=True, embedding_scale=3.0, scale=0.3, residual_scale=0.5,
        logit_scale=1 / 6,
    )  # fmt: skip
    return Tiny("granitemoe", keys, tensors({**ATTENTION, **EXPERTS, **SHARED}), formula)


def minimax_m2() -> Tiny:
    made = tensors({**ATTENTION, **FULL_NORMS, **EXPERTS, **CHOICE_BIAS})
    formula = replace(PLAIN, head_norm="full", score="sigmoid", normalise=True)
    keys = {**COMMON, **MOE, **PARTIAL, "expert_gating_func": 2}
    return Tiny("minimax-m2", keys, made, replace(formula, frequencies=plain_frequencies(d // 2, BASE)))


def ernie() -> Tiny:
    """Experts in every second layer from the second on."""
    keys = {
        **COMMON, **MOE, "block_count": 4, "leading_dense_block_count": 1, "interleave_moe_layer_step": 2,
        "expert_shared_count": 2, "expert_shared_feed_forward_length": S,
    }  # fmt: skip
    made = tensors({**ATTENTION, **EXPERTS, **SHARED, **CHOICE_BIAS}, 4, 0, 2)
    return Tiny("ernie4_5-moe", keys, made, replace(PLAIN, blocks=4, layout="pairs", shared="plain", normalise=True))


def hunyuan() -> Tiny:
    keys = {**COMMON, **MOE, "expert_shared_feed_forward_length": S, "expert_shared_count": 1}
    formula = replace(PLAIN, head_norm="head", norm_before_rope=False, normalise=True, shared="plain")
    return Tiny("hunyuan-moe", keys, tensors({**ATTENTION, **HEAD_NORMS, **EXPERTS, **SHARED}), formula)


def phimoe() -> Tiny:
    """Its original context is shorter than the text, so that the long factors count."""
    norms = {"attn_norm.bias": (D,), "ffn_norm.bias": (D,)}
    made = tensors({**ATTENTION, **BIASES, "attn_output.bias": (D,), **norms, **EXPERTS})
    made |= random_tensors({"output_norm.bias": (D,), "output.bias": (V,)}, 2)
    made |= {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG}
    keys = {**COMMON, "expert_count": E, "expert_used_count": 2, "expert_router_jitter": 0.3}
    keys |= {"rope.scaling.original_context_length": CONTEXT, "rope.scaling.attn_factor": 1.3}
    formula = replace(
        PLAIN, used=2, score="sparsemixer", jitter=0.3, norm="layer", amplitude=1.3,
        frequencies=plain_frequencies(d, BASE) / LONG,
    )  # fmt: skip
    return Tiny("phimoe", keys, made, formula)


MODELS = {
    f.__name__: f
    for f in (gpt_oss, llama4, glm4moe, bailingmoe2, deepseek, granitemoe, minimax_m2, ernie, hunyuan, phimoe)
}
