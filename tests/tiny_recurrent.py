"""Tiny random models with gated delta nets, as GGUF keys and tensors, beside the formula that they should follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from paper import plain_frequencies
from paper_recurrent import Recurrent
from tiny import BASE, CHOSEN, COMMON, EXPERTS, HEAD_NORMS, SHARED, D, F, H, K, S, Tiny, d, random_tensors, tensors

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


MODELS = {f.__name__: f for f in (qwen3next,)}
