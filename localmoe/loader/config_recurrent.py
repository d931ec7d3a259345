"""config.json and tensors of families with gated delta nets under GGUF's keys and names; see `config_json.Family`.

What transformers 5.23 computes decides (models/qwen3_next, qwen3_5, qwen3_5_moe); GGUF's form is that of llama.cpp's
converter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from localmoe.errors import FileFormatError
from localmoe.formats import Weight
from localmoe.loader.config_dense import floats, raised, vector
from localmoe.loader.config_json import Family, Keys, Makers, Settings
from localmoe.loader.config_steps import COMMON, head_sizes, layer_pattern, rope
from localmoe.loader.source import shown

SIZES = {name: key for name, key in COMMON.items() if name != "feed_forward_length"}
CHOSEN = {
    "expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}  # fmt: skip
DELTA = {
    "ssm.conv_kernel": "linear_conv_kernel_dim", "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads", "ssm.time_step_rank": "linear_num_value_heads",
}  # fmt: skip


def delta_layers(settings: Settings, keys: Keys, architecture: str) -> None:
    """Heads of both kinds, and which layers have delta nets: all but every n-th where layer_types does not say."""
    head_sizes(settings, keys, architecture)
    settings.expect("attention_bias", False)
    keys["ssm.inner_size"] = settings.whole("linear_value_head_dim") * keys["ssm.time_step_rank"]
    every = settings.whole("full_attention_interval", default=4)
    default = [every == 0 or (i + 1) % every > 0 for i in range(keys["block_count"])]
    keys["attention.recurrent_layers"] = layer_pattern(settings, keys, "linear_attention", default)
    rope(settings, keys, architecture)


def qwen3_next(settings: Settings, keys: Keys, architecture: str) -> None:
    """Every layer has experts."""
    delta_layers(settings, keys, architecture)
    keys["expert_weights_norm"] = settings.flag("norm_topk_prob", True)
    settings.expect("decoder_sparse_step", 1)
    settings.expect("mlp_only_layers", [])


def qwen35(settings: Settings, keys: Keys, architecture: str) -> None:
    """The text model; what the files say of gates is what the code always does, and how pictures are placed does not
    matter to text."""
    delta_layers(settings, keys, architecture)
    settings.expect("attn_output_gate", True)
    settings.expect("output_gate_type", "swish", "silu")
    settings.take("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")


def qwen35_moe(settings: Settings, keys: Keys, architecture: str) -> None:
    """Every layer has experts, whose shares are always renormalised."""
    qwen35(settings, keys, architecture)
    settings.expect("norm_topk_prob", True)
    settings.expect("decoder_sparse_step", 1)
    settings.expect("mlp_only_layers", [])
    settings.take("intermediate_size")


def delta_tensors(makers: Makers, keys: Keys) -> None:
    """Norms multiply by 1 + weight but for that of the delta nets, decay rates are logarithms of their negatives, and
    convolutions have an axis of one."""
    for name in list(makers):
        if name.endswith("norm.weight") and not name.endswith("ssm_norm.weight"):
            makers[name] = partial(raised, makers[name])
        elif name.endswith(".ssm_a"):
            makers[name] = partial(_rates, makers[name])
        elif name.endswith(".ssm_conv1d.weight"):
            makers[name] = partial(_taps, makers[name])


def _rates(make: Callable[[], Weight]) -> Weight:
    weight = make()
    return vector(weight.name, -np.exp(floats(weight)))


def _taps(make: Callable[[], Weight]) -> Weight:
    weight = make()
    if len(weight.shape) != 3 or weight.shape[1] != 1:
        raise FileFormatError(f"tensor {shown(weight.name)} has shape {weight.shape}, expected (channels, 1, taps)")
    return Weight(weight.name, weight.shape[::2], weight.format, (np.concatenate([*weight.slabs]),))


RECURRENT: dict[str, Family] = {
    "qwen3_next": Family("qwen3next", {**COMMON, **CHOSEN, **DELTA}, (qwen3_next,), rewrite=delta_tensors),
    "qwen3_5_text": Family("qwen35", {**COMMON, **DELTA}, (qwen35,), rewrite=delta_tensors),
    "qwen3_5_moe_text": Family("qwen35moe", {**SIZES, **CHOSEN, **DELTA}, (qwen35_moe,), rewrite=delta_tensors),
}
