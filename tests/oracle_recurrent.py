"""Cases of families with gated delta nets; see `oracle_cases`.

Results of narrow heads may nearly cancel before they are normed, which makes rounding count: against the formula in
float64, transformers errs by up to 6e-5 in these cases, localmoe by up to 3e-5.
"""

from __future__ import annotations

from random import Random
from typing import Any

from oracle_cases import ROPES, Case, common, experts, softmax_experts

TOLERANCE = 1e-4


def delta(r: Random, rope: str) -> dict[str, Any]:
    keys = r.choice((1, 2, 3))
    theta = {"rope_theta": 500.0, "partial_rotary_factor": r.choice((0.25, 0.5, 1.0))}
    layers = [r.choice(("linear_attention", "full_attention")) for _ in range(3)]
    return common(r, rope) | {
        "head_dim": r.choice((16, 24, 32)), "num_hidden_layers": 3, "rope_parameters": ROPES[rope](r) | theta,
        "linear_num_key_heads": keys, "linear_num_value_heads": keys * r.choice((1, 2, 3)),
        "linear_key_head_dim": r.choice((8, 20)), "linear_value_head_dim": r.choice((8, 12, 40)),
        "linear_conv_kernel_dim": r.choice((2, 4, 5)),
        "layer_types": r.choice((None, ["linear_attention"] * 3, layers)),
    }  # fmt: skip


def qwen3_next(r: Random, rope: str) -> dict[str, Any]:
    widths = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": r.choice((16, 40))}
    return delta(r, rope) | softmax_experts(r) | widths


def qwen3_5(r: Random, rope: str) -> dict[str, Any]:
    settings = delta(r, rope)
    settings["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [2, 1, 1]}
    return settings


def qwen3_5_moe(r: Random, rope: str) -> dict[str, Any]:
    count, used = experts(r)
    widths = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": r.choice((16, 40))}
    settings = qwen3_5(r, rope) | widths | {"num_experts": count, "num_experts_per_tok": used}
    settings.pop("intermediate_size")
    return settings


RECURRENT: dict[str, Case] = {
    "qwen3next": Case("Qwen3Next", qwen3_next, ("plain", "yarn", "linear"), TOLERANCE),
    "qwen35": Case("Qwen3_5Text", qwen3_5, ("plain", "yarn", "linear"), TOLERANCE),
    "qwen35moe": Case("Qwen3_5MoeText", qwen3_5_moe, ("plain", "yarn", "linear"), TOLERANCE),
}
