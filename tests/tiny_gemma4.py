"""Tiny random models of Gemma 4, as GGUF keys and tensors, beside their formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from paper import plain_frequencies
from paper_gemma4 import Gemma4
from tiny import BASE, D, E, F, H, Tiny, V, random_tensors

SPAN, LOCAL, LAYERS, WHOLE, NARROW, P = 5, 500.0, 6, 32, 16, 12  # widths of heads without window and with, layer input
WINDOWS = (SPAN, SPAN, 0, SPAN, SPAN, 0)
TURNING = WHOLE // 8  # frequencies that turn in layers without window: a quarter of a head
FACTORS = np.array([1.0] * TURNING + [1e30] * (WHOLE // 2 - TURNING), np.float32)
KEYS = {
    "block_count": LAYERS, "context_length": 64, "embedding_length": D, "vocab_size": V, "attention.head_count": H,
    "attention.key_length": WHOLE, "attention.value_length": WHOLE, "attention.key_length_swa": NARROW,
    "attention.value_length_swa": NARROW, "attention.layer_norm_rms_epsilon": 1e-5, "attention.sliding_window": SPAN,
    "attention.sliding_window_pattern": np.array([bool(w) for w in WINDOWS]), "rope.dimension_count": WHOLE,
    "rope.dimension_count_swa": NARROW, "rope.freq_base": BASE, "rope.freq_base_swa": LOCAL,
    "final_logit_softcapping": 4.0,
}  # fmt: skip
FORMULA = Gemma4(
    LAYERS, H, 0, 0, np.where(FACTORS < 2, plain_frequencies(WHOLE, BASE), 0), 1.0, windows=WINDOWS,
    sources=tuple(range(LAYERS)), local_frequencies=plain_frequencies(NARROW, LOCAL), logit_softcap=4.0,
    embedding_scale=D**0.5,
)  # fmt: skip


def block(i: int, kv_heads: int, width: int, *, keys: bool = True, values: bool = True) -> dict[str, tuple[int, ...]]:
    d = NARROW if WINDOWS[i] else WHOLE
    norms = dict.fromkeys(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), (D,))
    shapes = {
        **norms, "attn_q": (H * d, D), "attn_q_norm": (d,), "attn_output": (D, H * d), "layer_output_scale": (1,),
        "ffn_gate": (width, D), "ffn_up": (width, D), "ffn_down": (D, width),
    }  # fmt: skip
    shapes |= {"attn_k": (kv_heads * d, D), "attn_k_norm": (d,)} if keys else {}
    shapes |= {"attn_v": (kv_heads * d, D)} if values else {}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def made(blocks: list[dict[str, tuple[int, ...]]], **more: tuple[int, ...]) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output_norm.weight": (D,), **more}
    for i, one in enumerate(blocks):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in one.items()}
    tensors = random_tensors(shapes)
    for name, array in tensors.items():
        if "scale" in name:
            tensors[name] = (1 + 0.3 * array / max(1.0, np.abs(array).max())).astype(np.float32)
    return {**tensors, "rope_freqs.weight": FACTORS}


def gemma4() -> Tiny:
    """As E2B: layer inputs; the last three layers read the keys and values of earlier ones, and are twice as wide."""
    sources, width = (0, 1, 2, 1, 1, 2), (F, F, F, 2 * F, 2 * F, 2 * F)
    blocks = [block(i, 1, width[i], keys=sources[i] == i, values=sources[i] == i) for i in range(LAYERS)]
    for one in blocks:
        one |= {"inp_gate.weight": (P, D), "proj.weight": (D, P), "post_norm.weight": (D,)}
    more: dict[str, Any] = {
        "per_layer_token_embd.weight": (V, LAYERS * P), "per_layer_model_proj.weight": (LAYERS * P, D),
        "per_layer_proj_norm.weight": (P,),
    }  # fmt: skip
    keys = {
        **KEYS,
        "attention.head_count_kv": 1,
        "attention.shared_kv_layers": 3,
        "embedding_length_per_layer_input": P,
    }
    formula = replace(FORMULA, sources=sources)
    return Tiny("gemma4", {**keys, "feed_forward_length": np.array(width)}, made(blocks, **more), formula)


def gemma4_moe() -> Tiny:
    """As 26B-A4B: experts beside a dense part; in layers without window keys are values, of fewer heads."""
    counts = [2 if window else 1 for window in WINDOWS]
    blocks = [block(i, counts[i], F, values=bool(WINDOWS[i])) for i in range(LAYERS)]
    for one in blocks:
        one |= dict.fromkeys((f"{n}.weight" for n in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")), (D,))
        one |= {"ffn_gate_inp.weight": (E, D), "ffn_gate_inp.scale": (D,), "ffn_gate_up_exps.weight": (E, 2 * F, D)}
        one |= {"ffn_down_exps.weight": (E, D, F), "ffn_down_exps.scale": (E,)}
    keys = {
        **KEYS, "attention.head_count_kv": np.array(counts), "feed_forward_length": F, "expert_count": E,
        "expert_used_count": 3, "expert_feed_forward_length": F, "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
    }  # fmt: skip
    return Tiny("gemma4", keys, made(blocks), replace(FORMULA, used=3, normalise=True))


MODELS = {f.__name__: f for f in (gemma4, gemma4_moe)}
