"""Tiny random models with gated delta nets, as GGUF keys and tensors, beside the formula that they should follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from paper import plain_frequencies
from paper_recurrent import Recurrent
from tiny import (
    BASE,
    CHOSEN,
    COMMON,
    EXPERTS,
    FEED,
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

KEYS, VALUES, WIDE, VALUE, TAPS = 2, 6, 16, 24, 4  # heads of the delta nets, widths of a key and a value
CHANNELS = 2 * KEYS * WIDE + VALUES * VALUE
FULL = (False, True, False)
MOE = {**CHOSEN, "expert_feed_forward_length": F, "expert_shared_feed_forward_length": S}
MIXED = {**EXPERTS, **SHARED, "ffn_gate_inp_shexp.weight": (D,)}  # one axis, as llama.cpp's converter writes it
ATTENTION = {
    "attn_q.weight": (2 * H * d, D), "attn_k.weight": (K * d, D), "attn_v.weight": (K * d, D),
    "attn_output.weight": (D, H * d), **HEAD_NORMS,
}  # fmt: skip
DELTA = {
    "attn_qkv.weight": (CHANNELS, D), "attn_gate.weight": (VALUES * VALUE, D), "ssm_conv1d.weight": (CHANNELS, TAPS),
    "ssm_dt.bias": (VALUES,), "ssm_a": (VALUES,), "ssm_norm.weight": (VALUE,), "ssm_out.weight": (D, VALUES * VALUE),
}  # fmt: skip
TOGETHER = {"ssm_ba.weight": (2 * VALUES, D)}
APART = {"ssm_beta.weight": (VALUES, D), "ssm_alpha.weight": (VALUES, D)}
KEYS_OF = {
    **COMMON, "block_count": len(FULL), "rope.dimension_count": d // 2, "ssm.conv_kernel": TAPS,
    "ssm.state_size": WIDE, "ssm.group_count": KEYS, "ssm.time_step_rank": VALUES, "ssm.inner_size": VALUES * VALUE,
    "attention.recurrent_layers": [not full for full in FULL],
}  # fmt: skip
PLAIN = Recurrent(
    len(FULL), H, K, d, plain_frequencies(d // 2, BASE), d**-0.5, head_norm="head", full=FULL, keys=KEYS, values=VALUES,
)  # fmt: skip


def recurrent_tensors(
    feed: Mapping[str, tuple[int, ...]], gates: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Decay rates from hardly any decay to nearly all."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, full in enumerate(FULL):
        norms = {"attn_norm.weight": (D,), "post_attention_norm.weight": (D,)}
        block = {**norms, **(ATTENTION if full else {**DELTA, **gates}), **feed}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    made = tensors({}, 0) | random_tensors(shapes, 2)
    for name in [name for name in made if name.endswith("ssm_a")]:
        made[name] = -np.exp(np.linspace(-5, 2, VALUES)).astype(np.float32)
    return made


def qwen3next() -> Tiny:
    formula = replace(PLAIN, used=3, normalise=True, shared="gated")
    return Tiny("qwen3next", {**KEYS_OF, **MOE}, recurrent_tensors(MIXED, TOGETHER), formula)


def fused(tiny: Tiny) -> Tiny:
    """q, k, v and z in one matrix, by key heads: folders, and the first GGUF files of Qwen3-Next."""
    made, group = dict(tiny.tensors), VALUES // KEYS * VALUE
    for name in [name for name in made if name.endswith("attn_qkv.weight")]:
        z_name = name.replace("attn_qkv", "attn_gate")
        q, k, v = np.split(made.pop(name), [KEYS * WIDE, 2 * KEYS * WIDE])
        parts = [y.reshape(KEYS, -1, D) for y in (q, k, v, made.pop(z_name))]
        assert parts[2].shape[1] == group
        made[name.replace("attn_qkv", "ssm_in")] = np.concatenate(parts, axis=1).reshape(-1, D)
    return tiny.with_tensors(made)


SECTIONS = {"rope.dimension_sections": [2, 2, 2, 0]}  # of pictures, in frequencies


def qwen35() -> Tiny:
    keys = {**KEYS_OF, **SECTIONS}
    return Tiny("qwen35", keys, recurrent_tensors(FEED, APART), replace(PLAIN, tiled=True))


def qwen35moe() -> Tiny:
    formula = replace(PLAIN, used=3, normalise=True, shared="gated", tiled=True)
    return Tiny("qwen35moe", {**KEYS_OF, **SECTIONS, **MOE}, recurrent_tensors(MIXED, APART), formula)


MODELS = {f.__name__: f for f in (qwen3next, qwen35, qwen35moe)}

NAMES = {
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba", "attn_qkv": "linear_attn.in_proj_qkv", "attn_gate": "linear_attn.in_proj_z",
    "ssm_beta": "linear_attn.in_proj_b", "ssm_alpha": "linear_attn.in_proj_a", "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm", "ssm_out": "linear_attn.out_proj", "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}


def folder_tensors(tiny: Tiny, prefix: str = "model.") -> dict[str, np.ndarray]:
    """The tensors as checkpoints have them: norms less one, rates as logarithms, experts fused, taps with an axis of
    one."""
    found: dict[str, np.ndarray] = {}
    for name, array in tiny.tensors.items():
        if name.endswith("norm.weight") and "ssm" not in name:
            array = array - 1
        if name == "output.weight":
            found["lm_head.weight"] = array
            continue
        if name in OUTER:
            found[prefix + OUTER[name]] = array
            continue
        _, number, rest = name.split(".", 2)
        inner, layer = rest.removesuffix(".weight"), f"{prefix}layers.{number}."
        if inner == "ssm_a":
            found[f"{layer}linear_attn.A_log"] = np.log(-array)
        elif inner == "ssm_dt.bias":
            found[f"{layer}linear_attn.dt_bias"] = array
        elif inner == "ffn_gate_exps":
            up = tiny.tensors[name.replace("gate", "up")]
            found[f"{layer}mlp.experts.gate_up_proj"] = np.concatenate([array, up], axis=1)
        elif inner == "ffn_down_exps":
            found[f"{layer}mlp.experts.down_proj"] = array
        elif inner == "ssm_conv1d":
            found[f"{layer}linear_attn.conv1d.weight"] = array[:, None]
        elif inner != "ffn_up_exps":
            found[f"{layer}{NAMES[inner]}.weight"] = array.reshape(1, -1) if inner.endswith("inp_shexp") else array
    return found


def folder_settings(tiny: Tiny) -> dict[str, object]:
    """config.json of the text model, with what released files say besides."""
    kind = {"qwen3next": "qwen3_next", "qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text"}[tiny.architecture]
    settings: dict[str, object] = {
        "model_type": kind, "num_hidden_layers": len(FULL), "hidden_size": D, "vocab_size": V, "intermediate_size": F,
        "max_position_embeddings": 64, "num_attention_heads": H, "num_key_value_heads": K, "head_dim": d,
        "rms_norm_eps": 1e-5, "linear_conv_kernel_dim": TAPS, "linear_key_head_dim": WIDE,
        "linear_value_head_dim": VALUE, "linear_num_key_heads": KEYS, "linear_num_value_heads": VALUES,
        "layer_types": ["full_attention" if full else "linear_attention" for full in FULL],
        "full_attention_interval": 4, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
    }  # fmt: skip
    if tiny.architecture == "qwen3next":
        settings |= {"rope_theta": BASE, "partial_rotary_factor": 0.5, "rope_scaling": None, "norm_topk_prob": True}
        settings |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    else:
        rope = {"rope_type": "default", "rope_theta": BASE, "partial_rotary_factor": 0.5, "mrope_interleaved": True}
        settings |= {"rope_parameters": rope | {"mrope_section": [2, 2, 2]}, "attn_output_gate": True}
        settings |= {"mamba_ssm_dtype": "float32", "output_gate_type": "swish", "mtp_num_hidden_layers": 1}
    if tiny.architecture != "qwen35":
        settings |= {"num_experts": E, "num_experts_per_tok": 3, "moe_intermediate_size": F}
        settings |= {"shared_expert_intermediate_size": S}
    return settings
